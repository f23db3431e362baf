//! The client's half of a training run: text becomes packed samples, bottom and top run around a
//! session that stands for the trunk, checkpoints name the server's snapshots, and a run that was
//! stopped goes on as if it had not been.
//!
//! It sits between `offshoot-client`, which moves tensors and keeps the order, and the command
//! line. It opens no socket of its own and knows nothing of how the server works.
//!
//! ```no_run
//! use offshoot_trainer::{CancelToken, TrainOptions, train};
//!
//! let options = TrainOptions::new("gpt2", "127.0.0.1:50051", "texts.jsonl".into(), "run".into());
//! // The trainer computes on this thread; the connection's tasks run on the runtime's own.
//! let runtime = tokio::runtime::Runtime::new()?;
//! let summary = runtime.block_on(train(options, CancelToken::default()))?;
//! println!("{} steps, adapter in {:?}", summary.step, summary.adapter);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod adapter;
pub mod checkpoint;
pub mod data;
mod describe;
mod dry_run;
mod early_stop;
mod error;
pub mod evaluate;
pub mod fit;
pub mod generate;
mod in_flight;
pub mod leak;
pub mod loss;
pub mod merge;
pub mod metrics;
pub mod noise;
pub mod options;
mod origin;
mod report;
mod resume;
mod schedule;
mod setup;
mod split;
pub mod tokenizer;
mod trace;
mod train;
pub mod verify;
mod wire;

pub use dry_run::dry_run;
pub use error::TrainError;
pub use options::{CancelToken, TrainOptions};
pub use origin::resolve_lora;
pub use report::{DoneEvent, EvalEvent, Event, StartEvent, StepEvent, WireErrors};
pub use schedule::{Schedule, Scheduler, Warmup};
pub use split::{
    Accumulated, Checkpointing, ClientState, MicrobatchResult, Microbatches, SplitModel,
    SplitOptions, clip_factor,
};
pub use train::{Rollback, Summary, train, train_with_sources};
