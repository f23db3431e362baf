//! Threads of their own for what is exported, so that nothing that it waits for holds anybody up.

use crate::TelemetryError;
use std::sync::Arc;
use tokio::runtime::{Builder, Handle, Runtime};

/// Clones share the threads. They end with the last one, whatever still runs on them.
#[derive(Debug, Clone)]
pub struct Background(Arc<Owned>);

#[derive(Debug)]
struct Owned {
    /// None only while it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
}

impl Background {
    pub fn start() -> Result<Background, TelemetryError> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp")
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        Ok(Background(Arc::new(Owned { runtime: Some(runtime), handle })))
    }

    pub fn handle(&self) -> &Handle {
        &self.0.handle
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Also from within another runtime, where waiting for the threads is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
