use super::command::{
    Admitted, BackwardResult, Command, Exported, ForwardResult, FrameWork, Job, Plan, Reply, Start,
    StepResult, Times,
};
use super::{Stats, wire};
use crate::error::Error;
use crate::scheduler::{Budget, LaneId, Scheduler, Taken};
use crate::session::{BackwardWork, ForwardWork, Mode, StepWork};
use offshoot_adapters::{AdamW, AdapterSet};
use offshoot_model::{DropoutKey, Part, Rows, Segment, Tape};
use offshoot_proto::{HostTensor, WireDType};
use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// The engine thread's state. One owner, plain values, no locks.
pub(super) struct Worker {
    part: Part,
    slots: HashMap<LaneId, Slot>,
    stats: Arc<Stats>,
}

/// What one session has on the device.
struct Slot {
    adapters: AdapterSet,
    adamw: AdamW,
    seed: u64,
    wire_dtype: WireDType,
    /// The last frame that ran. Only the next one may run: what stands behind a refused frame in
    /// the queue is refused here.
    applied: u64,
    tapes: HashMap<u64, OpenTape>,
    /// The adapter set was being changed. Still true at the next job if that panicked.
    changing: bool,
}

/// An open microbatch.
struct OpenTape {
    tape: Tape,
    bytes: u64,
    rows: Rows,
    dropout: Option<DropoutKey>,
    want_input_grad: bool,
}

impl Worker {
    pub(super) fn new(part: Part, stats: Arc<Stats>) -> Self {
        Worker { part, slots: HashMap::new(), stats }
    }

    /// Until the scheduler is closed and empty.
    pub(super) fn run(mut self, scheduler: &Scheduler<Job>, budget: Budget) {
        // A guard, since `tch::no_grad` does not survive a caught panic.
        let _no_grad = tch::no_grad_guard();
        while let Some(batch) = scheduler.take(budget) {
            // One after the other; the batch is what a packed pass over all of them will take.
            for taken in batch.jobs {
                let lane = taken.lane;
                let released = matches!(taken.job.command, Command::Release);
                self.execute(taken);
                if released {
                    offshoot_model::allocator::return_freed_memory();
                    scheduler.forget(lane);
                }
                self.count();
            }
        }
    }

    fn execute(&mut self, taken: Taken<Job>) {
        let Taken { lane, job, waited } = taken;
        let _span = job.span.enter();
        match job.command {
            Command::Release => drop(self.slots.remove(&lane)),
            Command::Admit { plan, reply } => {
                answer(reply, "admission", || self.admit(lane, *plan));
            }
            Command::Frame { sequence, work } => self.frame(lane, sequence, work, waited),
            Command::ToState { reply } => {
                answer(reply, "snapshot copy", || Ok(self.slot(lane)?.adapters.to_state()));
            }
            Command::Export { gradients, reply } => {
                answer(reply, "export", || Ok(export(&self.slot(lane)?.adapters, gradients)));
            }
        }
    }

    fn frame(&mut self, lane: LaneId, sequence: u64, work: FrameWork, waited: Duration) {
        let Worker { part, slots, .. } = self;
        let slot = slots.get_mut(&lane).ok_or(Error::Gone { part: "session" });
        let slot = slot.and_then(|slot| slot.is_next(sequence).map(|()| slot));
        let done = match (work, slot) {
            (FrameWork::Forward { work, reply }, Ok(slot)) => {
                answer(reply, "Forward", || slot.forward(part, &work, waited))
            }
            (FrameWork::Backward { work, reply }, Ok(slot)) => {
                answer(reply, "Backward", || slot.backward(part, &work, waited))
            }
            (FrameWork::Step { work, reply }, Ok(slot)) => {
                answer(reply, "Step", || slot.step(&work))
            }
            (FrameWork::Forward { reply, .. }, Err(error)) => refuse(reply, error),
            (FrameWork::Backward { reply, .. }, Err(error)) => refuse(reply, error),
            (FrameWork::Step { reply, .. }, Err(error)) => refuse(reply, error),
        };
        if done && let Some(slot) = self.slots.get_mut(&lane) {
            slot.applied = sequence;
        }
    }

    fn slot(&mut self, lane: LaneId) -> Result<&mut Slot, Error> {
        let slot = self.slots.get_mut(&lane).ok_or(Error::Gone { part: "session" })?;
        if slot.changing { Err(Error::Poisoned) } else { Ok(slot) }
    }

    fn admit(&mut self, lane: LaneId, plan: Plan) -> Result<Admitted, Error> {
        let Plan { lora, adamw, seed, wire_dtype, start } = plan;
        let (sites, device) = (self.part.sites(&lora.target_modules)?, self.part.device());
        let (adapters, applied) = match start {
            Start::Fresh => (AdapterSet::init(lora, sites, seed, device)?, 0),
            Start::Given(tensors) => {
                let mut adapters = AdapterSet::init(lora, sites, seed, device)?;
                let upload = |(name, tensor): (String, HostTensor)| {
                    (name, wire::upload(&tensor, tch::Kind::Float, Device::Cpu))
                };
                adapters.load_named(&tensors.into_iter().map(upload).collect::<Vec<_>>())?;
                (adapters, 0)
            }
            Start::State { state, applied } => {
                (AdapterSet::from_state(lora, sites, state, device)?, applied)
            }
        };
        let admitted = Admitted {
            n_parameters: adapters.n_parameters() as u64,
            bytes: adapters.bytes(),
            step: adapters.n_steps(),
        };
        let tapes = HashMap::new();
        let slot = Slot { adapters, adamw, seed, wire_dtype, applied, tapes, changing: false };
        self.slots.insert(lane, slot);
        Ok(admitted)
    }

    fn count(&self) {
        let stats = &self.stats;
        let tapes = || self.slots.values().flat_map(|slot| slot.tapes.values());
        let adapter_bytes = self.slots.values().map(|slot| slot.adapters.bytes()).sum();
        stats.set(&stats.adapter_bytes, adapter_bytes);
        stats.set(&stats.tape_bytes, tapes().map(|open| open.bytes).sum());
        stats.set(&stats.n_tapes, tapes().count() as u64);
        stats.set(&stats.n_sessions, self.slots.len() as u64);
    }
}

impl Slot {
    fn is_next(&self, sequence: u64) -> Result<(), Error> {
        if self.changing {
            return Err(Error::Poisoned);
        }
        let expected = self.applied + 1;
        if sequence == expected { Ok(()) } else { Err(Error::Gap { found: sequence, expected }) }
    }

    fn forward(
        &mut self,
        part: &Part,
        work: &ForwardWork,
        queue: Duration,
    ) -> Result<ForwardResult, Error> {
        let begun = Instant::now();
        let x = wire::upload(&work.hidden, part.kind(), part.device());
        let rows = Rows::new(&work.seq_lens, work.position_ids.as_deref(), part.device());
        let train = work.mode == Mode::Train;
        let drops = train && self.adapters.spec().lora_dropout > 0.0;
        let key = DropoutKey { seed: self.seed, microbatch: work.dropout_key };
        let dropout = drops.then_some(key);
        let segment = Segment { rows: 0..rows.n_tokens(), adapter: Some(&self.adapters), dropout };
        let (y, tape) = if train {
            let (y, tape) = part.forward_train(&x, &rows, &segment);
            (y, Some(tape))
        } else {
            (part.forward_eval(&x, &rows, &[segment]), None)
        };
        let hidden = wire::download(&y, self.wire_dtype);
        if crate::finite::first_bad(&hidden).is_some() {
            return Err(Error::Overflow { what: "output" });
        }
        let tape_bytes = tape.as_ref().map_or(0, Tape::bytes);
        if let Some(tape) = tape {
            let want_input_grad = work.want_input_grad;
            let open = OpenTape { tape, bytes: tape_bytes, rows, dropout, want_input_grad };
            self.tapes.insert(work.microbatch, open);
        }
        Ok(ForwardResult { hidden, tape_bytes, times: Times { queue, execute: begun.elapsed() } })
    }

    fn backward(
        &mut self,
        part: &Part,
        work: &BackwardWork,
        queue: Duration,
    ) -> Result<BackwardResult, Error> {
        let begun = Instant::now();
        let microbatch = work.microbatch;
        let n_tokens = self.tapes.get(&microbatch).map(|open| open.rows.n_tokens() as usize);
        let n_tokens = n_tokens.ok_or(Error::NoTape { microbatch })?;
        let found = work.grad.shape();
        if found[0] != n_tokens {
            let expected = format!("[{n_tokens}, {}], as its Forward had", found[1]);
            return Err(Error::Shape { field: "grad", found: found.to_vec(), expected });
        }
        let open = self.tapes.remove(&microbatch).ok_or(Error::NoTape { microbatch })?;
        // The tape is used up, whatever comes of it.
        let run = AssertUnwindSafe(|| self.gradients(part, open, &work.grad));
        let (grad, lora) = match catch_unwind(run) {
            Ok(Ok(gradients)) => gradients,
            Ok(Err(error)) => return Ok(BackwardResult::Lost(error)),
            Err(panic) => return Ok(BackwardResult::Lost(panicked("Backward", &*panic))),
        };
        self.changing = true;
        self.adapters.accumulate(&lora);
        self.changing = false;
        let grad_norm_squared = self.adapters.grad_norm_squared();
        let times = Times { queue, execute: begun.elapsed() };
        Ok(BackwardResult::Done { grad, grad_norm_squared, times })
    }

    /// The gradient for the client and that of the adapter `[P]`, both finite.
    fn gradients(
        &self,
        part: &Part,
        open: OpenTape,
        grad: &HostTensor,
    ) -> Result<(Option<HostTensor>, Tensor), Error> {
        let OpenTape { tape, rows, dropout, want_input_grad, .. } = open;
        let grad = wire::upload(grad, part.kind(), part.device());
        let segment = Segment { rows: 0..rows.n_tokens(), adapter: Some(&self.adapters), dropout };
        let mut back = part.backward(&[&tape], &grad, &rows, &[segment], want_input_grad);
        let input = back.input.map(|input| wire::download(&input, self.wire_dtype));
        if input.as_ref().and_then(crate::finite::first_bad).is_some() {
            return Err(Error::Overflow { what: "gradient by its input" });
        }
        let lora = back.lora.swap_remove(0);
        // What overflows when squared cannot be clipped by its norm either.
        if !lora.dot(&lora).double_value(&[]).is_finite() {
            return Err(Error::Overflow { what: "LoRA gradient" });
        }
        Ok((input, lora))
    }

    fn step(&mut self, work: &StepWork) -> Result<StepResult, Error> {
        self.changing = true;
        self.adapters.step(&self.adamw, work.learning_rate, work.clip_factor);
        self.changing = false;
        Ok(StepResult { step: self.adapters.n_steps() })
    }
}

fn export(adapters: &AdapterSet, gradients: bool) -> Exported {
    let host = |named: Vec<(String, Tensor)>| {
        let f32 = |(name, tensor)| (name, wire::download(&tensor, WireDType::F32));
        named.into_iter().map(f32).collect()
    };
    Exported {
        tensors: host(adapters.named_tensors()),
        gradients: if gradients { host(adapters.named_gradients()) } else { Vec::new() },
        step: adapters.n_steps(),
    }
}

/// Runs a job and sends what comes of it, be it a panic. Whether it was done.
fn answer<T: Outcome>(
    reply: Reply<T>,
    job: &'static str,
    run: impl FnOnce() -> Result<T, Error>,
) -> bool {
    let result = catch_unwind(AssertUnwindSafe(run));
    let result = result.unwrap_or_else(|panic| Err(panicked(job, &*panic)));
    let done = result.as_ref().is_ok_and(T::is_done);
    // Nobody waits any more if the session ended meanwhile.
    let _ = reply.send(result);
    done
}

fn refuse<T>(reply: Reply<T>, error: Error) -> bool {
    let _ = reply.send(Err(error));
    false
}

fn panicked(job: &'static str, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
    // libtorch appends its C++ stack.
    let text = text.lines().next().unwrap_or_default();
    tracing::error!(job, panic = text, "a job panicked");
    Error::Panic { job, panic: text.into() }
}

/// Whether a result means that its frame was applied.
trait Outcome {
    fn is_done(&self) -> bool {
        true
    }
}

impl Outcome for Admitted {}
impl Outcome for Exported {}
impl Outcome for ForwardResult {}
impl Outcome for StepResult {}
impl Outcome for offshoot_adapters::AdapterState {}
impl Outcome for BackwardResult {
    fn is_done(&self) -> bool {
        matches!(self, BackwardResult::Done { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[test]
    fn a_panic_is_that_jobs_answer() {
        let (reply, result) = oneshot::channel();
        let done = answer(reply, "Step", || -> Result<StepResult, Error> {
            let shape = [1, 2];
            panic!("no such dimension in {shape:?}\nC++ stack");
        });
        assert!(!done);
        let error = result.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error.label(), "panic");
        let text = error.to_string();
        assert!(text.contains("no such dimension in [1, 2]") && !text.contains("C++"), "{text}");
    }
}
