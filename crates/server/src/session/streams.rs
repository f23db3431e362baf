//! Who is attached to a session's actor: the newest client, or nobody, for as long as the lease is.

use super::actor::SessionActor;
use super::frame::SessionId;
use super::messages::{Attach, Attached, Detach, Keep, Lost, Retire, Revoke};
use super::outbox::{Permit, StreamEnds};
use crate::error::Error;
use crate::metrics::CountedStream;
use actix::{ActorContext, AsyncContext, Context, Handler, SpawnHandle, WrapFuture};
use offshoot_proto::v1::{self, ServerFrame, server_frame::Body};
use std::time::Duration;
use tokio::sync::mpsc;

/// The stream that is attached.
pub(super) struct Stream {
    pub number: u64,
    /// Room for the last word.
    farewell: Permit,
    _ends: StreamEnds,
    _counted: Option<CountedStream>,
}

/// How long a session lives without one.
pub(super) struct Lease {
    duration: Duration,
    idle: mpsc::Sender<SessionId>,
    timer: Option<SpawnHandle>,
    pub over: bool,
}

impl Lease {
    /// Of so long, told to `idle` when it is over; not yet begun.
    pub fn new(duration: Duration, idle: mpsc::Sender<SessionId>) -> Self {
        Lease { duration, idle, timer: None, over: false }
    }
}

impl SessionActor {
    /// Ends the stream, if there is one, with a last word.
    pub(super) fn end_stream(&mut self, error: &Error) {
        if let Some(stream) = self.stream.take() {
            let last = self.refusal(0, error, &tracing::Span::none());
            stream.farewell.send(Ok(last));
        }
        self.outbox.detach();
        self.backlog.detach();
    }

    pub(super) fn start_lease(&mut self, ctx: &mut Context<Self>) {
        self.stop_lease(ctx);
        let timer = ctx.run_later(self.lease.duration, |actor, ctx| {
            actor.lease.over = true;
            let (idle, id) = (actor.lease.idle.clone(), actor.profile.id);
            let tell = async move {
                // Nobody listens any more when the server ends.
                let _ = idle.send(id).await;
            };
            ctx.spawn(tell.into_actor(actor));
        });
        self.lease.timer = Some(timer);
    }

    fn stop_lease(&mut self, ctx: &mut Context<Self>) {
        self.lease.over = false;
        if let Some(timer) = self.lease.timer.take() {
            ctx.cancel_future(timer);
        }
    }

    fn attached(
        &self,
        durable: Option<v1::SnapshotInfo>,
        snapshots: Vec<v1::SnapshotInfo>,
    ) -> ServerFrame {
        let attached = v1::Attached {
            last_applied: self.state.applied(),
            step: self.state.step(),
            durable,
            open_microbatches: self.state.open().keys().copied().collect(),
            limits: Some(self.limits),
            epoch: self.newest.epoch,
            snapshots,
        };
        ServerFrame { sequence: 0, body: Some(Body::Attached(attached)) }
    }
}

impl Handler<Attach> for SessionActor {
    type Result = Result<Attached, Error>;

    fn handle(&mut self, attach: Attach, ctx: &mut Context<Self>) -> Self::Result {
        if let Some(reason) = &self.ending {
            return Err(reason.farewell());
        }
        self.newest = self.newest.replaced_by(attach.greeting)?;
        self.end_stream(&Error::TakenOver);
        self.stop_lease(ctx);
        // A client that is ahead of this state will see that in the answer.
        let _ = self.state.acknowledge(attach.greeting.last_answered);
        self.n_streams += 1;
        let number = self.n_streams;
        let hello = self.attached(attach.durable, attach.snapshots);
        let _counted = self.profile.meter.series().map(|series| series.stream());
        let (farewell, _ends) = (attach.farewell, attach.ends);
        self.stream = Some(Stream { number, farewell, _ends, _counted });
        self.show();
        Ok(Attached { number, hello, epoch: self.newest.epoch })
    }
}

impl Handler<Detach> for SessionActor {
    type Result = ();

    fn handle(&mut self, message: Detach, ctx: &mut Context<Self>) {
        if self.stream.as_ref().is_some_and(|current| current.number == message.stream) {
            self.stream = None;
            self.outbox.detach();
            self.backlog.detach();
            self.start_lease(ctx);
            self.pump();
        }
    }
}

impl Handler<Revoke> for SessionActor {
    type Result = ();

    fn handle(&mut self, message: Revoke, ctx: &mut Context<Self>) {
        if self.stream.as_ref().is_some_and(|current| current.number == message.stream) {
            self.end_stream(&Error::Unauthenticated);
            self.start_lease(ctx);
            self.pump();
        }
    }
}

impl Handler<Keep> for SessionActor {
    type Result = ();

    fn handle(&mut self, _: Keep, ctx: &mut Context<Self>) {
        self.ending = None;
        if self.stream.is_none() {
            self.start_lease(ctx);
        }
    }
}

impl Handler<Retire> for SessionActor {
    type Result = ();

    fn handle(&mut self, _: Retire, ctx: &mut Context<Self>) {
        self.end_stream(&Error::Ended);
        self.profile.writes.end();
        ctx.stop();
    }
}

impl Handler<Lost> for SessionActor {
    type Result = ();

    fn handle(&mut self, _: Lost, ctx: &mut Context<Self>) {
        self.end_stream(&Error::engine_down());
        ctx.stop();
    }
}
