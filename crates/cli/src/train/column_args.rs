use clap::Args;
use offshoot_trainer::data::source::Columns;

/// Which columns of a table, or fields of a JSON object, are read.
#[derive(Args)]
#[command(next_help_heading = "Data")]
pub struct ColumnArgs {
    /// The column that is a text to learn [default: text].
    #[arg(long, value_name = "NAME")]
    text_column: Option<String>,
    /// The column that is a prompt [default: prompt, question, instruction (with input or context
    /// below it), query or problem, whichever is there].
    #[arg(long, value_name = "NAME")]
    prompt_column: Option<String>,
    /// The column that is learned after the prompt [default: completion, response, answer, output or
    /// solution].
    #[arg(long, value_name = "NAME")]
    completion_column: Option<String>,
    /// The column that is a conversation: a list of messages with role and content, or with from and
    /// value [default: messages or conversations].
    #[arg(long, value_name = "NAME")]
    messages_column: Option<String>,
    /// The column of the preferred answer, for --loss dpo [default: chosen].
    #[arg(long, value_name = "NAME")]
    chosen_column: Option<String>,
    /// The column of the other answer, for --loss dpo [default: rejected].
    #[arg(long, value_name = "NAME")]
    rejected_column: Option<String>,
}

impl From<ColumnArgs> for Columns {
    fn from(args: ColumnArgs) -> Columns {
        Columns {
            text: args.text_column,
            prompt: args.prompt_column,
            completion: args.completion_column,
            messages: args.messages_column,
            chosen: args.chosen_column,
            rejected: args.rejected_column,
            preferences: false,
        }
    }
}
