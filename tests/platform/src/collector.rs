//! A real OpenTelemetry collector: takes OTLP and passes it on to the far end of a test.

use crate::process::{Guard, free_address, wait_for};
use crate::tool;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// One that runs until it is dropped.
pub struct Collector {
    _process: Guard,
    _dir: TempDir,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Collector {
    /// Passes everything on by HTTP to this endpoint.
    pub fn start(endpoint: &str) -> Collector {
        let dir = tempfile::tempdir().expect("a folder");
        let (grpc, http) = (free_address(), free_address());
        let mut command = Command::new(tool("rotel"));
        command.arg("start").args(["--otlp-grpc-endpoint", &grpc.to_string()]);
        command.args(["--otlp-http-endpoint", &http.to_string(), "--exporter", "otlp"]);
        command.args(["--otlp-exporter-endpoint", endpoint]);
        command.args(["--otlp-exporter-protocol", "http"]);
        command.arg("--pid-file").arg(dir.path().join("pid"));
        command.arg("--log-file").arg(dir.path().join("log"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Guard(command.spawn().expect("it can be run"));
        wait_for("the collector listens", || {
            [grpc, http].iter().all(|address| TcpStream::connect(address).is_ok())
        });
        Collector { _process: process, _dir: dir, grpc, http }
    }

    /// Where it takes gRPC.
    pub fn grpc(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Where it takes HTTP.
    pub fn http(&self) -> String {
        format!("http://{}", self.http)
    }
}
