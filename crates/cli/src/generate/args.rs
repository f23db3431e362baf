use crate::noise_args::HiddenNoiseArgs;
use crate::server_args::ServerArgs;
use crate::telemetry::TelemetryArgs;
use crate::train::compute_args::DType;
use anyhow::{Context, bail, ensure};
use clap::Args;
use offshoot_trainer::adapter::Step;
use offshoot_trainer::generate::{GenerateOptions, Sampling};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{IsTerminal, Read};
use std::path::PathBuf;

/// Write text with a model and an adapter, here or through a trunk server.
///
/// Without a server option the whole model runs on this machine, with --adapter on top if it is
/// given: nothing else is needed. With one, only the first and last layers run here and the trunk
/// runs on the server, in a session of its own that is forgotten at the end; the server keeps the
/// text's keys and values, so that each token sends one row of hidden states and gets one back. Both
/// ways give the same text. Prompt and text go to standard output, a line about the time to standard
/// error.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub privacy: HiddenNoiseArgs,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot generate --model-name gpt2 --prompt \"The trunk of a tree\"
  offshoot generate --adapter run --prompt \"My computer is slow.\" --greedy
  offshoot generate --adapter run --server trunk.local:50051 --prompt-file question.txt
  offshoot generate --model-name HuggingFaceTB/SmolLM2-135M-Instruct --chat
  offshoot generate --model-name ./merged --chat --system \"Answer briefly.\" --prompt \"Who are you?\"
  offshoot generate --model-name gpt2 --prompt $'Q: Why?\\nA:' --stop $'\\nQ:' --json";

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model: a Hugging Face directory, such as one that `offshoot merge` wrote, a GGUF file or a hub
    /// name; the same one as the server's [default: the one that the adapter names].
    #[arg(long, value_name = "NAME|PATH")]
    pub model_name: Option<String>,
    /// gpt2, llama, qwen2, qwen3 or gemma; only checked, the model says itself what it is.
    #[arg(long, value_name = "TYPE")]
    pub model_type: Option<String>,
    /// Adapter for the whole model: a PEFT directory, a checkpoint, or a run's output directory
    /// [default: none, the base model].
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Which checkpoint, if --adapter is a run: latest, best or a step's number [default: the adapter
    /// that the run has left].
    #[arg(long, value_name = "STEP", requires = "adapter")]
    pub step: Option<Step>,
    /// First layer of the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    pub split_point_1: Option<usize>,
    /// First layer behind the trunk [default: what the server has]; another one is an error.
    #[arg(long, value_name = "LAYER")]
    pub split_point_2: Option<usize>,
    /// Where this side's layers run: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Type of this side's layers.
    #[arg(long, value_enum, default_value_t = DType::F32)]
    pub dtype: DType,
}

#[derive(Args)]
#[command(next_help_heading = "Prompt")]
pub struct TextArgs {
    /// Text to go on from; may be repeated [default: standard input, as one text].
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File with such a text, without its last line break; may be repeated.
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Talk: each prompt is one user message, put into the model's chat template. Without a prompt it
    /// asks for one after the other and remembers the conversation; /reset forgets it, /exit ends.
    #[arg(long)]
    pub chat: bool,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// A chat template other than the model's default one: the name of one of its own, or a Jinja
    /// file.
    #[arg(long, value_name = "NAME|FILE", requires = "chat")]
    pub chat_template: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Most new tokens of a text [default: 50; with --chat 512].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// The model's end token does not end a text before so many new tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: usize,
    /// How freely is drawn: lower is more predictable, 0 takes the likeliest token each time.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f64,
    /// The same as --temperature 0.
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
    /// Draw from so many of the likeliest tokens; 0: from all.
    #[arg(long, value_name = "K", default_value_t = 50)]
    top_k: usize,
    /// Draw from the fewest likeliest tokens that together have this probability; 1: from all.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f64,
    /// Above 1: tokens that the text has already become less likely.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// The same seed gives the same text [default: another one each time, named at the end].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The text ends before this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// One JSON object a line for each text: prompt, text, token ids, why it ended, times, bytes.
    #[arg(long)]
    pub json: bool,
    /// Print a text when it is complete, not piece by piece while it comes.
    #[arg(long)]
    pub no_stream: bool,
    /// Generate again without key/value caches, and compare text and time.
    #[arg(long)]
    pub compare_no_cache: bool,
}

/// What the model is to do.
#[derive(Debug, PartialEq)]
pub enum Work {
    /// Go on from each of these.
    Prompts(Vec<String>),
    /// Talk with whoever is at standard input.
    Conversation,
}

impl TextArgs {
    /// Reads files, and standard input where it is the prompt.
    pub fn work(&self) -> anyhow::Result<Work> {
        let mut prompts = self.prompt.clone();
        for path in &self.prompt_file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("--prompt-file {}", path.display()))?;
            prompts.push(without_last_break(&text).into());
        }
        if prompts.is_empty() && self.chat {
            return Ok(Work::Conversation);
        }
        if prompts.is_empty() {
            let mut input = std::io::stdin();
            if input.is_terminal() {
                bail!(
                    "no prompt: give one with --prompt or --prompt-file or on standard input, or talk with --chat"
                );
            }
            let mut text = String::new();
            input.read_to_string(&mut text).context("standard input")?;
            prompts.push(without_last_break(&text).into());
        }
        ensure!(
            prompts.iter().all(|prompt| !prompt.is_empty()),
            "the prompt is empty: give the model at least one word to go on from"
        );
        Ok(Work::Prompts(prompts))
    }
}

fn without_last_break(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

impl SamplingArgs {
    /// Checked.
    pub fn options(&self, chat: bool) -> anyhow::Result<GenerateOptions> {
        let options = GenerateOptions {
            max_new_tokens: self.max_tokens.unwrap_or(if chat { 512 } else { 50 }),
            min_new_tokens: self.min_tokens,
            sampling: Sampling {
                temperature: if self.greedy { 0.0 } else { self.temperature },
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed.unwrap_or_else(any_seed),
            },
            stop: self.stop.clone(),
        };
        options.validate()?;
        Ok(options)
    }
}

/// Short enough to be typed again.
fn any_seed() -> u64 {
    RandomState::new().build_hasher().finish() % 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;
    use offshoot_client::WireDType;

    fn parse(line: &str) -> Result<GenerateArgs, clap::Error> {
        let line = format!("offshoot generate --model-name m {line}");
        let Command::Generate(args) = Cli::try_parse_from(line.split_whitespace())?.command else {
            unreachable!("generate was asked for")
        };
        Ok(*args)
    }

    #[test]
    fn the_predecessors_command_line_parses() {
        let line = "--prompt Hello --max-tokens 50 --temperature 0.8 --top-k 50 --top-p 0.95 \
                    --compare-no-cache --split-point-1 0 --split-point-2 14 --model-type qwen2 \
                    --server-host localhost --server-port 50051";
        let args = parse(line).unwrap();
        assert_eq!(args.server.address().as_deref(), Some("localhost:50051"));
        let options = args.sampling.options(false).unwrap();
        let sampling = Sampling { seed: options.sampling.seed, ..Sampling::default() };
        assert_eq!(options, GenerateOptions { sampling, ..GenerateOptions::default() });
    }

    #[test]
    fn defaults_are_those_of_the_predecessor() {
        let args = parse("--prompt a").unwrap();
        assert_eq!(args.server.address(), None);
        assert_eq!(WireDType::from(args.server.wire_dtype), WireDType::F32);
        let options = args.sampling.options(false).unwrap();
        assert_eq!((options.max_new_tokens, options.sampling.top_k), (50, 50));
        assert_eq!((options.sampling.temperature, options.sampling.top_p), (0.8, 0.95));
        assert_eq!(args.sampling.options(true).unwrap().max_new_tokens, 512);
        let greedy =
            parse("--prompt a --greedy --seed 7").unwrap().sampling.options(false).unwrap();
        assert_eq!((greedy.sampling.temperature, greedy.sampling.seed), (0.0, 7));
        assert!(parse("--greedy --temperature 1").is_err());
        assert!(parse("--system x").is_err(), "without --chat");
    }

    #[test]
    fn prompts_come_from_options_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.txt");
        std::fs::write(&path, "two\nlines\n").unwrap();
        let args = parse(&format!("--prompt one --prompt-file {}", path.display())).unwrap();
        let expected = ["one".to_string(), "two\nlines".to_string()].to_vec();
        assert_eq!(args.text.work().unwrap(), Work::Prompts(expected));
        assert_eq!(parse("--chat").unwrap().text.work().unwrap(), Work::Conversation);
        std::fs::write(&path, "\n").unwrap();
        let args = parse(&format!("--prompt-file {}", path.display())).unwrap();
        let error = args.text.work().unwrap_err().to_string();
        assert!(error.contains("the prompt is empty"), "{error}");
        let error = parse("--prompt-file /nowhere").unwrap().text.work().unwrap_err().to_string();
        assert!(error.contains("--prompt-file /nowhere"), "{error}");
    }
}
