use super::cadence::{Cadence, SnapshotEvery};
use super::frame::{Effect, Frame, SessionId, Work};
use super::home::{Backlog, Place, Requested, Waiting};
use super::loss::WireLoss;
use super::messages::{DrainWhenQuiet, Frames, Info, Reason, SessionCut, SessionView};
use super::newest::Newest;
use super::outbox::{Answer, CutAsked, CutState, CutTo, Next, Outbox, Pending, Permit};
use super::state::{Admission, DRAIN_RETRY, FrameLimits, Resume, SessionState, Ticket};
use super::streams::{Lease, Stream};
use crate::engine::FrameWork;
use crate::error::Error;
use crate::faults::Fault;
use crate::registry::Copied;
use crate::residency::{Alive, Home, Profile, Residency, Writing};
use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, MessageResult, ResponseFuture,
    WrapFuture,
};
use offshoot_proto::v1::{self, ServerFrame};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// One client's session while it is live. Messages come one at a time; what takes long happens
/// elsewhere and comes back as a future of this actor.
pub struct SessionActor {
    /// Before the adapter's place, so that it counts no longer when its bytes are back.
    _alive: Alive,
    pub(super) profile: Arc<Profile>,
    pub(super) state: SessionState,
    pub(super) residency: Arc<Residency>,
    pub(super) place: Place,
    pub(super) backlog: Backlog,
    pub(super) limits: v1::Limits,
    pub(super) outbox: Outbox,
    wire_loss: WireLoss,
    pub(super) stream: Option<Stream>,
    pub(super) newest: Newest,
    pub(super) n_streams: u64,
    pub(super) n_cuts: u64,
    pub(super) lease: Lease,
    /// A last copy is under way; no new frame is taken in.
    pub(super) ending: Option<Reason>,
    /// When the server copies it by itself.
    pub(super) cadence: Cadence,
    /// Who waits for [`SessionState::is_quiet`].
    quiet: Vec<oneshot::Sender<()>>,
}

/// What a session actor is made from.
pub struct SessionSeed {
    pub alive: Alive,
    pub profile: Arc<Profile>,
    pub residency: Arc<Residency>,
    pub home: Home,
    /// Without recorded answers, if the home is the disk.
    pub resume: Resume,
    /// Clients that began before cannot attach.
    pub epoch: u64,
    pub limits: v1::Limits,
    /// How often it is made durable while it trains.
    pub snapshots: SnapshotEvery,
    /// How long the session may be without a stream.
    pub lease: Duration,
    /// Told when that is over.
    pub idle: mpsc::Sender<SessionId>,
}

impl SessionActor {
    /// Not yet attached.
    pub fn new(seed: SessionSeed) -> Self {
        let limits = FrameLimits {
            max_frames_in_flight: seed.limits.max_frames_in_flight as usize,
            max_open_microbatches: seed.limits.max_open_microbatches as usize,
        };
        SessionActor {
            _alive: seed.alive,
            profile: seed.profile,
            state: SessionState::new(limits, seed.resume),
            residency: seed.residency,
            place: Place::At(seed.home),
            backlog: Backlog::default(),
            limits: seed.limits,
            outbox: Outbox::default(),
            wire_loss: WireLoss::default(),
            stream: None,
            newest: Newest::since(seed.epoch),
            n_streams: 0,
            n_cuts: 0,
            lease: Lease::new(seed.lease, seed.idle),
            ending: None,
            cadence: Cadence::new(seed.snapshots, Instant::now()),
            quiet: Vec::new(),
        }
    }

    fn take_in(&mut self, frame: Frame, permit: Permit, ctx: &mut Context<Self>) {
        let sequence = frame.head.sequence;
        let admission = match &self.ending {
            Some(reason) => Err(reason.farewell()),
            None => self.state.admit(&frame.head),
        };
        match admission {
            Ok(Admission::Run(ticket)) => self.run(ticket, frame, permit, ctx),
            Ok(Admission::Joined(ticket)) => self.outbox.redirect(ticket, permit),
            Ok(Admission::Answered(answer)) => self.answer(permit, *answer),
            Err(error) => self.refuse(permit, sequence, &error),
        }
    }

    pub(super) fn take_frames(&mut self, message: Frames, ctx: &mut Context<Self>) {
        let Frames { sequence, frame, permit, .. } = message;
        self.residency.used(&self.profile);
        match frame {
            Ok(frame) => self.take_in(frame, permit, ctx),
            Err(error) => self.refuse(permit, sequence, &error),
        }
    }

    pub(super) fn refuse(&mut self, permit: Permit, sequence: u64, error: &Error) {
        tracing::debug!(session = %self.profile.id, sequence, error = error.label(), "frame refused");
        let hidden = error.hidden_from(&self.profile.settings.tenant);
        self.answer(permit, hidden.as_ref().unwrap_or(error).to_frame(sequence));
    }

    fn answer(&mut self, permit: Permit, answer: ServerFrame) {
        self.outbox.push_ready(permit, answer);
    }

    fn run(&mut self, ticket: Ticket, frame: Frame, permit: Permit, ctx: &mut Context<Self>) {
        let (sequence, is_step) = (frame.head.sequence, frame.head.effect == Effect::Step);
        let span = tracing::debug_span!("frame", session = %self.profile.id, sequence);
        let (work, answer) = with_reply(frame.work);
        let on = self.place.on_device().ok_or(Error::Gone { part: "adapter" });
        let submitted = on.and_then(|on| span.in_scope(|| on.engine.submit(sequence, work)));
        let copy = if is_step && submitted.is_ok() { self.copy_if_due() } else { None };
        let (permit, copied) = (Some(permit), copy.is_some());
        self.outbox.push(Pending::Frame { ticket, sequence, permit, answer: None, copied });
        if let Err(error) = submitted {
            // In its turn, as if the engine had refused it.
            self.outbox.answered(ticket, Answer::Refused(error));
            return;
        }
        let finish = answer.into_actor(self).map(move |answer, actor, _| {
            actor.outbox.answered(ticket, answer);
            actor.pump();
        });
        ctx.spawn(finish);
        if let Some((writing, requested)) = copy {
            let asked = CutAsked { after: sequence, ends: false, to: CutTo::Store(writing) };
            self.await_cut(asked, Err(requested), ctx);
        }
    }

    /// A Step has gone to the engine: asks for the session right behind it, if a snapshot is due. So
    /// frames that follow at once are not in the copy, and wait for nothing.
    fn copy_if_due(&mut self) -> Option<(Writing, Requested)> {
        let now = Instant::now();
        if !self.cadence.step(now) || self.state.is_draining() {
            return None;
        }
        let writing = self.residency.begin_copy(&self.profile)?;
        let requested = self.place.on_device()?.engine.request_state().ok()?;
        self.cadence.taken(now);
        Some((writing, requested))
    }

    /// Sends and settles what is ready, in order.
    pub(super) fn pump(&mut self) {
        while let Some(next) = self.outbox.next() {
            match next {
                Next::Ready { permit, answer } => drop(permit.send(Ok(*answer))),
                Next::Frame { ticket, sequence, permit, answer, copied } => {
                    self.wire_loss.count(&answer);
                    let (settled, answer) =
                        answer.settle(sequence, copied, &self.profile.settings.tenant);
                    self.state.settle(ticket, settled);
                    if let Some(permit) = permit {
                        permit.send(Ok(answer));
                    }
                }
                Next::Cut { asked, state } => self.finish_cut(asked, state),
            }
        }
        self.profile.activity.set_cache_bytes(self.state.cache_bytes());
        let is_quiet = self.state.is_quiet() && self.backlog.is_empty();
        if self.profile.activity.set_busy(!is_quiet) && is_quiet {
            self.residency.became_quiet();
        }
        // Without a stream no Backward will come.
        if is_quiet || self.stream.is_none() && self.state.is_settled() {
            for waiting in self.quiet.drain(..) {
                let _ = waiting.send(());
            }
        }
    }

    fn finish_cut(&mut self, asked: CutAsked, state: Result<CutState, Error>) {
        let (server, client) = (self.state.applied(), asked.after);
        let cut = match state {
            Ok(_) if server != client => Err(Error::Point { server, client }),
            Ok(CutState::Copied(adapters)) => {
                Ok(SessionCut::Copied { adapters, resume: self.state.resume() })
            }
            Ok(CutState::InStore) => Ok(SessionCut::InStore),
            Err(error) => Err(error),
        };
        match (&self.ending, &cut) {
            (Some(reason), Ok(_)) if asked.ends => self.end_stream(&reason.farewell()),
            (Some(_), Err(_)) if asked.ends => self.ending = None,
            _ => {}
        }
        match (asked.to, cut) {
            (CutTo::Caller(reply), cut) => {
                if cut.is_ok() {
                    self.cadence.taken(Instant::now());
                }
                // The caller may have given up.
                let _ = reply.send(cut);
            }
            (CutTo::Store(writing), Ok(SessionCut::Copied { adapters, resume })) => {
                let (residency, profile) = (self.residency.clone(), self.profile.clone());
                residency.write_behind(profile, Copied { adapters, resume }, writing);
            }
            (CutTo::Store(_), Ok(SessionCut::InStore)) => {}
            (CutTo::Store(_), Err(error)) => {
                tracing::debug!(session = %self.profile.id, %error, "no snapshot of this Step");
                self.cadence.missed();
            }
        }
    }

    pub(super) fn check_cut(&self, reason: &Reason) -> Result<(), Error> {
        if self.ending.is_some() {
            return Err(Error::Busy);
        }
        let server = self.state.expected_applied();
        match *reason {
            Reason::Snapshot { after } if after != server => {
                Err(Error::Point { server, client: after })
            }
            Reason::Lease if self.stream.is_some() || !self.lease.over => Err(Error::Busy),
            _ => Ok(()),
        }
    }
}

type PendingAnswer = Pin<Box<dyn Future<Output = Answer>>>;

/// A job for the engine, and what will come of it.
fn with_reply(work: Work) -> (FrameWork, PendingAnswer) {
    async fn wait<T>(result: oneshot::Receiver<Result<T, Error>>) -> Result<T, Error> {
        result.await.unwrap_or(Err(Error::engine_down()))
    }
    match work {
        Work::Forward(work) => {
            let (reply, result) = oneshot::channel();
            let answer = Box::pin(async { Answer::Forward(wait(result).await) });
            (FrameWork::Forward { work: Box::new(work), reply }, answer)
        }
        Work::Backward(work) => {
            let (reply, result) = oneshot::channel();
            let microbatch = work.microbatch;
            let answer =
                Box::pin(
                    async move { Answer::Backward { microbatch, result: wait(result).await } },
                );
            (FrameWork::Backward { work: Box::new(work), reply }, answer)
        }
        Work::Step(work) => {
            let (reply, result) = oneshot::channel();
            let answer = Box::pin(async { Answer::Step(wait(result).await) });
            (FrameWork::Step { work, reply }, answer)
        }
        Work::Discard { microbatch } => {
            let (reply, result) = oneshot::channel();
            let answer = Box::pin(async { Answer::Discard(wait(result).await) });
            (FrameWork::Discard { microbatch, reply }, answer)
        }
        Work::Extend(work) => {
            let (reply, result) = oneshot::channel();
            let answer = Box::pin(async { Answer::Forward(wait(result).await) });
            (FrameWork::Extend { work: Box::new(work), reply }, answer)
        }
        Work::DropCache { cache } => {
            let (reply, result) = oneshot::channel();
            let answer = Box::pin(async { Answer::DropCache(wait(result).await) });
            (FrameWork::DropCache { cache, reply }, answer)
        }
    }
}

impl Drop for SessionActor {
    fn drop(&mut self) {
        // However it ends: whoever comes next begins from what the store holds then.
        self.profile.writes.end();
    }
}

impl Actor for SessionActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        self.start_lease(ctx);
    }
}

impl Handler<Frames> for SessionActor {
    type Result = ();

    fn handle(&mut self, message: Frames, ctx: &mut Context<Self>) {
        if self.stream.as_ref().is_none_or(|current| current.number != message.stream) {
            return;
        }
        if self.state.is_draining() && self.place.on_device().is_none() {
            let draining = Error::Draining { retry_after: DRAIN_RETRY };
            self.refuse(message.permit, message.sequence, &draining);
            return self.pump();
        }
        self.residency.faults().pass(Fault::Actor);
        self.backlog.push(Waiting::Frames(Box::new(message)));
        self.serve_backlog(ctx);
    }
}

impl Handler<DrainWhenQuiet> for SessionActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: DrainWhenQuiet, _: &mut Context<Self>) -> Self::Result {
        self.state.drain();
        if self.place.on_device().is_none() {
            // They would wait for room, and leave again at once.
            self.refuse_backlog(&Error::Draining { retry_after: DRAIN_RETRY });
        }
        let (quiet, waiting) = oneshot::channel();
        self.quiet.push(quiet);
        self.pump();
        // An actor that ends meanwhile is quiet, too.
        Box::pin(async { drop(waiting.await) })
    }
}

impl Handler<Info> for SessionActor {
    type Result = MessageResult<Info>;

    fn handle(&mut self, _: Info, _: &mut Context<Self>) -> Self::Result {
        MessageResult(SessionView {
            is_attached: self.stream.is_some(),
            step: self.state.step(),
            applied: self.state.applied(),
            tier: self.place.tier(),
            adapter_bytes: self.place.adapter_bytes(),
            n_microbatches: self.state.open().len() as u32,
            n_caches: self.state.n_caches() as u32,
            tape_bytes: self.state.open().values().sum(),
            cache_bytes: self.state.cache_bytes(),
            wire_loss: self.wire_loss,
        })
    }
}
