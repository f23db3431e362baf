//! A server in a process of its own, for tests that kill it. The process is this test program again,
//! told to run one test only, which serves instead of testing.

use crate::process::{Signal, enduring, limit_file_size, signal};
use crate::{DRAIN, server_config};
use offshoot_server::ServerConfig;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use tokio::signal::unix::{self, SignalKind};

const CONFIG: &str = "OFFSHOOT_TEST_CHILD_CONFIG";
const READY: &str = "child server on ";

/// Every program that starts children has a test named `child_process` that calls this, in the root
/// of its crate. Without being asked it does nothing.
pub fn serve_if_asked() {
    let Ok(config) = std::env::var(CONFIG) else { return };
    let config: ServerConfig = serde_json::from_str(&config).expect("its parent wrote it");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let server = offshoot_server::Server::start(config).await.expect("the server starts");
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
    process: std::process::Child,
    address: SocketAddr,
}

impl Child {
    /// Starts a server with this store and the usual settings; returns when it listens.
    pub fn start(store: &Path) -> Child {
        Child::start_with(&server_config(store))
    }

    /// Starts a server with any settings; see [`server_config`].
    pub fn start_with(config: &ServerConfig) -> Child {
        let program = std::env::current_exe().expect("this program has a path");
        let mut process = enduring(&program)
            .args(["child_process", "--exact", "--nocapture"])
            .env(CONFIG, serde_json::to_string(config).expect("plain values"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be run");
        let output = process.stdout.take().expect("it is piped");
        let mut lines = BufReader::new(output).lines();
        let ready = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix(READY).map(str::to_string))
            .expect("the child says when it is ready");
        // A full pipe would stop the child.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let address = ready.parse().expect("it says an address");
        Child { process, address }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `kill -9`.
    pub fn kill(self) {}

    /// SIGTERM, and until it has ended: every session must be durable then.
    pub fn drain(mut self) {
        // Waiting would close it, and the child would take its parent for gone.
        let _stdin = self.process.stdin.take();
        signal(&self.process, Signal::TERM).expect("it runs");
        let status = self.process.wait().expect("it ends");
        assert!(status.success(), "the drained server ended with {status}");
    }

    /// Stops the process where it is, without a word to anyone, until it is resumed.
    pub fn pause(&self) {
        signal(&self.process, Signal::STOP).expect("it runs");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal(&self.process, Signal::CONT).expect("it runs");
    }

    /// Its disk is full for files of more than so many bytes; none: there is room again.
    pub fn fill_disk(&self, behind: Option<u64>) {
        limit_file_size(&self.process, behind).expect("it runs");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        self.process.wait().expect("it ends");
    }
}
