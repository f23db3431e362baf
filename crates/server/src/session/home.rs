//! A session actor that moves: between the device, the host's memory and the disk. What comes while
//! its adapter is away or under way waits in the backlog, as it came, and is served in its order.
//! The room for answers on the stream bounds the backlog, as it bounds frames in flight.

use super::actor::SessionActor;
use super::messages::{Cut, Export, ExportOf, Frames, Leave, SessionCut};
use super::outbox::{CutAsked, CutState, CutTo, Pending};
use crate::error::Error;
use crate::residency::{Away, Back, Home, OnDevice, Tier};
use actix::{
    ActorContext, ActorFutureExt, AsyncContext, Context, Handler, ResponseActFuture,
    ResponseFuture, WrapFuture,
};
use offshoot_adapters::AdapterState;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Where a session's adapter is.
pub(super) enum Place {
    At(Home),
    /// Under way, down or up.
    Moving,
}

/// A copy that the engine was asked for.
pub(super) type Requested = oneshot::Receiver<Result<AdapterState, Error>>;

/// What waits for the adapter.
pub(super) enum Waiting {
    Frames(Box<Frames>),
    Cut(Cut, oneshot::Sender<Result<SessionCut, Error>>),
    Export(Export, oneshot::Sender<Result<ExportOf, Error>>),
}

#[derive(Default)]
pub(super) struct Backlog(VecDeque<Waiting>);

impl Backlog {
    pub fn push(&mut self, waiting: Waiting) {
        self.0.push_back(waiting);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The stream is gone: its client sends again what has no answer.
    pub fn detach(&mut self) {
        self.0.retain(|waiting| !matches!(waiting, Waiting::Frames(_)));
    }

    fn take_frames(&mut self) -> Vec<Frames> {
        let (mut frames, mut others) = (Vec::new(), VecDeque::new());
        for waiting in self.0.drain(..) {
            match waiting {
                Waiting::Frames(message) => frames.push(*message),
                other => others.push_back(other),
            }
        }
        self.0 = others;
        frames
    }
}

impl Place {
    pub fn tier(&self) -> Tier {
        match self {
            Place::At(home) => home.tier(),
            // Whichever way it goes, it is not on the device for certain.
            Place::Moving => Tier::Disk,
        }
    }

    /// What the adapter takes of the memory that it is in; 0 on disk.
    pub fn adapter_bytes(&self) -> u64 {
        match self {
            Place::At(home) => home.adapter_bytes(),
            Place::Moving => 0,
        }
    }

    pub fn on_device(&self) -> Option<&OnDevice> {
        match self {
            Place::At(Home::Device(on)) => Some(on),
            _ => None,
        }
    }
}

impl SessionActor {
    /// Serves what waits, as far as the adapter's place allows; a frame brings it back.
    pub(super) fn serve_backlog(&mut self, ctx: &mut Context<Self>) {
        while let Some(next) = self.backlog.0.front() {
            match (&self.place, next) {
                (Place::Moving, _) => break,
                (Place::At(Home::Away(_)), Waiting::Frames(_)) if self.ending.is_none() => {
                    self.come_back(ctx);
                    break;
                }
                (Place::At(Home::Device(_)), Waiting::Frames(message)) if self.holds(message) => {
                    break;
                }
                _ => {}
            }
            match self.backlog.0.pop_front() {
                Some(Waiting::Frames(message)) => {
                    self.hold.owes = false;
                    self.take_frames(*message, ctx);
                }
                Some(Waiting::Cut(cut, reply)) => self.cut(cut, reply, ctx),
                Some(Waiting::Export(export, reply)) => self.export(export, reply),
                None => {}
            }
        }
        self.pump();
    }

    pub(super) fn come_back(&mut self, ctx: &mut Context<Self>) {
        let away = match std::mem::replace(&mut self.place, Place::Moving) {
            Place::At(Home::Away(away)) => away,
            other => return self.place = other,
        };
        let bring = self.residency.clone().bring(self.profile.clone(), away, self.state.applied());
        let arrive = bring.into_actor(self).map(|back, actor, ctx| {
            match back {
                Ok(Back { on, answers }) => {
                    actor.hold.owes = true;
                    actor.place = Place::At(Home::Device(on));
                    if let Some(answers) = answers {
                        actor.state.put_answers(answers);
                    }
                }
                Err((_, error @ Error::SetBack { .. })) => return actor.end(&error, ctx),
                Err((away, error)) => actor.stay_away(away, &error),
            }
            actor.serve_backlog(ctx);
        });
        ctx.spawn(arrive);
    }

    /// What this actor stands at is not there any more: the next one begins where the store does.
    fn end(&mut self, error: &Error, ctx: &mut Context<Self>) {
        tracing::warn!(session = %self.profile.id, %error, "session goes back");
        self.end_stream(error);
        self.profile.writes.end();
        ctx.stop();
    }

    fn stay_away(&mut self, away: Away, error: &Error) {
        tracing::warn!(session = %self.profile.id, %error, "session cannot come back to the device");
        self.place = Place::At(Home::Away(away));
        self.refuse_backlog(error);
    }

    pub(super) fn refuse_backlog(&mut self, error: &Error) {
        for Frames { sequence, permit, span, .. } in self.backlog.take_frames() {
            self.refuse(permit, sequence, error, &span);
        }
    }

    fn cut(
        &mut self,
        Cut { reason }: Cut,
        reply: oneshot::Sender<Result<SessionCut, Error>>,
        ctx: &mut Context<Self>,
    ) {
        if let Err(error) = self.check_cut(&reason) {
            // The caller may have given up.
            let _ = reply.send(Err(error));
            return;
        }
        let state = match &self.place {
            Place::At(Home::Device(on)) => match on.engine.request_state() {
                Ok(state) => Err(state),
                Err(error) => return drop(reply.send(Err(error))),
            },
            Place::At(Home::Away(Away::Host(on))) => Ok(CutState::Copied(on.adapters.clone())),
            Place::At(Home::Away(Away::Disk)) | Place::Moving => Ok(CutState::InStore),
        };
        let ends = reason.ends();
        if ends {
            self.ending = Some(reason);
        }
        let after = self.state.expected_applied();
        self.await_cut(CutAsked { after, ends, to: CutTo::Caller(reply) }, state, ctx);
    }

    /// In its turn behind the frames that were taken in. `state`: at hand, or requested.
    pub(super) fn await_cut(
        &mut self,
        asked: CutAsked,
        state: Result<CutState, Requested>,
        ctx: &mut Context<Self>,
    ) {
        self.n_cuts += 1;
        let id = self.n_cuts;
        let state = match state {
            Ok(at_hand) => Some(Ok(at_hand)),
            Err(requested) => {
                let finish = requested.into_actor(self).map(move |state, actor, _| {
                    let state = state.unwrap_or(Err(Error::engine_down()));
                    actor.outbox.copied(id, state.map(|s| CutState::Copied(Arc::new(s))));
                    actor.pump();
                });
                ctx.spawn(finish);
                None
            }
        };
        self.outbox.push(Pending::Cut { id, asked, state });
    }

    fn export(
        &mut self,
        Export { gradients }: Export,
        reply: oneshot::Sender<Result<ExportOf, Error>>,
    ) {
        let at_hand = match &self.place {
            Place::At(Home::Device(on)) => {
                match on.engine.request_export(gradients) {
                    Ok(exported) => {
                        actix::spawn(async move {
                            let gone = Err(Error::engine_down());
                            let exported = exported.await.unwrap_or(gone);
                            let _ = reply.send(exported.map(ExportOf::Device));
                        });
                    }
                    Err(error) => drop(reply.send(Err(error))),
                }
                return;
            }
            Place::At(Home::Away(Away::Host(on))) => ExportOf::Host(on.adapters.clone()),
            Place::At(Home::Away(Away::Disk)) | Place::Moving => ExportOf::InStore,
        };
        let _ = reply.send(Ok(at_hand));
    }

    fn may_leave(&self) -> bool {
        let has_where_to = !matches!(self.place, Place::Moving | Place::At(Home::Away(Away::Disk)));
        let nothing_waits = (self.backlog.is_empty() || self.hold.on) && self.outbox.is_empty();
        let stays = self.place.on_device().is_some() && self.profile.pinned.is_pinned();
        has_where_to && !stays && nothing_waits && self.ending.is_none() && self.state.is_quiet()
    }
}

impl Handler<Leave> for SessionActor {
    type Result = ResponseActFuture<Self, Result<(), Error>>;

    fn handle(&mut self, _: Leave, _: &mut Context<Self>) -> Self::Result {
        if !self.may_leave() {
            return Box::pin(async { Err(Error::Busy) }.into_actor(self));
        }
        let home = match std::mem::replace(&mut self.place, Place::Moving) {
            Place::At(home) => home,
            Place::Moving => unreachable!("what moves may not leave"),
        };
        self.show();
        let resume = self.state.resume();
        let lower = self.residency.clone().lower(self.profile.clone(), home, resume);
        Box::pin(lower.into_actor(self).map(|lowered, actor, ctx| {
            let (home, result) = match lowered {
                Ok(away) => (Home::Away(away), Ok(())),
                Err((home, error)) => (home, Err(error)),
            };
            if !matches!(home, Home::Device(_)) {
                actor.state.drop_caches();
            }
            if matches!(home, Home::Away(Away::Disk)) {
                actor.state.drop_answers();
                actor.cadence.taken(Instant::now());
            }
            tracing::debug!(session = %actor.profile.id, stays = result.is_err(), "session left");
            actor.place = Place::At(home);
            actor.hold.on = false;
            actor.serve_backlog(ctx);
            result
        }))
    }
}

impl Handler<Cut> for SessionActor {
    type Result = ResponseFuture<Result<SessionCut, Error>>;

    fn handle(&mut self, cut: Cut, ctx: &mut Context<Self>) -> Self::Result {
        let (reply, done) = oneshot::channel();
        // It may stand behind frames that wait for the session to leave.
        self.hold.on = false;
        self.backlog.push(Waiting::Cut(cut, reply));
        self.serve_backlog(ctx);
        Box::pin(async { done.await.unwrap_or(Err(Error::Gone { part: "session" })) })
    }
}

impl Handler<Export> for SessionActor {
    type Result = ResponseFuture<Result<ExportOf, Error>>;

    fn handle(&mut self, export: Export, ctx: &mut Context<Self>) -> Self::Result {
        let (reply, done) = oneshot::channel();
        self.hold.on = false;
        self.backlog.push(Waiting::Export(export, reply));
        self.serve_backlog(ctx);
        Box::pin(async { done.await.unwrap_or(Err(Error::Gone { part: "session" })) })
    }
}
