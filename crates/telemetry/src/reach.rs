//! Whether the collector is there: said when it begins not to be, and when it is again.

use crate::Signal;
use opentelemetry_sdk::error::OTelSdkError;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is known of one way to a collector.
#[derive(Debug)]
pub struct Reach {
    signal: Signal,
    endpoint: String,
    /// Since the last delivery; 0: it is there.
    n_failed: AtomicU64,
}

impl Reach {
    pub fn new(signal: Signal, endpoint: &str) -> Reach {
        Reach { signal, endpoint: endpoint.to_string(), n_failed: AtomicU64::new(0) }
    }

    /// Notes what became of one delivery.
    pub fn note(&self, delivered: &Result<(), OTelSdkError>) {
        let Reach { endpoint, n_failed, .. } = self;
        let what = self.signal.name();
        match delivered {
            Ok(()) => {
                if n_failed.swap(0, Ordering::Relaxed) > 0 {
                    tracing::info!("{what} are delivered to {endpoint} again");
                }
            }
            Err(error) => {
                if n_failed.fetch_add(1, Ordering::Relaxed) == 0 {
                    let cause = text(error);
                    tracing::warn!(
                        "{what} cannot be delivered to {endpoint}: {cause}; nothing waits for that, they are \
                         lost until it is there"
                    );
                }
            }
        }
    }
}

fn text(error: &OTelSdkError) -> String {
    match error {
        OTelSdkError::InternalFailure(cause) => cause.clone(),
        OTelSdkError::Timeout(after) => format!("no answer within {after:?}"),
        OTelSdkError::AlreadyShutdown => "it is over".to_string(),
    }
}
