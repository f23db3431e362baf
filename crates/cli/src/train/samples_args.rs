use clap::{Args, ValueEnum};
use offshoot_trainer::data::{DataOptions, LongSamples, LossOn, PromptFormat, default_cache_dir};
use std::path::PathBuf;

/// How records become samples.
#[derive(Args)]
#[command(next_help_heading = "Data")]
pub struct SamplesArgs {
    /// Longest sample in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_seq_length: usize,
    /// What becomes of longer ones [default: split for texts; truncate for prompts with completions,
    /// conversations and preferences].
    #[arg(long, value_enum)]
    long_samples: Option<Long>,
    /// What a prompt with its completion, and a sample prompt, become.
    #[arg(long, value_enum, default_value_t = Format::Plain)]
    prompt_format: Format,
    /// Which tokens are learned [default: completion for prompts with completions, assistant for
    /// conversations]. Of texts all are, of preferences the answers.
    #[arg(long, value_enum)]
    loss_on: Option<On>,
    /// A chat template other than the model's default one: the name of one of its own (such as
    /// tool_use), or a Jinja file.
    #[arg(long, value_name = "NAME|FILE")]
    chat_template: Option<String>,
    /// Where tokens are kept, so that the next run on the same data does not tokenise again
    /// [default: $OFFSHOOT_CACHE, or ~/.cache/offshoot/tokens]. It may be deleted at any time.
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Keep no tokens, and use none that were kept.
    #[arg(long, conflicts_with = "cache_dir")]
    no_cache: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// The prompt, a line break unless there is white space already, the completion.
    Plain,
    /// One user message and one answer through the model's chat template, for Instruct models.
    Chat,
}

#[derive(Clone, Copy, ValueEnum)]
enum Long {
    /// One sample: the prompt loses its beginning, down to a quarter of the limit, then the answer
    /// its end.
    Truncate,
    /// Several samples, one after the other.
    Split,
}

#[derive(Clone, Copy, ValueEnum)]
enum On {
    /// The completion; of a conversation, the assistant's last turn.
    Completion,
    /// The completion; of a conversation, all turns of the assistant.
    Assistant,
    /// Everything, prompts too.
    All,
}

impl SamplesArgs {
    /// What the trainer takes, without a limit of samples.
    pub fn into_options(self) -> DataOptions {
        DataOptions {
            max_seq_length: self.max_seq_length,
            max_samples: None,
            prompt_format: match self.prompt_format {
                Format::Plain => PromptFormat::Plain,
                Format::Chat => PromptFormat::Chat,
            },
            long_samples: self.long_samples.map(|long| match long {
                Long::Truncate => LongSamples::Truncate,
                Long::Split => LongSamples::Split,
            }),
            loss_on: self.loss_on.map(|on| match on {
                On::Completion => LossOn::Completion,
                On::Assistant => LossOn::Assistant,
                On::All => LossOn::All,
            }),
            chat_template: self.chat_template,
            cache_dir: match self.no_cache {
                true => None,
                false => self.cache_dir.or_else(default_cache_dir),
            },
        }
    }
}
