use crate::connection_args::ConnectionArgs;
use anyhow::{bail, ensure};
use clap::{Args, ValueEnum};
use offshoot_client::WireDType;
use offshoot_server::ComputeDType;
use std::path::PathBuf;
use std::time::Duration;

/// Measure a server under synthetic sessions.
///
/// Each session is a client of its own with an adapter of its own: it sends random hidden states
/// through the protocol, sends random gradients back, and steps, as fast as the server answers. It
/// has no layers and no text, so the trunk and the way to it are all that is measured. Prints tokens
/// per second in all and by session, Jain's fairness index, latencies split into wire, queue and
/// execute, and the server's bytes by kind.
///
/// Without --server the server runs in this process and shares its cores with the clients.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub adapter: AdapterArgs,
    #[command(flatten)]
    pub wire: WireArgs,
    #[command(flatten)]
    pub measure: MeasureArgs,
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot bench --model ./model.gguf --split-point-2 20 --sessions 8 --sequences 1 --tokens 32
  offshoot bench --server gpu-1:50051 --sessions 16 --adapters different --seconds 30
  offshoot bench --server gpu-1:50051 --sequences 1 --tokens 32 --heavy 4x512
  offshoot bench --model ./model.gguf --split-point-2 20 --sessions 1 --accumulate 8 \\
      --in-flight 4 --latency-ms 50 --bandwidth-mbit 100";

#[derive(Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// A running server [default: one in this process, from --model].
    #[arg(long, value_name = "URL", required_unless_present = "model")]
    #[arg(conflicts_with_all = ["model", "split_point_1", "split_point_2", "device", "dtype"])]
    #[arg(conflicts_with_all = ["threads", "config"])]
    pub server: Option<String>,
    /// Model: a Hugging Face directory, a GGUF file or a hub name.
    #[arg(long, alias = "model-name", value_name = "NAME|PATH")]
    pub model: Option<String>,
    /// First layer of the trunk.
    #[arg(long, value_name = "LAYER", default_value_t = 0)]
    pub split_point_1: usize,
    /// First layer behind the trunk.
    #[arg(long, value_name = "LAYER", required_unless_present = "server")]
    pub split_point_2: Option<usize>,
    /// Where the trunk runs: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Type of the trunk's weights and products.
    #[arg(long, value_parser = compute_dtype, value_name = "f32|bf16|f16", default_value = "f32")]
    pub dtype: ComputeDType,
    /// Threads of one product on the CPU [default: libtorch's choice].
    #[arg(long, value_name = "N")]
    pub threads: Option<u16>,
    /// More settings of the server in this process, as `offshoot serve --config` takes them.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Sessions that are busy at the same time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub sessions: usize,
    /// Sequences of one microbatch.
    #[arg(long, value_name = "B", default_value_t = 4)]
    pub sequences: u32,
    /// Tokens of each sequence.
    #[arg(long, value_name = "T", default_value_t = 128)]
    pub tokens: u32,
    /// One session more, whose microbatches have this size, such as 4x512.
    #[arg(long, value_name = "BxT", value_parser = parse_size)]
    pub heavy: Option<Size>,
    /// Whether a microbatch is a forward and a backward, or a forward in evaluation mode.
    #[arg(long, value_enum, default_value_t = Mode::Train)]
    pub mode: Mode,
    /// Microbatches of one session that are on their way at the same time.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub in_flight: usize,
    /// Microbatches of one optimizer step; they overlap within it [default: --in-flight].
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// More sessions that take one step before the measurement and then stay, connected and idle.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub idle_sessions: usize,
}

#[derive(Args)]
#[command(next_help_heading = "Adapters")]
pub struct AdapterArgs {
    /// LoRA rank; lora_alpha is twice as much.
    #[arg(long, value_name = "R", default_value_t = 8)]
    pub rank: u32,
    /// alike: every session has this rank on all linear layers. different: from session to session
    /// ranks (R, R/2, 2R), alphas and targets (all, attention only, MLP only) vary.
    #[arg(long, value_enum, default_value_t = Variety::Alike)]
    pub adapters: Variety,
}

#[derive(Args)]
#[command(next_help_heading = "Wire")]
pub struct WireArgs {
    /// Type of hidden states and gradients on the wire.
    #[arg(long, value_name = "DTYPE", value_parser = wire_dtype, default_value = "bf16")]
    pub wire_dtype: WireDType,
    /// Delays every byte by so long in each direction: a round trip takes twice as long.
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    pub latency_ms: f64,
    /// Bounds each client's link, in each direction [default: no bound].
    #[arg(long, value_name = "MBIT_PER_SECOND")]
    pub bandwidth_mbit: Option<f64>,
}

#[derive(Args)]
#[command(next_help_heading = "Measurement")]
pub struct MeasureArgs {
    /// Measures for so long [default: 10].
    #[arg(long, value_name = "SECONDS", conflicts_with = "steps")]
    pub seconds: Option<f64>,
    /// Measures so many steps of every session, instead of a time.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Steps of every session before the measurement.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub warm_up: u64,
    /// Also writes the numbers there, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Of one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub sequences: u32,
    pub tokens: u32,
}

impl Size {
    /// N.
    pub fn n_tokens(self) -> u64 {
        u64::from(self.sequences) * u64::from(self.tokens)
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {}", self.sequences, self.tokens)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Train,
    Eval,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variety {
    Alike,
    Different,
}

/// When a measurement ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum End {
    After(Duration),
    Steps(u64),
}

impl BenchArgs {
    /// What one option alone cannot say.
    pub fn check(&self) -> anyhow::Result<()> {
        let LoadArgs { sessions, sequences, tokens, in_flight, .. } = self.load;
        for (option, number) in [
            ("--sessions", sessions as u64),
            ("--sequences", sequences.into()),
            ("--tokens", tokens.into()),
            ("--in-flight", in_flight as u64),
            ("--accumulate", self.accumulate() as u64),
            ("--rank", self.adapter.rank.into()),
            ("--steps", self.measure.steps.unwrap_or(1)),
        ] {
            ensure!(number > 0, "{option} is 0, expected at least 1");
        }
        let WireArgs { latency_ms, bandwidth_mbit, .. } = self.wire;
        ensure!(
            (0.0..=60e3).contains(&latency_ms),
            "--latency-ms is {latency_ms}, expected 0 to 60000"
        );
        if let Some(mbit) = bandwidth_mbit {
            ensure!(mbit > 0.0, "--bandwidth-mbit is {mbit}, expected more than 0");
        }
        if let Some(seconds) = self.measure.seconds {
            let fine = seconds > 0.0 && seconds <= 1e6;
            ensure!(fine, "--seconds is {seconds}, expected more than 0, at most 10^6");
        }
        if in_flight > self.accumulate() {
            bail!(
                "--in-flight is {in_flight} and --accumulate {}: microbatches overlap within one \
                 step only, so a step needs at least as many",
                self.accumulate()
            );
        }
        Ok(())
    }

    /// Microbatches of one step.
    pub fn accumulate(&self) -> usize {
        self.load.accumulate.unwrap_or(self.load.in_flight)
    }

    /// When the measurement ends.
    pub fn end(&self) -> End {
        match self.measure.steps {
            Some(n) => End::Steps(n),
            None => End::After(Duration::from_secs_f64(self.measure.seconds.unwrap_or(10.0))),
        }
    }

    /// The size of the microbatches of each busy session.
    pub fn sizes(&self) -> Vec<Size> {
        let LoadArgs { sessions, sequences, tokens, heavy, .. } = self.load;
        let mut sizes = vec![Size { sequences, tokens }; sessions];
        sizes.extend(heavy);
        sizes
    }
}

fn parse_size(text: &str) -> Result<Size, String> {
    let number = |text: &str| text.parse().ok().filter(|n| *n > 0);
    text.split_once('x')
        .and_then(|(b, t)| Some(Size { sequences: number(b)?, tokens: number(t)? }))
        .ok_or_else(|| "expected sequences x tokens, such as 4x512".into())
}

fn wire_dtype(text: &str) -> Result<WireDType, String> {
    WireDType::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| {
        let known: Vec<&str> = WireDType::ALL.iter().map(|dtype| dtype.name()).collect();
        format!("expected one of {}", known.join(", "))
    })
}

fn compute_dtype(text: &str) -> Result<ComputeDType, String> {
    [ComputeDType::F32, ComputeDType::Bf16, ComputeDType::F16]
        .into_iter()
        .find(|dtype| dtype.name() == text)
        .ok_or_else(|| "expected f32, bf16 or f16".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;

    fn parse(line: &str) -> Result<BenchArgs, String> {
        let line = format!("offshoot bench {line}");
        let cli = Cli::try_parse_from(line.split_whitespace()).map_err(|e| e.to_string())?;
        let Command::Bench(args) = cli.command else { unreachable!("bench was asked for") };
        args.check().map(|()| args).map_err(|e| e.to_string())
    }

    #[test]
    fn a_heavy_session_stands_beside_the_others() {
        let args = parse("--server a:1 --sessions 2 --sequences 1 --tokens 32 --heavy 4x512");
        let light = Size { sequences: 1, tokens: 32 };
        let heavy = Size { sequences: 4, tokens: 512 };
        assert_eq!(args.unwrap().sizes(), [light, light, heavy]);
        for wrong in ["4", "4x", "0x512", "4x5x6"] {
            let error = parse(&format!("--server a:1 --heavy {wrong}")).err().unwrap();
            assert!(error.contains("such as 4x512"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for (line, expected) in [
            ("", "--server <URL>"),
            ("--model m", "--split-point-2"),
            ("--server a:1 --model m --split-point-2 1", "cannot be used with"),
            ("--server a:1 --sessions 0", "--sessions is 0"),
            ("--server a:1 --in-flight 4 --accumulate 2", "overlap within one step only"),
            ("--server a:1 --latency-ms=-1", "--latency-ms"),
            ("--server a:1 --bandwidth-mbit 0", "--bandwidth-mbit is 0"),
            ("--server a:1 --seconds 0", "--seconds is 0"),
            ("--server a:1 --seconds 1 --steps 1", "cannot be used with"),
            ("--server a:1 --wire-dtype f8", "expected one of f32, bf16, f16, int8"),
        ] {
            let error = parse(line).err().unwrap_or_default();
            assert!(error.contains(expected), "{line}: {error}");
        }
        assert_eq!(parse("--server a:1 --in-flight 3").unwrap().accumulate(), 3);
    }
}
