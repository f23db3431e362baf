//! One client's session: `state` decides, purely; [`SessionActor`] holds it, and hands
//! frames to the engine and answers to the stream.

mod actor;
mod cadence;
mod evict;
mod frame;
mod glance;
mod home;
#[cfg(test)]
mod link_properties;
mod loss;
mod messages;
mod newest;
mod outbox;
mod state;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod state_model;
#[cfg(test)]
mod state_properties;
mod streams;

pub use actor::{SessionActor, SessionSeed};
pub use cadence::SnapshotEvery;
pub use evict::{ComeBack, GoOn, HoldBack};
pub use frame::{
    BackwardWork, Digest, ExtendWork, ForwardWork, Frame, Head, Mode, SessionId, StepWork, Work,
};
pub use glance::{Glance, SessionView};
pub use messages::{
    Attach, Cut, Detach, DrainWhenQuiet, Export, ExportOf, Frames, Greeting, Keep, Leave, Lost,
    Reason, Retire, Revoke, SessionCut,
};
pub use newest::epoch_now;
pub use outbox::{Permit, StreamEnds};
pub(crate) use state::DRAIN_RETRY;
pub use state::{Recorded, Resume};
