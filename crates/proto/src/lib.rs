//! The wire contract between clients and the trunk server: code generated from
//! `proto/offshoot/v1/*.proto`, and [`HostTensor`], a tensor that is checked once, when it comes
//! in, and knows what rounding it has cost when it goes out.
//!
//! Both sides depend on it. It knows nothing of libtorch, of models or of sessions.
//!
//! ```
//! use offshoot_proto::{HostTensor, WireDType};
//!
//! let hidden = HostTensor::from_f32(&[1.0, 2.0, 3.0, 4.0], vec![2, 2], WireDType::Bf16);
//! assert_eq!(hidden.data().len(), 8);
//! assert_eq!(hidden.to_f32(), [1.0, 2.0, 3.0, 4.0]);
//! ```

mod dtype;
mod halves;
mod int8;
pub mod outgoing;
mod rounding;
mod shown;
mod tensor;

pub use dtype::WireDType;
pub use int8::Int8Rows;
pub use rounding::Rounding;
pub use tensor::{HostTensor, Payload, TensorError};

/// Generated from `proto/offshoot/v1/*.proto`, which are the manual.
#[allow(clippy::doc_markdown, clippy::doc_lazy_continuation)]
pub mod v1 {
    tonic::include_proto!("offshoot.v1");
}

/// The compiled `.proto` files, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
