//! `offshoot serve` as a process.

use anyhow::{Context, bail, ensure};
use offshoot_tests::process::{Signal, signal};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longer than a start or a drain takes.
const PATIENCE: Duration = Duration::from_secs(180);

/// What all servers of a run have in common.
pub struct Service {
    pub program: PathBuf,
    pub model: PathBuf,
    pub layers: Range<usize>,
    pub dir: PathBuf,
    /// 0: a free one.
    pub port: u16,
}

/// A server that was started.
pub struct Server {
    process: Child,
    said: mpsc::Receiver<(Said, Instant)>,
}

enum Said {
    Standby,
    Ready(SocketAddr),
}

impl Service {
    /// Of this folder, made anew.
    pub fn new(
        program: &Path,
        trunk: &offshoot_benches::Trunk,
        dir: PathBuf,
    ) -> anyhow::Result<Service> {
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        // Which jobs meet in a batch depends on the time, and with it the last bits.
        fs::write(dir.join("server.toml"), "[limits]\nmax_tokens_per_batch = 1\n")?;
        let (program, model) = (program.to_path_buf(), trunk.model.clone());
        Ok(Service { program, model, layers: trunk.layers.clone(), dir, port: 0 })
    }

    /// Starts one; `waits`: for the one that has the store.
    pub fn start(&self, waits: bool) -> anyhow::Result<Server> {
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("log.txt"))?;
        let log: File = log;
        let mut command = Command::new(&self.program);
        command.args(["serve", "--threads", "1", "--log", "info", "--config"]);
        command.arg(self.dir.join("server.toml"));
        command.arg("--store-dir").arg(self.dir.join("store"));
        command.arg("--model-name").arg(&self.model);
        command.args(["--split-point-1", &self.layers.start.to_string()]);
        command.args(["--split-point-2", &self.layers.end.to_string()]);
        command.args(["--port", &self.port.to_string()]);
        if waits {
            command.args(["--store-wait-seconds", "170"]);
        }
        command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let process = command.spawn();
        let mut process =
            process.with_context(|| format!("cannot run {}", self.program.display()))?;
        let output = process.stdout.take().context("it is piped")?;
        let (say, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let at = Instant::now();
                // The address, and whatever else is said behind it.
                let ready = line.strip_prefix("ready grpc=");
                let ready = ready.and_then(|rest| rest.split(' ').next()?.parse().ok());
                let heard = match ready {
                    Some(address) => Said::Ready(address),
                    None if line.starts_with("standby ") => Said::Standby,
                    None => continue,
                };
                // Nobody listens any more once it serves.
                let _ = say.send((heard, at));
            }
        });
        Ok(Server { process, said })
    }

    /// Starts one and waits for it.
    pub fn serve(&self) -> anyhow::Result<(Server, SocketAddr)> {
        let mut server = self.start(false)?;
        let (address, _) = server.ready()?;
        Ok((server, address))
    }
}

impl Server {
    /// Until it waits for the store.
    pub fn standby(&mut self) -> anyhow::Result<()> {
        match self.hear()? {
            (Said::Standby, _) => Ok(()),
            (Said::Ready(_), _) => bail!("it serves, and was to wait"),
        }
    }

    /// Until it serves: where, and since when.
    pub fn ready(&mut self) -> anyhow::Result<(SocketAddr, Instant)> {
        loop {
            if let (Said::Ready(address), at) = self.hear()? {
                return Ok((address, at));
            }
        }
    }

    fn hear(&mut self) -> anyhow::Result<(Said, Instant)> {
        let heard = self.said.recv_timeout(PATIENCE);
        heard.with_context(|| match self.process.try_wait() {
            Ok(Some(status)) => format!("the server ended with {status}; its log says why"),
            _ => "the server says nothing; see its log".to_string(),
        })
    }

    /// SIGTERM.
    pub fn terminate(&self) -> anyhow::Result<Instant> {
        signal(&self.process, Signal::TERM).context("the server could not be asked to end")?;
        Ok(Instant::now())
    }

    /// Until it has ended, having saved everything.
    pub fn ended(&mut self) -> anyhow::Result<Instant> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "the drained server ended with {status}");
                return Ok(Instant::now());
            }
            ensure!(begun.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
