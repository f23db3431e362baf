//! The two commands as processes, and what is seen of them while they run.

use anyhow::{Context, bail, ensure};
use offshoot_tests::process::{Signal, enduring, signal};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Longer than anything here should take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What was seen of all servers or trainers of a run so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// Lines that begin with "step".
    pub n_steps: AtomicU64,
    /// Of those, how many were at or before one that was seen already.
    pub n_replayed: AtomicU64,
    /// The furthest step.
    pub furthest: AtomicU64,
    pub n_rollbacks: AtomicU64,
    pub n_reconnections: AtomicU64,
    /// Failed writes for want of room.
    pub n_full: AtomicU64,
    /// Sessions that the server parked or wrote when they left it.
    pub n_parked: AtomicU64,
    pub n_panics: AtomicU64,
    /// What trainers said when they gave up.
    pub errors: Mutex<Vec<String>>,
}

impl Seen {
    fn line(&self, line: &str) {
        let count = |sum: &AtomicU64, text: &str| {
            if line.contains(text) {
                sum.fetch_add(1, Ordering::SeqCst);
            }
        };
        count(&self.n_rollbacks, "the server fell back to step ");
        count(&self.n_rollbacks, "the server lost what it had of the step after ");
        count(&self.n_reconnections, "reconnected;");
        count(&self.n_full, "File too large");
        count(&self.n_parked, "session parked");
        count(&self.n_panics, "panicked at");
        if let Some(error) = line.strip_prefix("error: ") {
            self.errors.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(error.into());
        }
        let step = line.strip_prefix("step ").and_then(|rest| rest.trim_start().split('/').next());
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            self.n_steps.fetch_add(1, Ordering::SeqCst);
            if self.furthest.fetch_max(step, Ordering::SeqCst) >= step {
                self.n_replayed.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// What tells that the trainer noticed something.
    pub fn interruptions(&self) -> u64 {
        self.n_rollbacks.load(Ordering::SeqCst) + self.n_reconnections.load(Ordering::SeqCst)
    }

    pub fn steps(&self) -> u64 {
        self.n_steps.load(Ordering::SeqCst)
    }
}

/// Writes every line into a log and looks at it.
fn follow(from: impl Read + Send + 'static, log: Log, seen: Arc<Seen>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            seen.line(&line);
            log.line(&line);
        }
    });
}

/// A file that several threads write lines into.
#[derive(Clone)]
pub struct Log(Arc<Mutex<File>>, Instant);

impl Log {
    pub fn open(path: &Path) -> anyhow::Result<Log> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Log(Arc::new(Mutex::new(file)), Instant::now()))
    }

    pub fn line(&self, line: &str) {
        let seconds = self.1.elapsed().as_secs_f64();
        let mut file = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A log that cannot be written harms nothing that is compared.
        let _ = writeln!(file, "{seconds:9.3} {line}");
    }
}

/// A process that is killed when it is dropped.
pub struct Process(Child);

impl Process {
    pub fn signal(&self, name: Signal) -> anyhow::Result<()> {
        signal(&self.0, name).context("a signal could not be sent")
    }

    pub fn limit_file_size(&self, bytes: Option<u64>) -> anyhow::Result<()> {
        let limited = offshoot_tests::process::limit_file_size(&self.0, bytes);
        limited.context("the limit of file sizes could not be set")
    }

    /// None: it runs.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.0.try_wait().context("a process cannot be waited for")
    }

    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(begun.elapsed() < PATIENCE, "a process does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// `kill -9`. Whether it still ran.
    pub fn kill(&mut self) -> anyhow::Result<bool> {
        if self.ended()?.is_some() {
            return Ok(false);
        }
        self.signal(Signal::KILL)?;
        self.0.wait()?;
        Ok(true)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that is ready.
pub struct Server {
    pub process: Process,
    pub address: SocketAddr,
}

impl Server {
    pub fn start(
        program: &Path,
        args: &[&str],
        log: &Log,
        seen: &Arc<Seen>,
    ) -> anyhow::Result<Server> {
        let mut command = enduring(program);
        command.arg("serve").args(args).env("OMP_NUM_THREADS", "1");
        let mut process = spawn(command)?;
        let (sender, ready) = mpsc::channel();
        let output = process.0.stdout.take().context("it is piped")?;
        let errors = process.0.stderr.take().context("it is piped")?;
        follow(errors, log.clone(), seen.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("ready grpc=") {
                    // Nobody waits for a second one.
                    let _ = sender.send(address.to_string());
                }
            }
        });
        let Ok(address) = ready.recv_timeout(PATIENCE) else {
            bail!("the server does not begin ({:?}); its log says why", process.ended()?)
        };
        Ok(Server { process, address: address.parse().context("the server says no address")? })
    }

    /// As an operator ends it.
    pub fn drain(mut self) -> anyhow::Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait()
    }
}

/// Starts `offshoot train`.
pub fn train(
    program: &Path,
    args: &[String],
    log: &Log,
    seen: &Arc<Seen>,
) -> anyhow::Result<Process> {
    let mut command = Command::new(program);
    command.arg("train").args(args).env("OMP_NUM_THREADS", "1");
    let mut process = spawn(command)?;
    let output = process.0.stdout.take().context("it is piped")?;
    let errors = process.0.stderr.take().context("it is piped")?;
    follow(output, log.clone(), seen.clone());
    follow(errors, log.clone(), seen.clone());
    Ok(process)
}

fn spawn(mut command: Command) -> anyhow::Result<Process> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let what = format!("{command:?}");
    Ok(Process(command.spawn().with_context(|| format!("cannot run {what}"))?))
}
