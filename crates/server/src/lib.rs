//! The trunk server: it holds the frozen middle layers of one model and trains one LoRA adapter for
//! each client session.
//!
//! A frame's way through it is the order of its files: `grpc` decodes and checks it, the `session`'s
//! actor puts it in order, `scheduler` decides when it runs, `engine` computes. Beside that way,
//! `registry` knows which sessions there are and `store` makes them durable. Tokens, labels and
//! losses never come here.
//!
//! ```no_run
//! use offshoot_server::{Server, ServerConfig};
//!
//! # async fn run() -> Result<(), offshoot_server::Error> {
//! let mut config = ServerConfig::default();
//! config.model.name = "path/to/model".into();
//! config.model.split_point_2 = 20;
//! let server = Server::start(config).await?;
//! println!("ready on {}", server.local_addr());
//! server.drain(std::time::Duration::from_secs(20)).await;
//! # Ok(())
//! # }
//! ```

pub mod access;
mod build_info;
mod config;
pub mod direct;
mod engine;
mod error;
mod faults;
mod finite;
pub mod forecast;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod grpc;
mod host_memory;
mod http;
mod ledger;
mod log_file;
mod meter;
mod metrics;
mod operations;
mod overview;
mod pool;
mod quota;
mod refusals;
mod registry;
mod residency;
mod scheduler;
mod server;
mod session;
mod store;
mod supervisor;
mod tls;
mod trace;
mod transport;

pub use access::AccessConfig;
pub use build_info::Build;
pub use config::{
    ComputeDType, DrainConfig, LimitsConfig, ListenConfig, LoraBatching, Mistake, Mistakes,
    OtlpProtocol, ServerConfig, SessionConfig, StoreConfig, TelemetryConfig, TlsConfig,
    TrunkConfig,
};
pub use engine::TrunkInfo;
pub use error::{Class, Error};
#[cfg(feature = "faults")]
pub use faults::{Fault, Faults};
pub use http::HttpConfig;
pub use metrics::Metrics;
pub use registry::Hurry;
pub use server::{RunningServer, Server, Standby};
pub use session::SessionId;
pub use store::{StoreContent, backup as backup_store, check as check_store};
