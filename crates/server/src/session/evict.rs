//! A session that is to leave the device although it is in use: frames that would begin something new
//! wait, so that what is under way comes to its end, and bring it back when it has left.

use super::actor::SessionActor;
use super::frame::{Effect, Frame};
use super::messages::Frames;
use crate::residency::{Home, Tier};
use actix::{AsyncContext, Context, Handler, Message, ResponseFuture, SpawnHandle};
use std::time::Duration;
use tokio::sync::oneshot;

/// New work waits from now on, until the session has left ([`Leave`](super::Leave)), or [`GoOn`], or
/// something else wants the session. Answered when no frame is in flight and no microbatch is open.
#[derive(Message)]
#[rtype(result = "()")]
pub struct HoldBack {
    /// Even if nobody says anything any more.
    pub at_most: Duration,
}

/// What waits for [`HoldBack`] waits no longer.
#[derive(Message)]
#[rtype(result = "()")]
pub struct GoOn;

/// A session that is away comes back to the device, without a frame.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ComeBack;

/// Whether new work waits, and who waits for that to be all.
#[derive(Default)]
pub(super) struct Hold {
    pub on: bool,
    /// It came back for a frame that is not taken in yet: that one is not held back, or a session that is
    /// sent away again and again would never do anything.
    pub owes: bool,
    /// Ends it if nobody does. One, however often it is asked for: the actor looks at each of its timers.
    timer: Option<SpawnHandle>,
    still: Vec<oneshot::Sender<()>>,
}

impl SessionActor {
    /// Whether a frame waits: it would begin something where nothing is open that has to be finished.
    pub(super) fn holds(&self, message: &Frames) -> bool {
        let begins = |frame: &Frame| {
            matches!(frame.head.effect, Effect::Open(_) | Effect::Nothing | Effect::Extend(_))
        };
        let holds = self.hold.on && !self.hold.owes && !self.state.expects_open();
        holds && message.frame.as_ref().is_ok_and(begins)
    }

    /// Tells those who wait for the session to be still that it is.
    pub(super) fn tell_still(&mut self) {
        for waiting in self.hold.still.drain(..) {
            let _ = waiting.send(());
        }
    }
}

impl Handler<HoldBack> for SessionActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, message: HoldBack, ctx: &mut Context<Self>) -> Self::Result {
        let (still, waiting) = oneshot::channel();
        // A server that drains refuses what is new by itself.
        self.hold.on = !self.state.is_draining();
        self.hold.still.push(still);
        if let Some(before) = self.hold.timer.take() {
            ctx.cancel_future(before);
        }
        self.hold.timer = Some(ctx.notify_later(GoOn, message.at_most));
        self.serve_backlog(ctx);
        // An actor that ends meanwhile is still, too.
        Box::pin(async { drop(waiting.await) })
    }
}

impl Handler<GoOn> for SessionActor {
    type Result = ();

    fn handle(&mut self, _: GoOn, ctx: &mut Context<Self>) {
        self.hold.on = false;
        if let Some(timer) = self.hold.timer.take() {
            ctx.cancel_future(timer);
        }
        self.serve_backlog(ctx);
    }
}

impl Handler<ComeBack> for SessionActor {
    type Result = ();

    fn handle(&mut self, _: ComeBack, ctx: &mut Context<Self>) {
        let is_away = matches!(&self.place, super::home::Place::At(Home::Away(_)));
        if is_away && self.ending.is_none() && !self.state.is_draining() {
            debug_assert!(self.place.tier() != Tier::Device);
            self.come_back(ctx);
            self.show();
        }
    }
}
