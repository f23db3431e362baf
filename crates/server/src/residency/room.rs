//! The loop that lets sessions in: it serves those who ask for room in their order, and asks idle
//! sessions to leave. While nobody waits it looks now and then who has been idle for too long.

use super::Residency;
use super::list::List;
use super::policy::{Ages, Tier, idle, make_room};
use crate::engine::EngineClient;
use crate::error::Error;
use crate::faults::Fault;
use crate::ledger::{BytesKind, Ledger, Reservation, Shortage};
use crate::registry::Slots;
use crate::session::{DRAIN_RETRY, Leave, SessionId};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};

/// So many leave at a time: each is copied on its way, and disks gain little from more.
const MAX_LEAVING: usize = 4;
/// A session that was in use after all is asked again after so long.
pub(super) const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// One that could not be written, after so long.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

/// How often it looks at least.
const TICK: Duration = Duration::from_secs(2);
/// Less freed memory than this stays with the process, whose next tensors want it.
const LEAST_SLACK: u64 = 32 << 20;
/// How long, at least, freed memory was not wanted again before it goes back to the system.
const SLACK_AGE: Duration = Duration::from_secs(10);

/// Somebody wants room.
pub(super) struct Request {
    bytes: u64,
    deadline: Instant,
    reply: oneshot::Sender<Result<Reservation, Error>>,
    counted: Counted,
}

/// Counts a request until it is answered or given up.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Request {
    pub fn new(
        bytes: u64,
        deadline: Instant,
        reply: oneshot::Sender<Result<Reservation, Error>>,
        n_waiting: &Arc<AtomicUsize>,
    ) -> Self {
        n_waiting.fetch_add(1, Ordering::Relaxed);
        Request { bytes, deadline, reply, counted: Counted(n_waiting.clone()) }
    }
}

struct Room {
    ledger: Ledger,
    host: Ledger,
    list: Arc<List>,
    slots: Arc<Slots>,
    ages: Ages,
    /// How long a refused request should stay away.
    retry_after: Duration,
    /// In the order of their coming, which is also that of their deadlines.
    queue: VecDeque<Request>,
    /// What the engine needs for its work, until it fits.
    work: u64,
    /// When freed memory was last looked for, on the list's clock.
    slack_seen: Duration,
    /// What a session that goes to disk would have needed of the host's memory, until it fits.
    host_need: u64,
    leaving: JoinSet<(SessionId, Result<(), Error>)>,
    draining: Arc<AtomicBool>,
    engine: EngineClient,
}

/// Runs until the residency is dropped.
pub(super) fn keep(
    residency: &Arc<Residency>,
    slots: Arc<Slots>,
    mut asked: mpsc::Receiver<Request>,
) -> impl Future<Output = ()> + Send + use<> {
    let mut room = Room {
        ledger: residency.engine.ledger().clone(),
        host: residency.host.clone(),
        list: residency.list.clone(),
        slots,
        ages: residency.ages,
        retry_after: (residency.wait / 4).clamp(Duration::from_millis(100), Duration::from_secs(5)),
        queue: VecDeque::new(),
        work: 0,
        host_need: 0,
        slack_seen: Duration::ZERO,
        leaving: JoinSet::new(),
        draining: residency.draining.clone(),
        engine: residency.engine.clone(),
    };
    let quiet: Arc<Notify> = residency.quiet.clone();
    let (ledger, host) = (room.ledger.clone(), room.host.clone());
    async move {
        loop {
            // Made before the look, so that nothing that happens after it is missed.
            let (freed, has_quiet) = (ledger.freed(), quiet.clone().notified_owned());
            let looked = catch_unwind(AssertUnwindSafe(|| room.look()));
            let again = looked.unwrap_or_else(|_| room.start_anew());
            let waits = room.waits();
            tokio::select! {
                request = asked.recv() => match request {
                    Some(request) => room.queue.push_back(request),
                    None => return,
                },
                need = ledger.pressed() => room.work = room.work.max(need),
                need = host.pressed() => room.host_need = room.host_need.max(need),
                Some(left) = room.leaving.join_next() => room.left(left),
                () = freed, if waits => {}
                () = has_quiet, if waits => {}
                () = tokio::time::sleep_until(again.into()) => {}
            }
        }
    }
}

impl Room {
    fn waits(&self) -> bool {
        !self.queue.is_empty() || self.work > 0 || self.host_need > 0
    }

    /// After a panic: those who wait are told, and all others are served.
    fn start_anew(&mut self) -> Instant {
        tracing::error!(refused = self.queue.len(), "the keeper of room failed and goes on");
        for Request { reply, .. } in self.queue.drain(..) {
            let _ = reply.send(Err(Error::Gone { part: "keeper of room" }));
        }
        (self.work, self.host_need) = (0, 0);
        Instant::now() + BUSY_PAUSE
    }

    /// Does all that can be done now. When to look again, even if nothing happens.
    fn look(&mut self) -> Instant {
        self.engine.stats().faults.pass(Fault::Keeper);
        self.serve();
        let missing = |ledger: &Ledger, kind, need| ledger.missing(kind, need);
        let asked = self.queue.front().map_or(0, |head| head.bytes);
        let asked = missing(&self.ledger, BytesKind::Adapters, asked);
        let worked = missing(&self.ledger, BytesKind::Workspace, self.work);
        let hosted = missing(&self.host, BytesKind::Adapters, self.host_need);
        self.work = if worked > 0 { self.work } else { 0 };
        self.host_need = if hosted > 0 { self.host_need } else { 0 };

        let (all, now, ages) = (self.list.all(), self.list.now(), self.ages);
        // One list, from the most urgent on.
        let choices = [
            make_room(&all, Tier::Device, asked.max(worked), now, ages),
            make_room(&all, Tier::Host, hosted, now, ages),
            idle(&all, now, ages),
        ];
        for &id in choices.iter().flat_map(|choice| &choice.leave) {
            self.ask_to_leave(id);
        }
        self.return_freed_memory(now);
        // Not once for each of many sessions that become idle one after the other.
        let idle = |again: Duration| again.max(now + (ages.idle / 20).min(TICK));
        let [device, host, idle] = [choices[0].again, choices[1].again, choices[2].again.map(idle)];
        let again = [device, host, idle].into_iter().flatten().fold(now + TICK, Duration::min);
        let again = self.list.instant(again);
        let deadline = self.queue.front().map(|head| head.deadline);
        let far = || Instant::now() + Duration::from_secs(3600);
        again.into_iter().chain(deadline).min().unwrap_or_else(far)
    }

    /// The allocator keeps what is freed; what nobody has wanted for a while goes back to the system. Once:
    /// memory that is given back and wanted again begins with page faults, in every step.
    fn return_freed_memory(&mut self, now: Duration) {
        if now < self.slack_seen + SLACK_AGE {
            return;
        }
        self.slack_seen = now;
        let bytes = self.ledger.take_slack(LEAST_SLACK);
        if bytes > 0 {
            tracing::debug!(bytes, "freed memory goes back to the system");
            tokio::task::spawn_blocking(offshoot_model::allocator::return_freed_memory);
        }
    }

    /// Lets in who fits, and refuses who has waited for too long.
    fn serve(&mut self) {
        while let Some(head) = self.queue.pop_front() {
            if head.reply.is_closed() {
                continue;
            }
            let answer = match self.ledger.reserve(BytesKind::Adapters, head.bytes) {
                Ok(reserved) => Ok(reserved),
                Err(shortage) => match self.refusal(&head, shortage) {
                    Some(error) => Err(error),
                    None => return self.queue.push_front(head),
                },
            };
            let Request { reply, counted, .. } = head;
            drop(counted);
            // Who has given up drops what it got.
            let _ = reply.send(answer);
        }
    }

    fn refusal(&self, head: &Request, shortage: Shortage) -> Option<Error> {
        if self.draining.load(Ordering::Relaxed) {
            return Some(Error::Draining { retry_after: DRAIN_RETRY });
        }
        let most = self.ledger.most(BytesKind::Adapters);
        if most.is_some_and(|most| head.bytes > most) {
            return Some(Error::NoRoom { shortage, retry_after: None });
        }
        let over = Instant::now() >= head.deadline;
        over.then_some(Error::NoRoom { shortage, retry_after: Some(self.retry_after) })
    }

    fn ask_to_leave(&mut self, id: SessionId) {
        if self.leaving.len() < MAX_LEAVING {
            self.list.set_leaving(id);
            let slots = self.slots.clone();
            self.leaving.spawn(async move { (id, leave(slots, id).await) });
        }
    }

    fn left(&mut self, left: Result<(SessionId, Result<(), Error>), JoinError>) {
        match left {
            Ok((_, Ok(()))) => {}
            Ok((id, Err(Error::Busy))) => self.list.rest(id, BUSY_PAUSE),
            Ok((id, Err(error))) => {
                tracing::warn!(session = %id, %error, "session could not leave the device");
                self.list.rest(id, FAILED_PAUSE);
            }
            Err(error) => tracing::error!(%error, "a session's leaving failed"),
        }
    }
}

/// Under the session's own lock, so that nothing else happens to it meanwhile but frames, which
/// wait.
pub(super) async fn leave(slots: Arc<Slots>, id: SessionId) -> Result<(), Error> {
    let held = slots.try_lock(id).ok_or(Error::Busy)?;
    let actor = held.live().ok_or(Error::Busy)?.actor;
    actor.send(Leave).await.map_err(|_| Error::Busy)?
}
