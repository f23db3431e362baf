use super::outbox::Answer;
use crate::engine::{BackwardResult, ForwardResult};
use offshoot_proto::{Rounding, v1};

/// What the wire dtype has cost of what a session was sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct WireLoss {
    hidden: Rounding,
    gradients: Rounding,
}

impl WireLoss {
    pub(super) fn count(&mut self, answer: &Answer) {
        match answer {
            Answer::Forward(Ok(ForwardResult { hidden, .. })) => self.hidden += hidden.rounding(),
            Answer::Backward {
                result: Ok(BackwardResult::Done { grad: Some(grad), .. }), ..
            } => {
                self.gradients += grad.rounding();
            }
            Answer::Forward(_) | Answer::Backward { .. } => {}
            Answer::Step(_) | Answer::Discard(_) | Answer::DropCache(_) | Answer::Refused(_) => {}
        }
    }

    pub fn to_proto(self) -> v1::WireError {
        let WireLoss { hidden, gradients } = self;
        v1::WireError { hidden: hidden.relative_error(), gradients: gradients.relative_error() }
    }
}
