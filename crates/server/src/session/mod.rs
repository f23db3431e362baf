//! One client's session: `state` decides, purely; [`SessionActor`] holds it, and hands
//! frames to the engine and answers to the stream.

mod actor;
mod frame;
mod home;
mod loss;
mod messages;
mod newest;
mod outbox;
mod state;

pub use actor::{SessionActor, SessionSeed};
pub use frame::{
    BackwardWork, Digest, ExtendWork, ForwardWork, Frame, Head, Mode, SessionId, StepWork, Work,
};
pub use messages::{
    Attach, Cut, Detach, DrainWhenQuiet, Export, ExportOf, Frames, Greeting, Info, Keep, Leave,
    Reason, Retire, SessionCut, SessionView,
};
pub use newest::epoch_now;
pub use outbox::{Permit, StreamEnds};
pub(crate) use state::DRAIN_RETRY;
pub use state::{Recorded, Resume};
