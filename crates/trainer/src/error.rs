use crate::data::source::DataSetError;
use offshoot_adapters::AdapterError;
use offshoot_client::{ClientError, ErrorCode};
use std::path::{Path, PathBuf};

/// Why a run cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A line of a data file, or the whole file (`line` is none).
    #[error("{}: {problem}", place(path, line))]
    Data { path: PathBuf, line: Option<usize>, problem: String },
    /// The files were read and nothing is left to learn.
    #[error("no sample to train on in {files}: {problem}")]
    NoSamples { files: String, problem: String },
    /// A data set of the hub that cannot be had.
    #[error(transparent)]
    DataSet(#[from] DataSetError),
    /// A tokenizer's file or metadata, or a text that it cannot take.
    #[error("tokenizer {origin}: {problem}")]
    Tokenizer { origin: String, problem: String },
    /// A conversation for a model that has no template for one.
    #[error(
        "this model has no chat template, and {wanted_for}. An Instruct model has one (in tokenizer_config.json or chat_template.jinja); for a base model use plain text or prompt and completion, or give it a template with --chat-template FILE"
    )]
    NoChatTemplate { wanted_for: &'static str },
    /// The template cannot be read, or refuses a conversation.
    #[error("the model's chat template: {problem}")]
    ChatTemplate { problem: String },
    /// An option that no run, or not this run, can have.
    #[error("--{option} = {value}: {problem}")]
    Option { option: &'static str, value: String, problem: String },
    /// Client and server would not compute one model.
    #[error("the server does not fit: {problem}")]
    Mismatch { problem: String },
    /// A directory that is no checkpoint, not of this run, or without its snapshot.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint { path: PathBuf, problem: String },
    /// A checkpoint whose snapshot the server finds damaged.
    #[error("checkpoint {}: its snapshot on the server is damaged: {problem}; {advice}", path.display())]
    Damaged { path: PathBuf, problem: String, advice: String },
    /// A path that holds no adapter.
    #[error("adapter {}: {problem}", path.display())]
    NoAdapter { path: PathBuf, problem: String },
    /// A run's metrics that are not there, or from which nothing can be drawn.
    #[error("{}: {problem}", path.display())]
    Metrics { path: PathBuf, problem: String },
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// The server's tensors are not what was asked for.
    #[error("what the server sent does not fit: {problem}")]
    Answer { problem: String },
    /// A number that is not finite.
    #[error(
        "the {what} is {value}: training has diverged. Lower --learning-rate, or lengthen --warmup-steps, and go on from the last checkpoint with --resume latest"
    )]
    Diverged { what: &'static str, value: f64 },
    /// What a model is to go on from.
    #[error("the prompt cannot be used: {problem}")]
    Prompt { problem: String },
    /// A model, or an adapter, that gives no numbers.
    #[error(
        "the scores of the next token are no numbers (NaN): has the training of this adapter diverged? Generate without it, or from an earlier checkpoint"
    )]
    NoScores,
    /// LoRA settings or adapter files.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Model files.
    #[error(transparent)]
    Model(#[from] offshoot_model::ModelError),
    /// The server stayed away for longer than the options allow.
    #[error("{cause}; {}", go_on_from(newest.as_deref()))]
    Offline { cause: Box<ClientError>, newest: Option<PathBuf> },
    /// The run was asked to end before it began.
    #[error("stopped before the run began; nothing was changed")]
    StoppedAtStart,
    /// The run was asked to end while the server was away, or had no room.
    #[error("stopped while waiting for the server; {}", go_on_from(newest.as_deref()))]
    StoppedOffline { newest: Option<PathBuf> },
    /// The server, or what it sent, ended the run after its beginning.
    #[error("{cause}{}; {}", remedy(cause), go_on_from(newest.as_deref()))]
    Ended { cause: Box<TrainError>, newest: Option<PathBuf> },
    /// The server takes no snapshot, so that there is no checkpoint of the run's end.
    #[error(
        "the run ends here (step {step}), and the server takes no snapshot of it: {cause}; {}{}",
        what_is_there(adapter.as_deref(), *step),
        go_on_from(newest.as_deref())
    )]
    NoLastSnapshot {
        step: u64,
        cause: Box<ClientError>,
        newest: Option<PathBuf>,
        /// Of a run whose training is done.
        adapter: Option<PathBuf>,
    },
    /// The connection, or what the server refused.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// What is left of a run that could not come to its end.
fn go_on_from(newest: Option<&Path>) -> String {
    match newest {
        Some(path) => format!(
            "the newest checkpoint is {}: the same command with --resume latest goes on from there",
            path.display()
        ),
        None => "there is no checkpoint yet: the same command begins anew (--save-interval says how often one is written)".into(),
    }
}

/// What is to be done before the run can go on.
fn remedy(cause: &TrainError) -> &'static str {
    match cause {
        TrainError::Client(ClientError::NotTakenBack {
            code: ErrorCode::NotFound,
            message,
            ..
        }) if message.contains("not known") => {
            "; start the server with the store (--store-dir) that the run used"
        }
        _ => "",
    }
}

fn what_is_there(adapter: Option<&Path>, step: u64) -> String {
    adapter.map_or(String::new(), |adapter| {
        format!(
            "the adapter is in {}, and only the checkpoint of step {step} is missing; ",
            adapter.display()
        )
    })
}

fn place(path: &Path, line: &Option<usize>) -> String {
    match line {
        Some(line) => format!("{}:{line}", path.display()),
        None => path.display().to_string(),
    }
}

impl TrainError {
    /// For `map_err` around file operations on `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
        let path = path.to_path_buf();
        move |source| TrainError::Io { path, source }
    }
}
