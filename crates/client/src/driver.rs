//! The task that owns a session's stream. It hands frames to the wire in the order in which they
//! come, gives each answer to its caller, and takes the stream up again after a break. All decisions
//! about numbers and order are in `window.rs`.
//!
//! It is one long file because it is one task: what it hears from callers, the wire, the pulse and the
//! clock changes the same few fields, and apart these would be the parts of one loop.

use crate::ClientError;
use crate::client::Client;
use crate::command::{Answer, Command};
use crate::entry::{Entry, Request};
use crate::identity::Token;
use crate::outage::{Outage, SILENCE, Waiting};
use crate::pulse::{Pulse, Sign};
use crate::trace::FrameSpan;
use crate::types::SessionId;
use crate::window::{Cause, Gone, Outcome, Window};
use crate::wire::{self, Failed, Side, Wire};
use offshoot_proto::v1::{self, server_frame};
use std::time::Duration;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;
use tokio::time::Instant;

struct Reply {
    to: oneshot::Sender<Result<Answer, ClientError>>,
    since: Instant,
    span: FrameSpan,
}

/// After so much waiting for a quota of tokens people are told about it.
const SLOWED: Duration = Duration::from_secs(5);
/// As in the tenants file.
const RATE_QUOTA: &str = "tokens_per_second";

/// Why a stream ended.
enum End {
    Broken(String),
    /// The server said that it ends.
    Drains(String),
    Fatal(ClientError),
    /// The session was dropped and everything is answered.
    Done,
}

pub(crate) struct Driver {
    client: Client,
    id: SessionId,
    window: Window<Reply>,
    commands: mpsc::Receiver<Command>,
    /// What the server calls this client, so that nobody who began later is pushed out by it.
    epoch: u64,
    /// Random, so that the server can tell this client's Hellos from another's.
    number: u64,
    n_hellos: u64,
    /// Nothing more is taken in until everything is answered.
    settling: Option<oneshot::Sender<Result<u64, ClientError>>>,
    /// The error of the refused frame, while those behind it come back.
    refusal: Option<ClientError>,
    /// A refusal that nobody waited for: the next call gets it.
    unreported: Option<ClientError>,
    /// From the first failure until an answer arrives again.
    outage: Option<Outage>,
    /// Since the first refusal with a retry hint after the last answer.
    refused_since: Option<Instant>,
    /// When held frames are sent again.
    retry_at: Option<Instant>,
    /// While the server puts frames off, for room or for long.
    put_off: Option<Waiting>,
    /// How long frames have waited because of a quota of tokens per second.
    slowed: Duration,
    pulse: Pulse,
}

impl Driver {
    /// Attaches and starts the task. `last_answered` is 0 for a new session and the snapshot's
    /// number for a restored one.
    pub(crate) async fn start(
        client: Client,
        id: SessionId,
        last_answered: u64,
        limits: &v1::Limits,
    ) -> Result<mpsc::Sender<Command>, ClientError> {
        let (sender, commands) = mpsc::channel(1);
        let mut driver = Driver {
            pulse: Pulse::new(&client, client.options().retry.max_elapsed),
            client,
            id,
            window: Window::new(last_answered, limits),
            commands,
            epoch: 0,
            number: rand::random_range(1..=u64::MAX),
            n_hellos: 0,
            settling: None,
            refusal: None,
            unreported: None,
            outage: None,
            refused_since: None,
            retry_at: None,
            put_off: None,
            slowed: Duration::ZERO,
        };
        let wire = driver.attach_with_backoff(None).await?;
        tokio::spawn(driver.run(wire));
        Ok(sender)
    }

    async fn run(mut self, mut wire: Wire) {
        loop {
            let since = Instant::now();
            let (why, drains) = match self.pump(wire).await {
                End::Done => return,
                End::Fatal(error) => return self.end(error).await,
                End::Broken(why) => (why, false),
                End::Drains(why) => (why, true),
            };
            // A stream that breaks at once again is one outage with the one before.
            let long = since.elapsed() > self.client.options().retry.max_delay;
            if long && !self.pulse.is_silent() {
                self.outage = None;
            }
            if drains {
                let retry = self.client.options().retry;
                self.outage.get_or_insert_with(|| Outage::new(retry)).soon();
            }
            (self.retry_at, self.put_off) = (None, None);
            for entry in self.window.disconnected() {
                self.abort(entry);
            }
            if self.is_over() {
                return;
            }
            match self.attach_with_backoff(Some(&why)).await {
                Ok(again) => wire = again,
                Err(error) => return self.end(error).await,
            }
        }
    }

    /// Nobody can ask for anything any more, and nothing is left to be answered.
    fn is_over(&self) -> bool {
        self.commands.is_closed() && self.commands.is_empty() && self.window.is_empty()
    }

    /// Attaches, again and again until the options' patience ends. `broken` says why it has to be
    /// done again.
    async fn attach_with_backoff(&mut self, broken: Option<&str>) -> Result<Wire, ClientError> {
        let retry = self.client.options().retry;
        let mut outage = self.outage.take().unwrap_or_else(|| Outage::new(retry));
        let mut cause = broken.unwrap_or_default().to_string();
        if broken.is_some() {
            outage.failed(&self.client, &cause);
        }
        while outage.attempt().await {
            if self.is_over() {
                return Err(ClientError::Closed);
            }
            let (answered, capacity) = (self.window.answered(), self.window.capacity());
            self.n_hellos += 1;
            let hello = v1::Hello {
                session_id: self.id.to_string(),
                last_answered: answered,
                epoch: self.epoch,
                client: self.number,
                attempt: self.n_hellos,
            };
            match wire::attach(&self.client, &self.id, hello, capacity).await {
                Ok(wire) => {
                    self.epoch = wire.attached.epoch;
                    self.check(&wire.attached)?;
                    self.pulse.beat();
                    outage.over(&self.client);
                    if let Some(why) = broken {
                        tracing::info!(
                            session = %self.id, why, attempts = outage.attempts(),
                            outage_seconds = outage.elapsed().as_secs_f64(),
                            last_applied = wire.attached.last_applied,
                            "reconnected; frames without an answer are sent again"
                        );
                    }
                    self.outage = Some(outage);
                    return Ok(wire);
                }
                Err(Failed::Refused(error)) => return Err(error),
                Err(Failed::Broken(why)) => cause = why,
                Err(Failed::Drains(why)) => {
                    outage.soon();
                    cause = why;
                }
            }
            tracing::debug!(session = %self.id, cause, "cannot attach, will try again");
            outage.failed(&self.client, &cause);
        }
        Err(outage.unreachable(&self.client, cause))
    }

    /// Whether the session can go on from where the server stands.
    fn check(&mut self, attached: &v1::Attached) -> Result<(), ClientError> {
        if let Some(limits) = &attached.limits {
            self.window.set_limits(limits);
        }
        let (last_applied, answered) = (attached.last_applied, self.window.answered());
        match self.window.attached(last_applied, &attached.open_microbatches) {
            Ok(()) => Ok(()),
            Err(Gone::RolledBack { lost_microbatches }) => Err(ClientError::RolledBack {
                last_applied,
                answered,
                lost_microbatches,
                snapshots: match &attached.snapshots[..] {
                    [] => attached.durable.iter().cloned().collect(),
                    all => all.to_vec(),
                },
            }),
            Err(Gone::Ahead) => Err(ClientError::TakenOver {
                session: self.id.clone(),
                message: format!(
                    "the server stands at frame {last_applied}, which was not sent from here"
                ),
                request_id: None,
            }),
        }
    }

    /// Serves one stream until it ends.
    async fn pump(&mut self, mut wire: Wire) -> End {
        loop {
            self.discard_abandoned();
            while let Some(mut frame) = self.window.take_unsent() {
                if let Some(reply) = self.window.last_sent() {
                    reply.span.mark(&mut frame);
                }
                match wire.out.try_send(frame) {
                    Ok(()) => {}
                    // The stream is gone; its answers say why.
                    Err(TrySendError::Closed(_)) => break,
                    Err(TrySendError::Full(_)) => {
                        return End::Broken("the server allows more frames now".to_string());
                    }
                }
            }
            if self.window.is_empty() {
                self.settled();
            }
            if self.is_over() {
                return End::Done;
            }
            if self.window.may_leave() {
                return End::Drains("the server drains".to_string());
            }
            let listens = self.settling.is_none()
                && self.window.has_room()
                && !(self.commands.is_closed() && self.commands.is_empty());
            let retry_at = self.retry_at;
            // A frame that waits here, waits for nothing of the server.
            self.pulse.set_waits(!self.window.is_empty() && retry_at.is_none());
            tokio::select! {
                answer = wire.answers.message() => match answer {
                    Ok(Some(frame)) => {
                        self.heard();
                        if let Err(end) = self.take_answer(frame, wire.token.as_ref()) {
                            return end;
                        }
                    }
                    Ok(None) => return End::Broken("the server ended the stream".to_string()),
                    Err(status) => return wire::judge(&self.side(wire.token.as_ref()), &status).into(),
                },
                command = self.commands.recv(), if listens => match command {
                    Some(Command::Reattach) => {
                        return End::Broken("the session is compared with the server's".to_string());
                    }
                    Some(command) => self.take_command(command),
                    None => {}
                },
                sign = self.pulse.next() => if let Err(end) = self.take_sign(sign) {
                    return end;
                },
                () = sleep_until(retry_at), if !self.window.is_returning() => {
                    self.retry_at = None;
                    self.window.release();
                }
            }
        }
    }

    /// Something came. The server may have been silent before.
    fn heard(&mut self) {
        if self.pulse.beat()
            && let Some(mut outage) = self.outage.take()
        {
            outage.over(&self.client);
        }
    }

    fn take_sign(&mut self, sign: Sign) -> Result<(), End> {
        if sign == Sign::Silent {
            let began = Outage::since(self.client.options().retry, self.pulse.last());
            self.outage.insert(began).silent(&self.client);
        } else if let Some(mut outage) = self.outage.take() {
            if sign == Sign::TooLong {
                return Err(End::Fatal(outage.unreachable(&self.client, SILENCE.to_string())));
            }
            outage.over(&self.client);
        }
        Ok(())
    }

    fn side<'a>(&'a self, sent: Option<&'a Token>) -> Side<'a> {
        Side { client: &self.client, id: &self.id, sent }
    }

    /// Discards microbatches that nobody wants any more.
    fn discard_abandoned(&mut self) {
        for microbatch in self.window.abandoned() {
            // Nobody waits for the answer.
            let (to, since) = (oneshot::channel().0, Instant::now());
            let reply = Reply { to, since, span: FrameSpan::none() };
            self.window.push(Request::Discard(v1::Discard { microbatch }), reply);
        }
    }

    fn take_command(&mut self, command: Command) {
        // They may stand in the way of a step, and belong before a snapshot.
        self.discard_abandoned();
        match command {
            Command::Look | Command::Reattach => {}
            Command::Send { request, span, reply: to } => match self.unreported.take() {
                Some(earlier) => {
                    let _ = to.send(Err(aborted(request.call(), earlier)));
                }
                None => {
                    span.of(&self.id);
                    self.window.push(*request, Reply { to, since: Instant::now(), span });
                }
            },
            Command::Settle { reply } => self.settling = Some(reply),
        }
    }

    /// Everything is answered.
    fn settled(&mut self) {
        if let Some(reply) = self.settling.take() {
            let _ = reply.send(match self.unreported.take() {
                Some(earlier) => Err(aborted("waiting for the last answers", earlier)),
                None => Ok(self.window.answered()),
            });
        }
    }

    fn take_answer(&mut self, frame: v1::ServerFrame, token: Option<&Token>) -> Result<(), End> {
        let sequence = frame.sequence;
        let error = match frame.body {
            None => return Err(protocol(format!("the answer to frame {sequence} is empty"))),
            Some(server_frame::Body::Error(error)) => error,
            Some(body) => return self.applied(sequence, body),
        };
        let of_all = [v1::ErrorCode::TakenOver, v1::ErrorCode::Unauthenticated];
        if sequence == 0 || of_all.contains(&error.code()) {
            return Err(wire::judge_error(&self.side(token), error).into());
        }
        self.refused(sequence, error)
    }

    fn applied(&mut self, sequence: u64, body: server_frame::Body) -> Result<(), End> {
        self.outage = None;
        (self.refused_since, self.put_off) = (None, None);
        match self.window.applied(sequence) {
            Outcome::Answered(entry) => {
                let microbatch = entry.microbatch();
                let (round_trip, retries) = (entry.reply.since.elapsed(), entry.retries);
                entry.reply.span.answered(retries);
                // Nobody may be waiting, as after a step.
                let answer = Answer { body, sequence, microbatch, round_trip, retries };
                let _ = entry.reply.to.send(Ok(answer));
                Ok(())
            }
            Outcome::Unexpected { due } => Err(unexpected(sequence, due)),
            Outcome::Refused(_) | Outcome::Aborted(_) | Outcome::Kept => {
                Err(protocol(format!("frame {sequence} was applied behind a refused one")))
            }
        }
    }

    fn refused(&mut self, sequence: u64, error: v1::FrameError) -> Result<(), End> {
        let cause = match error.code() {
            // Those behind a refused frame share its fate.
            _ if self.window.is_returning() => Cause::Final,
            v1::ErrorCode::Draining => Cause::Drain,
            _ if self.is_slowed(&error) => Cause::Rate,
            _ if self.will_wait(error.retry_after_millis) => Cause::Retry,
            _ => Cause::Final,
        };
        match self.window.refused(sequence, cause) {
            Outcome::Refused(entry) => {
                let (call, code) = (entry.call(), error.code());
                let after = Duration::from_millis(error.retry_after_millis.into());
                let retry_after = (!after.is_zero()).then_some(after);
                let request_id = crate::error::named(error.request_id);
                let (message, quota) = (error.message, error.quota);
                let refusal =
                    ClientError::Refused { call, code, message, retry_after, quota, request_id };
                entry.reply.span.failed(&refusal);
                self.refusal = Some(refusal.clone());
                if entry.reply.to.send(Err(refusal)).is_err() {
                    self.unreported = self.refusal.clone();
                }
            }
            Outcome::Aborted(entry) => self.abort(entry),
            Outcome::Kept => {}
            Outcome::Answered(_) => return Err(unexpected(sequence, None)),
            Outcome::Unexpected { due } => return Err(unexpected(sequence, due)),
        }
        for entry in self.window.settle() {
            self.abort(entry);
        }
        Ok(())
    }

    /// Whether the tenant has used up its tokens of now: then the frame's turn comes, and it waits as
    /// long as it takes.
    fn is_slowed(&mut self, error: &v1::FrameError) -> bool {
        let rate = error.quota.as_ref().filter(|quota| quota.quota == RATE_QUOTA);
        let (Some(quota), 1..) = (rate, error.retry_after_millis) else { return false };
        let delay = Duration::from_millis(error.retry_after_millis.into());
        self.slowed += delay;
        // A shorter one is what training is like now: it ends with its step.
        if delay >= SLOWED {
            self.put_off.get_or_insert_with(|| self.client.link().wait());
        }
        self.retry_at = Some(Instant::now() + delay);
        if self.slowed >= SLOWED && self.client.tells_of_rate() {
            tracing::warn!(
                "the server lets this tenant send {} tokens per second ({RATE_QUOTA}), and that is what training waits for now",
                quota.limit,
            );
        }
        true
    }

    /// Whether a refusal with this hint is waited out; if so, sets the time to try again.
    fn will_wait(&mut self, retry_after_millis: u32) -> bool {
        if retry_after_millis == 0 {
            return false;
        }
        let now = Instant::now();
        let retry_at = now + Duration::from_millis(retry_after_millis.into());
        let since = *self.refused_since.get_or_insert(now);
        let waits = retry_at - since <= self.client.options().retry.max_elapsed;
        if waits {
            self.put_off.get_or_insert_with(|| self.client.link().wait());
            self.retry_at = Some(retry_at);
        }
        waits
    }

    /// Tells the caller that an earlier frame was refused.
    fn abort(&mut self, entry: Entry<Reply>) {
        let earlier = self.refusal.clone().unwrap_or(ClientError::Closed);
        let error = aborted(entry.call(), earlier);
        entry.reply.span.failed(&error);
        if entry.reply.to.send(Err(error)).is_ok() {
            self.unreported = None;
        }
    }

    /// The session cannot go on: every call gets the error, until nobody can call any more.
    async fn end(mut self, error: ClientError) {
        if !matches!(error, ClientError::Closed) {
            // Every caller gets it, and says what it means to them.
            tracing::debug!(session = %self.id, %error, "the session has ended");
        }
        for entry in self.window.drain() {
            let _ = entry.reply.to.send(Err(error.clone()));
        }
        if let Some(reply) = self.settling.take() {
            let _ = reply.send(Err(error.clone()));
        }
        while let Some(command) = self.commands.recv().await {
            let _ = match command {
                Command::Send { reply, .. } => reply.send(Err(error.clone())).is_err(),
                Command::Settle { reply } => reply.send(Err(error.clone())).is_err(),
                Command::Look | Command::Reattach => false,
            };
        }
    }
}

impl From<Failed> for End {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Broken(why) => End::Broken(why),
            Failed::Drains(why) => End::Drains(why),
            Failed::Refused(error) => End::Fatal(error),
        }
    }
}

/// Never, without a time.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn aborted(call: &'static str, earlier: ClientError) -> ClientError {
    ClientError::Aborted { call, earlier: Box::new(earlier) }
}

fn protocol(what: String) -> End {
    End::Fatal(ClientError::Protocol { what })
}

fn unexpected(sequence: u64, due: Option<u64>) -> End {
    protocol(match due {
        Some(due) => format!("the answer to frame {due} was due, one to {sequence} came"),
        None => format!("an answer to frame {sequence} came, and no frame waits for one"),
    })
}
