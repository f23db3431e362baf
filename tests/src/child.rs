//! A server in a process of its own, for tests that kill it. The process is this test program again,
//! told to run one test only, which serves instead of testing.

use crate::process::{Signal, enduring, limit_file_size, signal};
use crate::{DRAIN, server_config};
use offshoot_server::ServerConfig;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use tokio::signal::unix::{self, SignalKind};

const CONFIG: &str = "OFFSHOOT_TEST_CHILD_CONFIG";
const READY: &str = "child server on ";
const STANDBY: &str = "child server waits for its store";
/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Every program that starts children has a test named `child_process` that calls this, in the root
/// of its crate. Without being asked it does nothing.
pub fn serve_if_asked() {
    let Ok(config) = std::env::var(CONFIG) else { return };
    let config: ServerConfig = serde_json::from_str(&config).expect("its parent wrote it");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let say = |_| println!("\n{STANDBY}");
        let server = offshoot_server::Server::start_told(config, say).await;
        let server = server.unwrap_or_else(|error| panic!("{error}"));
        let mut asked = unix::signal(SignalKind::terminate()).expect("signals can be taken");
        println!("\n{READY}{}", server.local_addr());
        // Until it is killed, asked to end, or its parent is gone.
        let parent = tokio::task::spawn_blocking(|| std::io::stdin().lines().count());
        tokio::select! {
            _ = asked.recv() => {
                let n_lost = server.drain(DRAIN).await;
                std::process::exit(i32::from(n_lost > 0));
            }
            _ = parent => std::process::exit(0),
        }
    });
}

/// A server process. Dropped, it is killed.
pub struct Child {
    process: Process,
    address: SocketAddr,
}

/// One that does not serve yet. Dropped, it is killed.
pub struct Starting {
    process: Process,
    said: mpsc::Receiver<Said>,
}

enum Said {
    Standby,
    Ready(SocketAddr),
}

struct Process(std::process::Child);

impl Starting {
    /// Starts a server and waits for nothing.
    pub fn begin(config: &ServerConfig) -> Starting {
        let program = std::env::current_exe().expect("this program has a path");
        let mut process = enduring(&program)
            .args(["child_process", "--exact", "--nocapture"])
            .env(CONFIG, serde_json::to_string(config).expect("plain values"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be run");
        let output = process.stdout.take().expect("it is piped");
        let (say, said) = mpsc::channel();
        // To its end: a full pipe would stop the child.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let heard = match line.strip_prefix(READY) {
                    Some(address) => Said::Ready(address.parse().expect("it says an address")),
                    None if line == STANDBY => Said::Standby,
                    None => continue,
                };
                // Nobody listens any more, once it serves.
                let _ = say.send(heard);
            }
        });
        Starting { process: Process(process), said }
    }

    /// Until it waits for the store.
    pub fn standby(&self) {
        match self.said.recv_timeout(PATIENCE).expect("it says that it waits") {
            Said::Standby => {}
            Said::Ready(address) => panic!("it serves on {address}, and did not wait"),
        }
    }

    /// Until it serves.
    pub fn ready(self) -> Child {
        loop {
            match self.said.recv_timeout(PATIENCE).expect("it says that it is ready") {
                Said::Standby => {}
                Said::Ready(address) => return Child { process: self.process, address },
            }
        }
    }

    /// Until it has ended with an error, without having served.
    pub fn fails(mut self) {
        let served = self.said.iter().any(|said| matches!(said, Said::Ready(_)));
        let status = self.process.0.wait().expect("it ends");
        assert!(!served && !status.success(), "it served: {served}, and ended with {status}");
    }
}

impl Child {
    /// Starts a server with this store and the usual settings; returns when it listens.
    pub fn start(store: &Path) -> Child {
        Child::start_with(&server_config(store))
    }

    /// Starts a server with any settings; see [`server_config`].
    pub fn start_with(config: &ServerConfig) -> Child {
        Starting::begin(config).ready()
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `kill -9`.
    pub fn kill(self) {}

    /// SIGTERM, and until it has ended: every session must be durable then.
    pub fn drain(self) {
        self.terminate();
        let status = self.ended();
        assert!(status.success(), "the drained server ended with {status}");
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        signal(&self.process.0, Signal::TERM).expect("it runs");
    }

    /// Until it has ended.
    pub fn ended(mut self) -> ExitStatus {
        // Waiting would close it, and the child would take its parent for gone.
        let _stdin = self.process.0.stdin.take();
        self.process.0.wait().expect("it ends")
    }

    /// Stops the process where it is, without a word to anyone, until it is resumed.
    pub fn pause(&self) {
        signal(&self.process.0, Signal::STOP).expect("it runs");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal(&self.process.0, Signal::CONT).expect("it runs");
    }

    /// Its disk is full for files of more than so many bytes; none: there is room again.
    pub fn fill_disk(&self, behind: Option<u64>) {
        limit_file_size(&self.process.0, behind).expect("it runs");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        self.0.wait().expect("it ends");
    }
}
