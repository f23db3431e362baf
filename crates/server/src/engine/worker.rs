use super::Stats;
use super::caches::{CacheLimits, Caches};
use super::command::{Command, DiscardResult, DropCacheResult, FrameWork, Job};
use super::outcome::{answer, caught, send};
use super::slot::Slot;
use super::tapes::Tapes;
use crate::error::Error;
use crate::faults::Fault;
use crate::ledger::Ledger;
use crate::metrics::{JobKind, Ran};
use crate::scheduler::{Batch, Budget, Kind, LaneId, Scheduler, Taken};
use offshoot_model::Part;
use offshoot_proto::WireDType;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the worker allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct WorkerLimits {
    /// How long a forward waits for room.
    pub admission_wait: Duration,
    pub caches: CacheLimits,
}

/// The engine thread's state. One owner, plain values, no locks.
pub(super) struct Worker {
    pub part: Part,
    pub slots: HashMap<LaneId, Slot>,
    pub tapes: Tapes,
    pub caches: Caches,
    pub ledger: Ledger,
    /// How long a forward waits for room.
    pub admission_wait: Duration,
    pub stats: Arc<Stats>,
    /// Rows beyond which a pass runs out of memory.
    #[cfg(test)]
    pub row_limit: Option<i64>,
}

impl Worker {
    pub(super) fn new(part: Part, ledger: Ledger, stats: Arc<Stats>, limits: WorkerLimits) -> Self {
        let WorkerLimits { admission_wait, caches } = limits;
        Worker {
            part,
            slots: HashMap::new(),
            tapes: Tapes::new(ledger.clone()),
            caches: Caches::new(ledger.clone(), caches),
            ledger,
            admission_wait,
            stats,
            #[cfg(test)]
            row_limit: None,
        }
    }

    /// Until the scheduler is closed and empty.
    pub(super) fn run(mut self, scheduler: &Scheduler<Job>, budget: Budget) {
        // A guard, since `tch::no_grad` does not survive a caught panic.
        let _no_grad = tch::no_grad_guard();
        self.count();
        while let Some(batch) = scheduler.take(budget) {
            self.stats.faults.pass(Fault::Engine);
            self.stats.begin_turn(batch.kind);
            self.turn(batch, scheduler);
            self.stats.end_turn();
        }
    }

    fn turn(&mut self, batch: Batch<Job>, scheduler: &Scheduler<Job>) {
        match batch.kind {
            Kind::Forward => self.run_forwards(batch.jobs, scheduler),
            Kind::Backward => self.run_backwards(batch.jobs, scheduler),
            Kind::Control => batch.jobs.into_iter().for_each(|t| self.control(t, scheduler)),
        }
        self.count();
    }

    /// Tells what is there. Also before an answer, so that who has it finds it told.
    pub(super) fn count(&self) {
        self.stats.set(&self.stats.n_sessions, self.slots.len() as u64);
        self.stats.set(&self.stats.n_tapes, self.tapes.len() as u64);
        self.stats.set(&self.stats.n_caches, self.caches.len() as u64);
    }

    /// What touches one session and no base weights.
    fn control(&mut self, taken: Taken<Job>, scheduler: &Scheduler<Job>) {
        let Taken { lane, mut entry, .. } = taken;
        entry.job.spans.run_alone(entry.job.command.span_name());
        let _span = entry.job.spans.asked().enter();
        let (came, began, kind) = (entry.since, Instant::now(), entry.job.command.job_kind());
        match entry.job.command {
            Command::Release { gone } => {
                drop(self.slots.remove(&lane));
                self.tapes.forget(lane);
                self.caches.forget(lane);
                self.tapes.settle(&self.part);
                drop(scheduler.forget(lane));
                scheduler.let_go();
                self.count();
                drop(gone);
            }
            Command::Admit { plan, account, reply } => {
                answer(reply, "admission", || {
                    let slot = Slot::new(&self.part, *plan, account)?;
                    let admitted = slot.admitted();
                    self.slots.insert(lane, slot);
                    Ok(admitted)
                });
            }
            Command::Frame { sequence, work } => match work {
                FrameWork::Step { work, reply } => {
                    let faults = self.stats.clone();
                    let result = self.check_order(lane, sequence).and_then(|()| {
                        let slot = self.slot(lane)?;
                        let result = caught("Step", || {
                            faults.faults.pass(Fault::Step);
                            slot.step(&work)
                        })?;
                        slot.applied = sequence;
                        // They are of older weights now.
                        self.caches.forget(lane);
                        self.count();
                        self.count_control(lane, (came, began), kind);
                        if let Some(slot) = self.slots.get_mut(&lane) {
                            slot.stepped(work.shared_loss);
                        }
                        Ok(result)
                    });
                    send(reply, result);
                    scheduler.let_go();
                }
                FrameWork::Discard { microbatch, reply } => {
                    let result = self.check_order(lane, sequence).map(|()| {
                        drop(self.tapes.close((lane, microbatch)));
                        self.tapes.settle(&self.part);
                        self.set_applied(lane, sequence);
                        scheduler.let_go();
                        DiscardResult
                    });
                    send(reply, result);
                }
                FrameWork::DropCache { cache, reply } => {
                    let result = self.check_order(lane, sequence).map(|()| {
                        self.caches.drop_one((lane, cache));
                        self.count();
                        self.set_applied(lane, sequence);
                        scheduler.let_go();
                        DropCacheResult
                    });
                    send(reply, result);
                }
                FrameWork::Forward { .. }
                | FrameWork::Extend { .. }
                | FrameWork::Backward { .. } => unreachable!("they are no control jobs"),
            },
            Command::ToState { reply } => {
                let state = caught("snapshot copy", || Ok(self.slot(lane)?.adapters.to_state()));
                self.count_control(lane, (came, began), kind);
                send(reply, state);
            }
            Command::Export { gradients, reply } => {
                let exported = caught("export", || Ok(self.slot(lane)?.export(gradients)));
                self.count_control(lane, (came, began), kind);
                send(reply, exported);
            }
        }
    }

    /// A job that ran alone, and has just ended, is its session's use of the device.
    fn count_control(&mut self, lane: LaneId, (came, began): (Instant, Instant), kind: JobKind) {
        let Some(slot) = self.slots.get_mut(&lane) else { return };
        let (queue, execute) = (began.saturating_duration_since(came), began.elapsed());
        slot.ran(came, began, Ran { kind, n_tokens: 0, queue, execute, share: execute });
    }

    fn slot(&mut self, lane: LaneId) -> Result<&mut Slot, Error> {
        let slot = self.slots.get_mut(&lane).ok_or(Error::Gone { part: "session" })?;
        slot.check().map(|()| slot)
    }

    /// Whether a frame is the next one of its session.
    pub(super) fn check_order(&self, lane: LaneId, sequence: u64) -> Result<(), Error> {
        let slot = self.slots.get(&lane).ok_or(Error::Gone { part: "session" })?;
        slot.check()?;
        let expected = slot.applied + 1;
        if sequence == expected { Ok(()) } else { Err(Error::Gap { found: sequence, expected }) }
    }

    pub(super) fn set_applied(&mut self, lane: LaneId, sequence: u64) {
        if let Some(slot) = self.slots.get_mut(&lane) {
            slot.applied = sequence;
        }
    }

    /// What one backward's gradient `[P]` of a session takes until it is accumulated.
    pub(super) fn gradient_bytes(&self, lane: LaneId) -> u64 {
        self.slots.get(&lane).map_or(0, |slot| 4 * slot.adapters.n_parameters() as u64)
    }

    /// Of a session that was found to be here.
    pub(super) fn wire_dtype(&self, lane: LaneId) -> WireDType {
        self.slots.get(&lane).map_or(WireDType::F32, |slot| slot.wire_dtype)
    }

    /// In tests a pass over too many rows asks libtorch for memory that no machine has.
    pub(super) fn injected_limit(&self, n_rows: i64) {
        #[cfg(test)]
        if self.row_limit.is_some_and(|limit| n_rows > limit) {
            drop(tch::Tensor::empty([1 << 55], (tch::Kind::Float, tch::Device::Cpu)));
        }
        #[cfg(not(test))]
        let _ = n_rows;
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
