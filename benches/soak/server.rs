use anyhow::{Context, ensure};
use offshoot_benches::Trunk;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub const GOOD: [&str; 2] = ["blue", "green"];
pub const BAD: &str = "mallory";

/// `offshoot serve` with three tenants, and their tokens.
pub struct ServerProcess {
    process: Child,
    endpoint: String,
    tokens: Vec<(&'static str, String)>,
    _dir: tempfile::TempDir,
}

/// The server at one moment.
pub struct Sample {
    pub seconds: f64,
    /// Bytes.
    pub resident: u64,
    pub n_threads: u64,
    pub n_files: u64,
    /// By team, since its start.
    pub tokens: Vec<u64>,
}

impl ServerProcess {
    pub fn start(offshoot: &Path, trunk: &Trunk) -> anyhow::Result<ServerProcess> {
        let dir = tempfile::tempdir()?;
        let tenants = dir.path().join("tenants.toml");
        let mut tokens = Vec::new();
        for name in GOOD.into_iter().chain([BAD]) {
            let quotas: &[&str] = match name {
                // Enough to do harm, and no more of the device than a small tenant is given.
                BAD => &[
                    "--sessions",
                    "8",
                    "--adapter-bytes",
                    "256MiB",
                    "--open-bytes",
                    "256MiB",
                    "--tokens-per-second",
                    "32",
                    "--tokens-per-microbatch",
                    "512",
                    "--rank",
                    "16",
                ],
                _ => &["--sessions", "4"],
            };
            let output = Command::new(offshoot)
                .args(["tenant", "add", name, "--tenants"])
                .arg(&tenants)
                .args(quotas)
                .stderr(Stdio::null())
                .output()
                .with_context(|| format!("cannot run {}", offshoot.display()))?;
            ensure!(output.status.success(), "offshoot tenant add {name}: {}", output.status);
            tokens.push((name, String::from_utf8(output.stdout)?.trim().to_string()));
        }
        let config = dir.path().join("server.toml");
        std::fs::write(&config, settings(trunk, dir.path())?)?;
        let mut process = Command::new(offshoot)
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.path().join("log"))?)
            .spawn()?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        let ready = lines.find_map(|line| line.strip_prefix("ready grpc=").map(str::to_string));
        let endpoint = ready.with_context(|| {
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            format!("the server did not start:\n{log}")
        })?;
        Ok(ServerProcess { process, endpoint, tokens, _dir: dir })
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn token(&self, tenant: &str) -> &str {
        let known = self.tokens.iter().find(|(name, _)| *name == tenant);
        known.map_or("", |(_, token)| token)
    }

    pub fn sample(&self, seconds: f64, tokens: Vec<u64>) -> anyhow::Result<Sample> {
        let proc = format!("/proc/{}", self.process.id());
        let status = std::fs::read_to_string(format!("{proc}/status"));
        let status = status.context("the server has ended")?;
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let digits = line.unwrap_or_default().chars().filter(char::is_ascii_digit);
            digits.collect::<String>().parse().unwrap_or(0)
        };
        let n_files =
            std::fs::read_dir(format!("{proc}/fd")).map_or(0, |files| files.count() as u64);
        let (resident, n_threads) = (field("VmRSS:") * 1024, field("Threads:"));
        Ok(Sample { seconds, resident, n_threads, n_files, tokens })
    }

    /// Drains it, as SIGTERM does, and tells how it ended and what it complained of.
    pub fn end(mut self) -> anyhow::Result<Value> {
        let id = self.process.id().to_string();
        Command::new("kill").args(["-TERM", &id]).status()?;
        let status = self.process.wait()?;
        let log = std::fs::read_to_string(self._dir.path().join("log"))?;
        let errors: Vec<&str> =
            log.lines().filter(|line| line.contains(" ERROR ")).take(20).collect();
        let audit =
            std::fs::read_to_string(self._dir.path().join("audit.jsonl")).unwrap_or_default();
        Ok(json!({
            "exit": status.code(), "errors": errors, "log_bytes": log.len(),
            "warnings": log.lines().filter(|line| line.contains(" WARN ")).count(),
            "audit_lines": audit.lines().count(), "audit_bytes": audit.len(),
        }))
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn settings(trunk: &Trunk, dir: &Path) -> anyhow::Result<String> {
    let model = std::path::absolute(&trunk.model)?;
    let (from, to) = (trunk.layers.start, trunk.layers.end);
    // One thread for products: the other core is for the wire and the attackers.
    Ok(format!(
        "[listen]\nport = 0\n\
         [model]\nname = {model:?}\nsplit_point_1 = {from}\nsplit_point_2 = {to}\nn_threads = 1\n\
         [limits]\nmemory_bytes = \"3GiB\"\nmax_tokens_per_microbatch = 1024\nadmission_wait_seconds = 2.0\n\
         [store]\ndir = {:?}\n\
         [access]\ntenants = {:?}\naudit_log = {:?}\n",
        dir.join("store"),
        dir.join("tenants.toml"),
        dir.join("audit.jsonl"),
    ))
}

pub fn to_csv(samples: &[Sample]) -> String {
    let mut csv = String::from("seconds,resident_bytes,threads,files,blue_tokens,green_tokens\n");
    for Sample { seconds, resident, n_threads, n_files, tokens } in samples {
        let tokens = tokens.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        csv += &format!("{seconds:.1},{resident},{n_threads},{n_files},{tokens}\n");
    }
    csv
}
