//! A decoder-only language model cut into parts: the same blocks serve as bottom and top on a client
//! and as the frozen trunk on the server.
//!
//! A [`weights::Checkpoint`] lies on disk; a [`ModelConfig`] says what it is; a [`Part`] is a range of
//! its layers on a device, with forward and backward written out. The only thing that trains is an
//! [`offshoot_adapters::AdapterSet`], which a [`Segment`] brings to its rows. Nothing here knows of
//! tokens' text, of sessions, of optimizers or of the network.
//!
//! Shape letters: N packed tokens, H hidden size, F MLP size, A heads, K key/value heads, D head size,
//! V vocabulary, r LoRA rank, P trained values of an adapter, L layers.
//!
//! ```
//! use offshoot_adapters::{AdapterSet, LoraSpec};
//! use offshoot_model::weights::Checkpoint;
//! use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment};
//! use tch::{Device, Kind, Tensor};
//!
//! let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama");
//! let checkpoint = Checkpoint::open(path.as_ref())?;
//! let config = ModelConfig::from_json(checkpoint.config())?;
//! let trunk = PartSpec { layers: 1..3, embed: false, head: false };
//! let trunk = Part::load(&checkpoint, &config, trunk, Kind::Float, Device::Cpu)?;
//!
//! let sites = trunk.sites(&["q_proj".into(), "v_proj".into()])?;
//! let mut adapter = AdapterSet::init(LoraSpec::default(), sites, 1, Device::Cpu)?;
//! let rows = Rows::new(&[5, 3], None, Device::Cpu); // two sequences, N = 8
//! let hidden = Tensor::randn([8, config.hidden_size], (Kind::Float, Device::Cpu));
//!
//! let segment = Segment { rows: 0..8, adapter: Some(&adapter), dropout: None };
//! let (output, tape) = trunk.forward_train(&hidden, &rows, &segment);
//! let back = trunk.backward(&[&tape], &output.ones_like(), &rows, &[segment], true);
//! assert_eq!(back.input.unwrap().size(), hidden.size());
//! adapter.accumulate(&back.lora[0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod allocator;
mod attention;
mod block;
mod bytes;
mod cache;
mod config;
mod dropout;
mod error;
mod head;
pub mod host;
mod layout;
mod linear;
mod lora;
mod norm;
mod parameters;
mod parts;
mod passes;
mod rope;
mod rows;
mod tape;
pub mod weights;

pub use bytes::{Shapes, Work};
pub use cache::KvCache;
pub use config::{Activation, Family, ModelConfig, SplitPoints};
pub use dropout::DropoutKey;
pub use error::ModelError;
pub use head::{ChunkLoss, LogitsChunk, LossOutput};
pub use layout::is_target;
pub use lora::LoraMode;
pub(crate) use norm::Norm;
pub use parameters::Parameter;
pub use parts::{Part, PartSpec, compute_kind};
pub use passes::{Backward, Way};
pub use rope::Rope;
pub use rows::{Rows, Segment};
pub use tape::{Tape, TapeSize};
