//! What runs: a server with its tenants, and training runs.

use offshoot_platform::process::{Guard, program};
use offshoot_platform::root;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Stdio;
use tempfile::TempDir;

/// Texts, tenants with their tokens, output folders.
pub struct Place {
    dir: TempDir,
    tokens: Vec<(String, String)>,
    n_runs: std::cell::Cell<u32>,
}

impl Place {
    pub fn new(tenants: &[&str]) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        fs::write(dir.path().join("train.txt"), texts.join("\n\n")).unwrap();
        let add = |name: &&str| {
            let mut command = program();
            command.args(["tenant", "add", name]).current_dir(dir.path());
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            (name.to_string(), String::from_utf8(output.stdout).unwrap().trim().to_string())
        };
        let tokens = tenants.iter().map(add).collect();
        Place { dir, tokens, n_runs: Default::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn model() -> String {
        root().join("tests/fixtures/tiny_text").display().to_string()
    }

    /// Begins a run of this tenant.
    pub fn train(&self, server: &Server, tenant: &str, more: &str) -> Training {
        let number = self.n_runs.replace(self.n_runs.get() + 1);
        let output = self.path(&format!("run-{number}"));
        let (_, token) = self.tokens.iter().find(|(name, _)| name == tenant).unwrap();
        let line = format!(
            "train --server {} --max-steps {} --batch-size 1 --gradient-accumulation-steps {} \
             --quiet --no-tensorboard {more}",
            server.address,
            super::N_STEPS,
            super::N_MICROBATCHES
        );
        let mut command = program();
        command.args(line.split_whitespace()).args(["--model-name", &Place::model()]);
        command.arg("--train-file").arg(self.path("train.txt"));
        command.arg("--output-dir").arg(&output).env("OFFSHOOT_TOKEN", token);
        command.env("OFFSHOOT_CACHE", self.path("tokens"));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Training { process: Guard(command.spawn().unwrap()), output }
    }
}

/// A run under way.
pub struct Training {
    process: Guard,
    output: PathBuf,
}

/// A run that came to its end.
pub struct Ended {
    /// The session's id.
    pub session: String,
    pub stderr: String,
}

impl Training {
    pub fn ends_well(mut self) -> Ended {
        let mut stderr = String::new();
        self.process.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert!(self.process.0.wait().unwrap().success(), "{stderr}");
        let step = format!("checkpoint_step_{}", super::N_STEPS);
        let state = self.output.join(step).join("training_state.json");
        let text =
            fs::read_to_string(&state).unwrap_or_else(|e| panic!("{}: {e}", state.display()));
        let state: serde_json::Value = serde_json::from_str(&text).unwrap();
        let session = state["session_id"].as_str().unwrap().to_string();
        Ended { session, stderr }
    }
}

/// `offshoot serve`, with tenants.
pub struct Server {
    process: Guard,
    pub address: String,
}

impl Server {
    /// Sends its spans to this endpoint.
    pub fn start(place: &Place, endpoint: &str) -> Server {
        let mut command = program();
        let line = "serve --split-point-1 1 --split-point-2 3 --threads 1 --log warn --port 0";
        command.args(line.split_whitespace()).args(["--model-name", &Place::model()]);
        command.arg("--tenants").arg(place.path("tenants.toml"));
        command.arg("--store-dir").arg(place.path("store"));
        command.env("OFFSHOOT_TELEMETRY__OTLP_ENDPOINT", endpoint);
        command.env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test");
        // The sink takes spans.
        command.env("OTEL_METRICS_EXPORTER", "none");
        let mut process = Guard(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("ready grpc=").expect("it says when ready");
        Server { address: address.to_string(), process }
    }

    /// As SIGTERM does; what it has to say of traces is said then.
    pub fn ends(self) {
        self.process.ends();
    }
}
