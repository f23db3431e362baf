use super::cadence::{Cadence, SnapshotEvery};
use super::evict::Hold;
use super::frame::{Effect, Frame, SessionId, Work};
use super::home::{Backlog, Place, Requested, Waiting};
use super::loss::WireLoss;
use super::messages::{DrainWhenQuiet, Frames, Reason, SessionCut};
use super::newest::Newest;
use super::outbox::{Answer, CutAsked, CutState, CutTo, Next, Outbox, Pending, Permit};
use super::state::{Admission, DRAIN_RETRY, FrameLimits, Resume, SessionState, Ticket};
use super::streams::{Lease, Stream};
use crate::engine::FrameWork;
use crate::error::Error;
use crate::faults::Fault;
use crate::refusals::Refusals;
use crate::registry::Copied;
use crate::residency::{Alive, Home, Profile, Residency, Writing};
use crate::trace::{self, Repeated};
use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, ResponseFuture, WrapFuture};
use offshoot_proto::v1::{self, ServerFrame};
use prost::Message;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

/// One client's session while it is live. Messages come one at a time; what takes long happens
/// elsewhere and comes back as a future of this actor.
pub struct SessionActor {
    /// Before the adapter's place, so that it counts no longer when its bytes are back.
    _alive: Alive,
    pub(super) profile: Arc<Profile>,
    pub(super) state: SessionState,
    pub(super) residency: Arc<Residency>,
    refusals: Arc<Refusals>,
    pub(super) place: Place,
    pub(super) backlog: Backlog,
    pub(super) limits: v1::Limits,
    pub(super) outbox: Outbox,
    pub(super) wire_loss: WireLoss,
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
    /// It is to leave the device.
    pub(super) hold: Hold,
}

/// What a session actor is made from.
pub struct SessionSeed {
    pub alive: Alive,
    pub profile: Arc<Profile>,
    pub residency: Arc<Residency>,
    pub refusals: Arc<Refusals>,
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
            refusals: seed.refusals,
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
            hold: Hold::default(),
        }
    }

    fn take_in(&mut self, frame: Frame, permit: Permit, span: Span, ctx: &mut Context<Self>) {
        let sequence = frame.head.sequence;
        let admission = match &self.ending {
            Some(reason) => Err(reason.farewell()),
            None => self.state.admit(&frame.head),
        };
        match admission {
            Ok(Admission::Run(ticket)) => self.run(ticket, frame, (permit, span), ctx),
            Ok(Admission::Joined(ticket)) => {
                trace::repeated(&span, Repeated::Joined);
                self.outbox.redirect(ticket, permit);
            }
            Ok(Admission::Answered(answer)) => {
                trace::repeated(&span, Repeated::Answered);
                self.outbox.push_ready(permit, *answer);
            }
            Err(error) => self.refuse(permit, sequence, &error, &span),
        }
    }

    pub(super) fn take_frames(&mut self, message: Frames, ctx: &mut Context<Self>) {
        let Frames { sequence, frame, permit, span, .. } = message;
        self.residency.used(&self.profile);
        match frame {
            Ok(frame) => self.take_in(frame, permit, span, ctx),
            Err(error) => self.refuse(permit, sequence, &error, &span),
        }
    }

    pub(super) fn refuse(&mut self, permit: Permit, sequence: u64, error: &Error, span: &Span) {
        let answer = self.refusal(sequence, error, span);
        self.outbox.push_ready(permit, answer);
    }

    /// The answer to a frame that is refused.
    pub(super) fn refusal(&self, sequence: u64, error: &Error, span: &Span) -> ServerFrame {
        let (tenant, session) = (&self.profile.settings.tenant, Some(self.profile.id));
        let answer = self.refusals.frame(tenant, session, error, sequence);
        trace::refused(span, error, &answer);
        answer
    }

    fn run(
        &mut self,
        ticket: Ticket,
        frame: Frame,
        (permit, span): (Permit, Span),
        ctx: &mut Context<Self>,
    ) {
        let (sequence, is_step) = (frame.head.sequence, frame.head.effect == Effect::Step);
        let (work, answer) = with_reply(frame.work);
        let on = self.place.on_device().ok_or(Error::Gone { part: "adapter" });
        let submitted = on.and_then(|on| span.in_scope(|| on.engine.submit(sequence, work)));
        let copies = is_step && submitted.is_ok();
        let copy = if copies { span.in_scope(|| self.copy_if_due()) } else { None };
        let (permit, copied) = (Some(permit), copy.is_some());
        let asked_by = if copied { span.clone() } else { Span::none() };
        self.outbox.push(Pending::Frame { ticket, sequence, permit, answer: None, copied, span });
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
            let to = CutTo::Store(writing, asked_by);
            self.await_cut(CutAsked { after: sequence, ends: false, to }, Err(requested), ctx);
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
                Next::Ready { permit, answer } => self.send(permit, *answer),
                Next::Frame { ticket, sequence, permit, answer, copied, span } => {
                    self.wire_loss.count(&answer);
                    if let Answer::Step(Ok(stepped)) = &answer {
                        trace::stepped(&span, stepped.step);
                    }
                    let refuse = |error: &Error| self.refusal(sequence, error, &span);
                    let (settled, answer) = answer.settle(sequence, copied, refuse);
                    self.state.settle(ticket, settled);
                    self.show();
                    if let Some(permit) = permit {
                        self.send(permit, answer);
                    }
                }
                Next::Cut { asked, state } => self.finish_cut(asked, state),
            }
        }
        self.show();
        self.profile.activity.set_cache_bytes(self.state.cache_bytes());
        let is_quiet = self.state.is_quiet() && (self.backlog.is_empty() || self.hold.on);
        if self.state.is_quiet() {
            self.tell_still();
        }
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

    fn send(&self, permit: Permit, answer: ServerFrame) {
        self.profile.meter.sent(answer.encoded_len());
        permit.send(Ok(answer));
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
            (CutTo::Store(writing, asked_by), Ok(SessionCut::Copied { adapters, resume })) => {
                let (residency, profile) = (self.residency.clone(), self.profile.clone());
                let copied = Copied { adapters, resume };
                asked_by.in_scope(|| residency.write_behind(profile, copied, writing));
            }
            (CutTo::Store(..), Ok(SessionCut::InStore)) => {}
            (CutTo::Store(..), Err(error)) => {
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
            self.refuse(message.permit, message.sequence, &draining, &message.span);
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
        self.hold.on = false;
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
