//! Processes that tests start and wait for.

use crate::offshoot;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A process that is killed when the test is over.
pub struct Guard(pub Child);

impl Guard {
    /// SIGTERM, and until it has ended, which must be without an error.
    pub fn ends(mut self) {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status().expect("there is kill");
        assert!(sent.success());
        assert!(self.0.wait().expect("it ends").success());
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program under test, without what the developer's own shell says to it.
pub fn program() -> Command {
    let mut command = Command::new(offshoot());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("OTEL_") || text.starts_with("OFFSHOOT_") || text == "RUST_LOG" {
            command.env_remove(&name);
        }
    }
    command.env("OMP_NUM_THREADS", "1");
    command
}

/// Until something is so.
pub fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(90), "{what}: not within 90 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// For those who want to be told their ports.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound")
}
