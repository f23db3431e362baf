use crate::legacy::LegacyServe;
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use offshoot_server::{ComputeDType, ServerConfig};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Serve the middle layers of a model.
///
/// Loads the layers [SPLIT_POINT_1, SPLIT_POINT_2) once, frozen, and trains one LoRA adapter with
/// its optimizer for each client session. Prints one line `ready grpc=HOST:PORT` on stdout when
/// clients can connect, with ` http=HOST:PORT` behind it if there is an --http-port. SIGTERM or Ctrl-C ends it after open work is finished and every session is
/// saved; sessions go on after a restart with the same --store-dir. A second one does not wait for open
/// work any more, a third one ends at once. SIGHUP reads the tenants file again and begins the audit log
/// anew; both happen by themselves, too, within seconds of a change.
///
/// Exit codes: 0 every session is saved, 3 some are not and go back to their last snapshots, 1 it could
/// not start or go on, 2 the command line is wrong.
///
/// Every setting can come from (later ones win): the defaults, the file of --config, environment
/// variables such as OFFSHOOT_LIMITS__MAX_RANK=64, and these options.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    session: SessionArgs,
    #[command(flatten)]
    pub legacy: LegacyServe,
}

const EXAMPLES: &str = "\
Examples:
  offshoot serve --model-name Qwen/Qwen2-0.5B --split-point-1 0 --split-point-2 14
  offshoot serve --model-name ./model.gguf --split-point-2 20 --device cuda --dtype bf16
  offshoot serve --config server.toml

A file for --config:
  [model]
  name = \"Qwen/Qwen2-0.5B\"
  split_point_1 = 0
  split_point_2 = 14
  [listen]
  port = 50051
  [limits]
  max_rank = 64
  memory_bytes = \"8GiB\"
All settings with their defaults are in docs/server.toml of the repository.";

#[derive(Args)]
#[command(next_help_heading = "Model")]
struct ModelArgs {
    /// Model: a Hugging Face directory, a GGUF file or a hub name. Clients name the same one.
    #[arg(long, value_name = "NAME|PATH")]
    model_name: Option<String>,
    /// gpt2, llama, qwen2, qwen3 or gemma; only checked, the model says itself what it is.
    #[arg(long, value_name = "TYPE")]
    pub model_type: Option<String>,
    /// First layer of the trunk [default: 0]. Higher keeps more layers, and more of the text's
    /// traces, with the clients.
    #[arg(long, value_name = "LAYER")]
    split_point_1: Option<usize>,
    /// First layer behind the trunk, such as 6 for GPT-2 (12 layers), 14 for Qwen2-0.5B (24).
    #[arg(long, value_name = "LAYER")]
    split_point_2: Option<usize>,
    /// Where the trunk runs: cpu, cuda or cuda:N [default: cpu].
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Type of the trunk's weights and products; adapters are always f32 [default: f32].
    #[arg(long, value_enum)]
    dtype: Option<DType>,
    /// Threads of one product on the CPU [default: libtorch's choice].
    #[arg(long, value_name = "N")]
    threads: Option<u16>,
}

#[derive(Args)]
#[command(next_help_heading = "Network and files")]
struct ListenArgs {
    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, value_name = "IP")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 50051].
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Serve the console, /metrics, /healthz and /readyz by HTTP on this port; 0 takes a free one [default:
    /// none].
    #[arg(long, value_name = "PORT")]
    http_port: Option<u16>,
    /// Address to listen on for HTTP [default: 127.0.0.1].
    #[arg(long, value_name = "IP")]
    http_host: Option<String>,
    /// Give /metrics to whoever asks, without an operator's token: only in a network that keeps strangers
    /// out.
    #[arg(long)]
    open_metrics: bool,
    /// Listen on an address that other machines reach without both --tenants and TLS: only in a
    /// network that keeps strangers out.
    #[arg(long)]
    allow_insecure_network: bool,
    /// Who may use the server: the file that `offshoot tenant add` writes, read again when it changes
    /// [default: everybody who reaches it].
    #[arg(long, value_name = "FILE")]
    tenants: Option<PathBuf>,
    /// Write down who opened, exported, deleted what and when, as JSON lines.
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// The server's TLS certificate, those of its issuers behind it; with --tls-key it turns TLS on.
    /// Both are read again when they change.
    #[arg(long, value_name = "PEM")]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert.
    #[arg(long, value_name = "PEM")]
    tls_key: Option<PathBuf>,
    /// Let in only who shows a certificate of one of these issuers (mutual TLS).
    #[arg(long, value_name = "PEM")]
    tls_client_ca: Option<PathBuf>,
    /// Where sessions survive; one server each [default: offshoot-store].
    #[arg(long, value_name = "DIR")]
    store_dir: Option<PathBuf>,
    /// Wait so long for another server to leave the store, with the trunk loaded: start the next
    /// server so, then end the one before. Prints `standby store=DIR` when it waits [default: 0, a store that
    /// is in use is an error].
    #[arg(long, value_name = "SECONDS")]
    store_wait_seconds: Option<f64>,
    /// Snapshots kept of those that a session's client asked for; the trainer keeps five checkpoints and the best.
    #[arg(long, value_name = "N")]
    snapshots_kept: Option<usize>,
    /// Settings as a TOML file; a key that is unknown is an error.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Sessions and limits")]
struct SessionArgs {
    /// A session without a client for so long is saved and leaves the device.
    #[arg(long, value_name = "SECONDS")]
    lease_seconds: Option<f64>,
    /// A session without a frame for so long leaves the device for the disk until its next one
    /// [default: 60].
    #[arg(long, value_name = "SECONDS")]
    idle_seconds: Option<f64>,
    /// Most memory of the device for weights, adapters, tapes, caches and workspace, such as 8GiB. Sessions
    /// that do not fit wait on disk for their turn [default: on the CPU 0.8 of what is available,
    /// elsewhere no limit].
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory_limit: Option<u64>,
    /// Longest time from a signal to the end.
    #[arg(long, value_name = "SECONDS")]
    drain_timeout_seconds: Option<f64>,
    /// Most tokens that a client may send at once.
    #[arg(long, value_name = "TOKENS")]
    max_tokens_per_microbatch: Option<usize>,
    /// Most microbatches of a session between their forward and backward.
    #[arg(long, value_name = "N")]
    max_open_microbatches: Option<usize>,
    /// Most sequences that a session generates at a time, each with its key/value cache.
    #[arg(long, value_name = "N")]
    max_open_caches: Option<usize>,
    /// Most tokens of one sequence that is generated, its prompt included.
    #[arg(long, value_name = "TOKENS")]
    max_cache_tokens: Option<usize>,
    /// Highest LoRA rank that a client may ask for.
    #[arg(long, value_name = "R")]
    max_rank: Option<usize>,
}

/// A size as people write it.
pub fn bytes(text: &str) -> Result<u64, String> {
    let expected = "expected a number of bytes, or one with a unit such as 8GiB or 500MB";
    text.parse().map(|size: ByteSize| size.as_u64()).map_err(|_| expected.to_string())
}

#[derive(Clone, Copy, ValueEnum)]
pub enum DType {
    F32,
    Bf16,
    F16,
}

impl From<DType> for ComputeDType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => ComputeDType::F32,
            DType::Bf16 => ComputeDType::Bf16,
            DType::F16 => ComputeDType::F16,
        }
    }
}

impl ServeArgs {
    /// The model's type, if it is to be checked.
    pub fn model_type(&self) -> Option<&str> {
        self.model.model_type.as_deref()
    }

    /// Defaults, file, environment and options in one.
    pub fn config(&self) -> anyhow::Result<ServerConfig> {
        settings(self.listen.config.as_deref(), self.overrides())
    }

    /// The options that were given, as a tree of settings.
    fn overrides(&self) -> Value {
        let ServeArgs { model, listen, session, .. } = self;
        let dtype = model.dtype.map(ComputeDType::from);
        let insecure = listen.allow_insecure_network.then_some(true);
        let all = [
            ("model", "name", json!(model.model_name)),
            ("model", "split_point_1", json!(model.split_point_1)),
            ("model", "split_point_2", json!(model.split_point_2)),
            ("model", "device", json!(model.device)),
            ("model", "dtype", json!(dtype)),
            ("model", "n_threads", json!(model.threads)),
            ("listen", "host", json!(listen.host)),
            ("listen", "port", json!(listen.port)),
            ("listen", "allow_insecure_network", json!(insecure)),
            ("http", "host", json!(listen.http_host)),
            ("http", "port", json!(listen.http_port)),
            ("http", "open_metrics", json!(listen.open_metrics.then_some(true))),
            ("access", "tenants", json!(listen.tenants)),
            ("access", "audit_log", json!(listen.audit_log)),
            ("tls", "cert", json!(listen.tls_cert)),
            ("tls", "key", json!(listen.tls_key)),
            ("tls", "client_ca", json!(listen.tls_client_ca)),
            ("store", "dir", json!(listen.store_dir)),
            ("store", "snapshots_kept", json!(listen.snapshots_kept)),
            ("store", "wait_seconds", json!(listen.store_wait_seconds)),
            ("session", "lease_seconds", json!(session.lease_seconds)),
            ("session", "idle_seconds", json!(session.idle_seconds)),
            ("limits", "memory_bytes", json!(session.memory_limit)),
            ("drain", "timeout_seconds", json!(session.drain_timeout_seconds)),
            ("limits", "max_tokens_per_microbatch", json!(session.max_tokens_per_microbatch)),
            ("limits", "max_open_microbatches", json!(session.max_open_microbatches)),
            ("limits", "max_open_caches", json!(session.max_open_caches)),
            ("limits", "max_cache_tokens", json!(session.max_cache_tokens)),
            ("limits", "max_rank", json!(session.max_rank)),
        ];
        let mut tree = Map::new();
        for (part, key, value) in all {
            if !value.is_null() {
                let part = tree.entry(part).or_insert_with(|| json!({}));
                part[key] = value;
            }
        }
        Value::Object(tree)
    }
}

const BESIDE_THE_FILE: [&str; 6] = [
    "access.tenants",
    "access.audit_log",
    "tls.cert",
    "tls.key",
    "tls.client_ca",
    "telemetry.metering_log",
];

/// A server's settings from all sources: defaults, this file, environment, and these overrides.
pub fn settings(file: Option<&Path>, overrides: Value) -> anyhow::Result<ServerConfig> {
    let mut figment = Figment::from(Serialized::defaults(ServerConfig::default()));
    if let Some(file) = file {
        anyhow::ensure!(file.is_file(), "--config {}: there is no such file", file.display());
        figment = beside(figment.merge(Toml::file_exact(file)), file);
    }
    // Only names with a double underscore: Kubernetes sets OFFSHOOT_PORT and its like for a service
    // of this name.
    let ours = Env::prefixed("OFFSHOOT_").filter(|key| key.as_str().contains("__")).split("__");
    let figment = figment.merge(ours).merge(Serialized::globals(overrides));
    let mut config: ServerConfig = figment.extract().map_err(|errors| {
        // All of them, each with the file or variable that it came from.
        let lines: Vec<String> = errors.into_iter().map(|error| error.to_string()).collect();
        // Figment's profiles are nothing that a user of ours knows.
        let lines: Vec<_> =
            lines.iter().map(|line| line.replace("key \"default.", "key \"")).collect();
        anyhow::anyhow!("settings: {}", lines.join("; "))
    })?;
    let ServerConfig { access, tls, telemetry, .. } = &mut config;
    let paths = [&mut access.tenants, &mut access.audit_log, &mut telemetry.metering_log];
    let paths = paths.into_iter().chain([&mut tls.cert, &mut tls.key, &mut tls.client_ca]);
    for path in paths.flatten() {
        // An empty one is an error that names its setting, later.
        *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
    }
    Ok(config)
}

/// Makes the paths that a settings file names relative to its folder, so that whoever reads it, the
/// server or `offshoot tenant`, finds the same files wherever it was started.
fn beside(mut figment: Figment, file: &Path) -> Figment {
    let dir = file.parent().unwrap_or(Path::new(""));
    for key in BESIDE_THE_FILE {
        let named = figment.extract_inner::<PathBuf>(key).ok();
        if let Some(path) = named.filter(|path| path != Path::new("")) {
            figment = figment.merge(Serialized::default(key, dir.join(path)));
        }
    }
    figment
}

#[cfg(test)]
#[expect(clippy::result_large_err, reason = "figment's Jail wants its own error")]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;
    use figment::Jail;

    fn parse(line: &str) -> ServeArgs {
        let cli = Cli::try_parse_from(format!("offshoot serve {line}").split_whitespace()).unwrap();
        let Command::Serve(args) = cli.command else { unreachable!("serve was asked for") };
        args
    }

    #[test]
    fn later_sources_win() {
        Jail::expect_with(|jail| {
            jail.create_file(
                "s.toml",
                "[model]\nname = \"file\"\nsplit_point_2 = 3\n[limits]\nmax_rank = 1\n[session]\nlease_seconds = 9\n",
            )?;
            jail.set_env("OFFSHOOT_LIMITS__MAX_RANK", "2");
            jail.set_env("OFFSHOOT_MODEL__SPLIT_POINT_2", "4");
            // As Kubernetes sets it.
            jail.set_env("OFFSHOOT_PORT", "tcp://10.0.0.1:50051");
            let config = parse("--config s.toml --split-point-2 5 --dtype bf16").config().unwrap();
            assert_eq!(config.model.name, "file");
            assert_eq!(config.model.split_point_2, 5);
            assert_eq!(config.model.dtype, ComputeDType::Bf16);
            assert_eq!(config.limits.max_rank, 2);
            assert_eq!(config.session.lease_seconds, 9.0);
            assert_eq!(config.listen, ServerConfig::default().listen);
            Ok(())
        });
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_its_source() {
        Jail::expect_with(|jail| {
            jail.create_file("s.toml", "[limits]\nmax_rnk = 1\n")?;
            let error = parse("--config s.toml").config().unwrap_err().to_string();
            assert!(error.contains("max_rnk") && error.contains("s.toml"), "{error}");
            assert!(error.contains("limits.max_rnk") && !error.contains("default."), "{error}");
            let error = parse("--config other.toml").config().unwrap_err().to_string();
            assert!(error.contains("other.toml"), "{error}");
            jail.set_env("OFFSHOOT_LIMIT__MAX_RANK", "2");
            let error = parse("").config().unwrap_err().to_string();
            assert!(error.contains("limit"), "{error}");
            Ok(())
        });
    }

    #[test]
    fn paths_in_a_file_are_relative_to_it_and_others_to_the_current_folder() {
        Jail::expect_with(|jail| {
            let text = "[access]\ntenants = \"t.toml\"\naudit_log = \"/var/a.jsonl\"\n\
                        [tls]\ncert = \"c.pem\"\nkey = \"c.key\"\n[store]\ndir = \"s\"\n";
            jail.create_dir("etc")?;
            jail.create_file("etc/s.toml", text)?;
            jail.set_env("OFFSHOOT_TLS__KEY", "env.key");
            let here = std::env::current_dir().unwrap();
            for file in ["etc/s.toml", here.join("etc/s.toml").to_str().unwrap()] {
                let config = parse(&format!("--config {file} --tls-cert o.pem")).config().unwrap();
                assert_eq!(config.access.tenants, Some(here.join("etc/t.toml")));
                assert_eq!(config.access.audit_log, Some("/var/a.jsonl".into()));
                assert_eq!(config.tls.cert, Some(here.join("o.pem")));
                assert_eq!(config.tls.key, Some(here.join("env.key")));
                assert_eq!(config.store.dir, Path::new("s"));
            }
            Ok(())
        });
    }

    #[test]
    fn memory_is_said_as_people_do() {
        Jail::expect_with(|jail| {
            jail.create_file("s.toml", "[limits]\nhost_memory_bytes = \"2 GB\"\n")?;
            let limits = parse("--config s.toml --memory-limit 1.5GiB").config().unwrap().limits;
            assert_eq!(limits.memory_bytes, Some(3 << 29));
            assert_eq!(limits.host_memory_bytes, Some(2_000_000_000));
            jail.set_env("OFFSHOOT_LIMITS__MEMORY_BYTES", "8GiB");
            assert_eq!(parse("").config().unwrap().limits.memory_bytes, Some(8 << 30));
            jail.set_env("OFFSHOOT_LIMITS__MEMORY_BYTES", "4096");
            assert_eq!(parse("").config().unwrap().limits.memory_bytes, Some(4096));
            jail.set_env("OFFSHOOT_LIMITS__MEMORY_BYTES", "much");
            let error = parse("").config().unwrap_err().to_string();
            assert!(error.to_lowercase().contains("memory_bytes"), "{error}");
            Ok(())
        });
        let line = ["offshoot", "serve", "--memory-limit", "much"];
        let error = Cli::try_parse_from(line).err().unwrap().to_string();
        assert!(error.contains("--memory-limit") && error.contains("8GiB"), "{error}");
    }

    #[test]
    fn the_reference_file_holds_every_setting_with_its_default() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/server.toml");
        let told: ServerConfig = Figment::from(Toml::file_exact(file)).extract().unwrap();
        assert_eq!(told, ServerConfig::default());
        let text = std::fs::read_to_string(file).unwrap();
        // What has no default stands there as a comment.
        let keys: Vec<String> = text
            .lines()
            .filter_map(|line| line.trim_start_matches("# ").split_once(" = "))
            .map(|(key, _)| key.to_string())
            .collect();
        let defaults = json!(ServerConfig::default());
        for (part, settings) in defaults.as_object().unwrap() {
            assert!(text.contains(&format!("[{part}]")), "[{part}] is missing");
            for key in settings.as_object().unwrap().keys() {
                assert!(keys.contains(key), "{part}.{key} is missing");
            }
        }
    }

    #[test]
    fn the_predecessors_command_line_parses() {
        let args = parse(
            "--model-type qwen2 --model-name Qwen/Qwen2-0.5B --split-point-1 0 --split-point-2 14 \
             --host 127.0.0.1 --port 50051 --max-workers 10 --use-lora --lora-rank 8 \
             --lora-alpha 16 --enable-training --learning-rate 1e-4 --cache-size 100 \
             --cache-ttl 60 --device cpu",
        );
        assert_eq!(args.legacy.notes().len(), 8);
        assert_eq!(args.model_type(), Some("qwen2"));
        let config = args.config().unwrap();
        config.validate().unwrap();
        assert_eq!(config.model.split_point_2, 14);
        assert!(parse("--split-point-2 3").legacy.notes().is_empty());
    }
}
