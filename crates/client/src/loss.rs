use offshoot_proto::{HostTensor, Rounding, v1};
use std::sync::{Arc, Mutex, PoisonError};

/// What the wire dtype has cost of what a session has sent. Shared by all that send for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SentLoss(Arc<Mutex<Sums>>);

#[derive(Debug, Default)]
struct Sums {
    hidden: Rounding,
    gradients: Rounding,
}

impl SentLoss {
    pub(crate) fn add_hidden(&self, tensor: &HostTensor) {
        self.with(|sums| sums.hidden += tensor.rounding());
    }

    pub(crate) fn add_gradients(&self, tensor: &HostTensor) {
        self.with(|sums| sums.gradients += tensor.rounding());
    }

    pub(crate) fn error(&self) -> v1::WireError {
        self.with(|Sums { hidden, gradients }| v1::WireError {
            hidden: hidden.relative_error(),
            gradients: gradients.relative_error(),
        })
    }

    fn with<T>(&self, run: impl FnOnce(&mut Sums) -> T) -> T {
        // Whoever panicked left whole numbers behind.
        run(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
