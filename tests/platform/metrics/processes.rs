//! What runs: a server with its tenants, training runs, a Prometheus.

use offshoot_platform::process::{Guard, free_address, program, wait_for};
use offshoot_platform::{root, tool};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tempfile::TempDir;

pub const N_STEPS: usize = 6;
pub const N_MICROBATCHES: usize = 2;

/// Texts, tenants and whatever the others write.
pub struct Place {
    dir: TempDir,
    /// Of the tenant who trains.
    blue: String,
    n_runs: std::cell::Cell<u32>,
}

impl Place {
    pub fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        fs::write(dir.path().join("train.txt"), texts.join("\n\n")).unwrap();
        let add = |args: &[&str]| {
            let mut command = program();
            command.args(["tenant", "add"]).args(args).current_dir(dir.path());
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_string()
        };
        let blue = add(&["blue"]);
        fs::write(dir.path().join("token"), add(&["ops", "--operator"])).unwrap();
        Place { dir, blue, n_runs: Default::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn model() -> String {
        root().join("tests/fixtures/tiny_text").display().to_string()
    }

    fn run(&self, server: &Server, token: &str) -> std::process::Output {
        let number = self.n_runs.replace(self.n_runs.get() + 1);
        let line = format!(
            "train --server {} --max-steps {N_STEPS} --batch-size 1 --save-interval 2 \
             --gradient-accumulation-steps {N_MICROBATCHES} --quiet --no-tensorboard",
            server.address
        );
        let mut command = program();
        command.args(line.split_whitespace()).args(["--model-name", &Place::model()]);
        command.arg("--train-file").arg(self.path("train.txt"));
        command.arg("--output-dir").arg(self.path(&format!("run-{number}")));
        command.env("OFFSHOOT_TOKEN", token).env("OFFSHOOT_CACHE", self.path("tokens"));
        command.output().unwrap()
    }

    /// A whole training run.
    pub fn train(&self, server: &Server) {
        let output = self.run(server, &self.blue);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Somebody without a valid token.
    pub fn is_refused(&self, server: &Server) {
        let mut token = self.blue.clone();
        token.pop();
        token.push(if self.blue.ends_with('a') { 'b' } else { 'a' });
        assert!(!self.run(server, &token).status.success());
    }

    /// The lines of the metering log.
    pub fn metered(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.path("metering.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// `offshoot serve`, with tenants and a page for Prometheus.
pub struct Server {
    process: Guard,
    pub address: String,
    http: String,
}

impl Server {
    /// Sends its metrics to this endpoint.
    pub fn start(place: &Place, endpoint: &str) -> Server {
        let mut command = program();
        let line = "serve --split-point-1 1 --split-point-2 3 --threads 1 --log warn --port 0";
        command.args(line.split_whitespace()).args(["--model-name", &Place::model()]);
        command.arg("--tenants").arg(place.path("tenants.toml"));
        command.arg("--store-dir").arg(place.path("store"));
        command.env("OFFSHOOT_HTTP__PORT", "0");
        // Metrics alone: nobody takes traces here.
        command.env("OFFSHOOT_TELEMETRY__OTLP_ENDPOINT", endpoint);
        command.env("OTEL_TRACES_EXPORTER", "none");
        command.env("OFFSHOOT_TELEMETRY__METRICS_INTERVAL_SECONDS", "0.5");
        command.env("OFFSHOOT_TELEMETRY__METERING_LOG", place.path("metering.jsonl"));
        let mut process = Guard(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said = line.trim().strip_prefix("ready grpc=").and_then(|l| l.split_once(" http="));
        let (address, http) = said.unwrap_or_else(|| panic!("it said {line:?}"));
        Server { address: address.into(), http: http.into(), process }
    }

    /// As SIGTERM does.
    pub fn ends(self) {
        self.process.ends();
    }
}

/// A real one, with our rules, which scrapes the server with an operator's token.
pub struct Prometheus {
    _process: Guard,
    address: SocketAddr,
}

impl Prometheus {
    pub fn start(place: &Place, server: &Server) -> Prometheus {
        let files = root().join("charts/offshoot/files");
        let config = format!(
            "global: {{scrape_interval: 500ms, evaluation_interval: 1s}}\n\
             rule_files: ['{rules}/recording.yaml', '{rules}/alerts.yaml']\n\
             scrape_configs:\n- job_name: trunk\n  authorization: {{credentials_file: '{token}'}}\n  \
             static_configs: [{{targets: ['{http}']}}]\n",
            rules = files.display(),
            token = place.path("token").display(),
            http = server.http
        );
        fs::write(place.path("prometheus.yml"), config).unwrap();
        let address = free_address();
        let mut command = Command::new(tool("prometheus"));
        command.arg(format!("--web.listen-address={address}"));
        command.arg(format!("--storage.tsdb.path={}", place.path("tsdb").display()));
        command.arg(format!("--config.file={}", place.path("prometheus.yml").display()));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Guard(command.spawn().unwrap());
        let prometheus = Prometheus { _process: process, address };
        wait_for("Prometheus scrapes", || prometheus.value("up") == Some(1.0));
        prometheus
    }

    /// The first value that a query gives now.
    pub fn value(&self, query: &str) -> Option<f64> {
        let result = self.query(query)?;
        result.as_array()?.first()?["value"][1].as_str()?.parse().ok()
    }

    /// All values of one label.
    pub fn labels(&self, query: &str, label: &str) -> BTreeSet<String> {
        let result = self.query(query).expect("it answers");
        let all = result.as_array().expect("a vector").iter();
        all.filter_map(|series| series["metric"][label].as_str().map(String::from)).collect()
    }

    fn query(&self, query: &str) -> Option<serde_json::Value> {
        let encode = |byte: u8| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        };
        let query: String = query.bytes().map(encode).collect();
        let mut stream = TcpStream::connect(self.address).ok()?;
        let request =
            format!("GET /api/v1/query?query={query} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let body: serde_json::Value =
            serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        assert_ne!(body["status"], "error", "{body}");
        Some(body["data"]["result"].clone())
    }
}
