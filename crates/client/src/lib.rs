//! The client side of a trunk server: one connection, sessions that train one adapter each, and
//! everything that makes a training step happen exactly once over a network that breaks.
//!
//! A client holds the first layers of a language model (bottom), the last layers (top), its text and
//! its loss. It sends hidden states `[N, H]` into the trunk with [`Session::forward`], computes the
//! loss, sends the gradient back with [`Microbatch::backward`], and lets the server apply AdamW to
//! the session's adapter with [`Session::step`]. This crate moves tensors and keeps the order; it
//! computes nothing and has no libtorch in its tree.
//!
//! ```no_run
//! use offshoot_client::*;
//!
//! # async fn train() -> Result<(), ClientError> {
//! let client = Client::connect("127.0.0.1:50051").await?;
//! let server = client.describe().await?;
//! let session = client
//!     .open(OpenSession {
//!         name: "my first offshoot".into(),
//!         fingerprint: server.fingerprint, // better: the one of the layers held here
//!         split_point_1: server.split_point_1,
//!         split_point_2: server.split_point_2,
//!         lora: LoraConfig { r: 8, lora_alpha: 16.0, ..Default::default() },
//!         adamw: ADAMW_DEFAULTS,
//!         seed: 42,
//!         wire_dtype: WireDType::F32,
//!         initial_adapter: vec![],
//!     })
//!     .await?;
//! let h = server.hidden_size;
//! for step in 0..10 {
//!     // From the bottom: two sequences of 3 and 5 tokens, packed.
//!     let hidden = HostTensor::from_f32(&vec![0.5; 8 * h], vec![8, h], WireDType::F32);
//!     let input = ForwardInput {
//!         hidden,
//!         seq_lens: vec![3, 5],
//!         position_ids: vec![],
//!         want_input_grad: false,
//!         dropout_key: step,
//!     };
//!     let (output, microbatch, report) = session.forward(input).await?;
//!     // Through the top to the loss and back: here the loss is half the sum of squares.
//!     let gradients = microbatch.backward(output).await?;
//!     let clip_factor = (1.0 / gradients.norm_squared.sqrt()).min(1.0);
//!     session.step(1e-4, clip_factor).await?; // sent; the next forward may follow at once
//!     println!("{:?} on the wire", report.wire());
//! }
//! let snapshot = session.snapshot().await?;
//! let adapter = session.export().await?;
//! println!("{} tensors at step {}", adapter.tensors.len(), snapshot.step);
//! # Ok(())
//! # }
//! ```
//!
//! # What happens when
//!
//! - **The connection breaks, the server drains and starts again:** the session connects again with
//!   backoff, sends what has no answer under the same numbers, and goes on. The server answers a
//!   repeated frame from its records. Callers only see that it took longer. After
//!   [`Retry::max_elapsed`] they get [`ClientError::Unreachable`], and the session has ended.
//! - **The server comes back in an older state** (it was killed, or the session was away for longer
//!   than its lease in the middle of a microbatch): every call gets [`ClientError::RolledBack`].
//!   [`Client::restore`] goes back to a snapshot; the caller sets its own layers back to the same
//!   step and sends its data again from there, with the same [`ForwardInput::dropout_key`]s.
//! - **A frame is refused:** its call gets [`ClientError::Refused`], and the session goes on. Frames
//!   that were sent behind it and have no answer yet are not applied: their calls get
//!   [`ClientError::Aborted`]. The next frame takes the refused one's number. A refused step that
//!   nobody awaits is reported by the next call.
//! - **A microbatch is given up:** dropped anywhere between its forward and the answer to its
//!   backward, it is discarded on the server before the next frame.
//! - **The server is full** and says when to try again: the frame waits here and is sent again under
//!   the same number. Meanwhile backwards of open microbatches go ahead of waiting forwards, which
//!   is what frees memory; the same while the server drains.
//! - **A sequence goes on** ([`Session::extend`]) **and its cache is gone**, because the session left
//!   the device, took a step, or the server started again: the frame is refused, and
//!   [`ClientError::is_cache_gone`] says so. The caller sends all tokens of the sequence again.
//! - **Another client attaches to the session:** [`ClientError::TakenOver`].

mod address;
mod claim;
mod client;
mod command;
mod driver;
mod entry;
mod error;
mod extend;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod health;
mod identity;
mod loss;
pub mod operations;
mod options;
mod outage;
mod pending;
mod pulse;
mod session;
mod status;
mod tls_failure;
mod trace;
mod types;
mod window;
mod wire;

pub use client::Client;
pub use error::ClientError;
pub use extend::{ExtendInput, PendingDropCache, PendingExtend};
pub use health::{Health, health};
pub use identity::{TlsOptions, Token};
pub use offshoot_proto::{HostTensor, Payload, Rounding, WireDType};
pub use options::{ClientOptions, Retry};
pub use pending::{
    Microbatch, PendingBackward, PendingEvaluate, PendingForward, PendingStep, StepTaken,
};
pub use session::{ForwardInput, Gradients, Session};
pub use types::{
    ADAMW_DEFAULTS, AdamWConfig, ErrorCode, ExportedAdapter, FrameReport, Limits, LoraConfig,
    MemoryReport, OpenSession, QuotaViolation, Residency, Restored, ServerDescription, SessionId,
    SessionInfo, SessionState, SnapshotInfo, WireError,
};
