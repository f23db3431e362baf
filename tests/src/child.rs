//! A server in a process of its own, for tests that kill it. The process is this test program again,
//! told to run one test only, which serves instead of testing.

use crate::server_config;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

const STORE: &str = "OFFSHOOT_TEST_CHILD_STORE";
const READY: &str = "child server on ";

/// Every program that starts children has a test named `child_process` that calls this, in the root
/// of its crate. Without being asked it does nothing.
pub fn serve_if_asked() {
    let Some(store) = std::env::var_os(STORE) else { return };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let config = server_config(Path::new(&store));
        let server = offshoot_server::Server::start(config).await.expect("the server starts");
        println!("\n{READY}{}", server.local_addr());
        // Until it is killed, or until its parent is gone.
        let parent = tokio::task::spawn_blocking(|| std::io::stdin().lines().count());
        let _ = parent.await;
        std::process::exit(0);
    });
}

/// A server process. Dropped, it is killed.
pub struct Child {
    process: std::process::Child,
    address: SocketAddr,
}

impl Child {
    /// Starts a server with this store; returns when it listens.
    pub fn start(store: &Path) -> Child {
        let program = std::env::current_exe().expect("this program has a path");
        let mut process = Command::new(program)
            .args(["child_process", "--exact", "--nocapture"])
            .env(STORE, store)
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
}

impl Drop for Child {
    fn drop(&mut self) {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it ends");
    }
}
