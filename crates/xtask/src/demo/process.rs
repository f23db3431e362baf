//! The demo's processes. They end with their owner, whatever happens.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::binary;

/// `offshoot` with some arguments; what it prints goes to a log file.
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

/// Threads of each process: a server and two clients share the cores, and thread pools that have
/// more threads than there are cores wait for each other most of the time.
fn threads_each() -> usize {
    const PROCESSES: usize = 3;
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / PROCESSES).max(1))
}

impl Process {
    pub fn start(name: &'static str, log: &Path, arguments: Vec<String>) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(binary())
            .args(arguments)
            .env("OMP_NUM_THREADS", threads_each().to_string())
            // What a process writes beside its named outputs lands in the run's folder.
            .current_dir(log.parent().unwrap_or(Path::new(".")))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", binary().display()))?;
        Ok(Self { name, child, log: log.to_owned(), ended: None })
    }

    /// Whether it ended well; [`Process::poll`] finds out.
    pub fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Looks whether it ended; ending badly is an error with the end of its log.
    pub fn poll(&mut self) -> Result<()> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        match self.ended {
            Some(status) if !status.success() => {
                bail!("{} failed ({status}). The end of its log:\n{}", self.name, self.log_tail())
            }
            _ => Ok(()),
        }
    }

    fn log_tail(&self) -> String {
        const LINES: usize = 15;
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    /// A field of the process's status, in bytes; 0 where the system does not tell.
    fn memory_bytes(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let kilobytes = status.ok().and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        });
        kilobytes.unwrap_or(0) * 1024
    }

    /// Asks it to end and waits.
    fn terminate(&mut self, within: Duration) -> Result<()> {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        let asked = Instant::now();
        while self.ended.is_none() {
            self.poll()?;
            ensure!(
                asked.elapsed() < within,
                "{} did not end within {} s of SIGTERM",
                self.name,
                within.as_secs()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A trunk server that is ready.
pub struct Server {
    process: Process,
    pub port: u16,
}

impl Server {
    const READY_WITHIN: Duration = Duration::from_secs(120);
    const DRAINED_WITHIN: Duration = Duration::from_secs(60);

    pub fn start(model: &str, split: &[String; 2], dtype: &str, run: &Path) -> Result<Self> {
        let mut arguments = vec!["serve".to_owned(), format!("--model-name={model}")];
        arguments.extend_from_slice(split);
        arguments.extend([
            format!("--dtype={dtype}"),
            "--host=127.0.0.1".into(),
            "--port=0".into(),
        ]);
        let mut process = Process::start("the server", &run.join("server.log"), arguments)?;
        let started = Instant::now();
        loop {
            process.poll()?;
            ensure!(!process.has_ended(), "the server ended before it was ready");
            if let Some(port) = ready_port(&fs::read_to_string(&process.log)?) {
                return Ok(Self { process, port });
            }
            ensure!(
                started.elapsed() < Self::READY_WITHIN,
                "the server was not ready within {} s. The end of its log:\n{}",
                Self::READY_WITHIN.as_secs(),
                process.log_tail()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn resident_bytes(&self) -> u64 {
        self.process.memory_bytes("VmRSS")
    }

    pub fn peak_bytes(&self) -> u64 {
        self.process.memory_bytes("VmHWM")
    }

    pub fn expect_alive(&mut self) -> Result<()> {
        self.process.poll()?;
        ensure!(!self.process.has_ended(), "the server ended in the middle of the demo");
        Ok(())
    }

    /// Lets it drain, as an operator would.
    pub fn stop(mut self) -> Result<()> {
        self.process.terminate(Self::DRAINED_WITHIN)
    }
}

/// The port in the line that says that the server takes clients.
fn ready_port(log: &str) -> Option<u16> {
    // Only whole lines: the last one may still be growing.
    let whole = &log[..log.rfind('\n')?];
    let line = whole.lines().find_map(|line| line.strip_prefix("ready grpc="))?;
    line.split_whitespace().next()?.rsplit(':').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::ready_port;

    #[test]
    fn a_ready_line_counts_when_it_is_whole() {
        assert_eq!(ready_port("loading\nready grpc=127.0.0.1:5012"), None);
        assert_eq!(ready_port("loading\nready grpc=127.0.0.1:50123\n"), Some(50123));
        assert_eq!(ready_port("not ready grpc=127.0.0.1:50123\n"), None);
    }
}
