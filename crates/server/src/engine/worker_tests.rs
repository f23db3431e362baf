//! Batches over the tiny llama, without threads: what is in the queue, the test takes and runs.

use super::*;
use crate::engine::{BackwardResult, ForwardResult, Plan, Reply, Settings, Start};
use crate::ledger::BytesKind;
use crate::quota::Accounts;
use crate::scheduler::{OwnerId, Share};
use crate::session::{BackwardWork, ForwardWork, Mode, StepWork};
use crate::trace::JobSpans;
use offshoot_adapters::{AdamW, AdapterState, LoraSpec};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{LoraMode, ModelConfig, PartSpec, TapeSize, Work};
use offshoot_proto::HostTensor;
use std::path::Path;
use tch::{Device, Kind as DType};
use tokio::sync::oneshot;

#[path = "caches_tests.rs"]
mod caches;

/// Never over but where a test says so.
const IDLE: Duration = Duration::from_secs(3600);
const BUDGET: Budget = Budget { n_tokens: 1000, wait: Duration::ZERO };

struct Rig {
    worker: Worker,
    accounts: Accounts,
    scheduler: Scheduler<Job>,
    hidden_size: usize,
    /// Next frame of each session.
    sequences: HashMap<u64, u64>,
}

type Forwarded = oneshot::Receiver<Result<ForwardResult, Error>>;
type Backwarded = oneshot::Receiver<Result<BackwardResult, Error>>;

fn rig(budget: Option<u64>) -> Rig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let spec = PartSpec { layers: 1..3, embed: false, head: false };
    let part = Part::load(&checkpoint, &config, spec, DType::Float, Device::Cpu).unwrap();
    let ledger = Ledger::new(budget);
    let caches = CacheLimits { max_open: 2, max_tokens: 600, idle: IDLE };
    let limits = WorkerLimits { admission_wait: Duration::from_secs(3600), caches };
    let worker = Worker::new(part, ledger, Arc::default(), limits);
    let hidden_size = config.hidden_size as usize;
    let (scheduler, accounts) = (Scheduler::new(100), Accounts::default());
    Rig { worker, scheduler, accounts, hidden_size, sequences: HashMap::new() }
}

impl Rig {
    /// A session with a rank and a dropout of its own and an adapter that changes something.
    fn admit(&mut self, lane: u64) {
        self.admit_with(lane, |i| (i % 13) as f32 / 130.0 - 0.05);
    }

    /// In place of a session's adapter one of only this value.
    fn grow(&mut self, lane: u64, value: f32) {
        self.scheduler.forget(LaneId(lane));
        self.admit_with(lane, |_| value);
    }

    fn admit_with(&mut self, lane: u64, parameter: impl Fn(usize) -> f32) {
        let rank = 1 + lane as usize;
        let lora = LoraSpec {
            r: rank,
            lora_dropout: if lane % 2 == 1 { 0.2 } else { 0.0 },
            target_modules: vec!["all-linear".into()],
            ..LoraSpec::default()
        };
        let sites = self.worker.part.sites(&lora.target_modules).unwrap();
        let n: usize = sites.iter().map(|s| rank * (s.d_in + s.d_out) as usize).sum();
        let zeros = vec![0.0; n];
        let state = AdapterState {
            parameters: (0..n).map(|i| parameter(i * 7 + rank)).collect(),
            gradients: zeros.clone(),
            first_moments: zeros.clone(),
            second_moments: zeros,
            n_steps: 0,
        };
        let plan = Plan {
            settings: Settings {
                tenant: "".into(),
                lora,
                adamw: AdamW::default(),
                seed: lane,
                wire_dtype: WireDType::F32,
            },
            start: Start::State { state: std::sync::Arc::new(state), applied: 0 },
            reserved: self.worker.ledger.count(BytesKind::Adapters, 16 * n as u64),
            meter: Default::default(),
        };
        let lane = LaneId(lane);
        self.scheduler.open(lane, Share { owner: OwnerId(lane.0), weight: 1 });
        // One for all sessions, as on an open server.
        let account = self.accounts.of("");
        let slot = Slot::new(&self.worker.part, plan, account).unwrap();
        self.worker.slots.insert(lane, slot);
    }

    fn tensor(&self, seed: u64, n_tokens: usize) -> HostTensor {
        let n = n_tokens * self.hidden_size;
        let values = (0..n).map(|i| ((i as u64 * 31 + seed * 17) % 29) as f32 / 29.0 - 0.5);
        let values: Vec<f32> = values.collect();
        HostTensor::from_f32(&values, vec![n_tokens, self.hidden_size], WireDType::F32)
    }

    fn submit(&mut self, lane: u64, work: FrameWork) {
        let sequence = self.sequences.entry(lane).or_default();
        *sequence += 1;
        let command = Command::Frame { sequence: *sequence, work };
        let (kind, n_tokens) = (command.kind(), command.n_tokens());
        let job = Job { command, spans: JobSpans::none() };
        self.scheduler.submit(LaneId(lane), kind, n_tokens, job).unwrap();
    }

    fn forward(&mut self, lane: u64, n_tokens: usize, mode: Mode) -> Forwarded {
        let (reply, result) = oneshot::channel();
        let work = ForwardWork {
            microbatch: lane,
            hidden: self.tensor(lane, n_tokens),
            seq_lens: vec![n_tokens - 2, 2],
            position_ids: None,
            mode,
            want_input_grad: true,
            dropout_key: 5,
        };
        self.submit(lane, FrameWork::Forward { work: Box::new(work), reply });
        result
    }

    fn train(&mut self, lane: u64, n_tokens: usize) -> Forwarded {
        self.forward(lane, n_tokens, Mode::Train)
    }

    fn backward(&mut self, lane: u64, n_tokens: usize) -> Backwarded {
        let (reply, result) = oneshot::channel();
        let grad = self.tensor(lane + 50, n_tokens);
        let work = BackwardWork { microbatch: lane, grad };
        self.submit(lane, FrameWork::Backward { work: Box::new(work), reply });
        result
    }

    /// Runs the next batch.
    fn turn(&mut self) {
        let _no_grad = tch::no_grad_guard();
        let batch = self.scheduler.take(BUDGET).unwrap();
        self.worker.turn(batch, &self.scheduler);
    }

    fn sizes(&self, lanes: std::ops::Range<u64>) -> Vec<Option<TapeSize>> {
        let size = |lane| Some(self.worker.tapes.get((LaneId(lane), lane))?.tape.size());
        lanes.map(size).collect()
    }

    fn gradients(&self, lane: u64) -> Vec<f32> {
        self.worker.slots[&LaneId(lane)].adapters.to_state().gradients
    }
}

fn forwarded(result: Forwarded) -> Result<ForwardResult, Error> {
    result.blocking_recv().unwrap()
}

fn done(result: Backwarded) -> Vec<f32> {
    match result.blocking_recv().unwrap().unwrap() {
        BackwardResult::Done { grad: Some(grad), .. } => grad.to_f32(),
        other => panic!("{other:?}"),
    }
}

/// What a session gets that has the device for itself: output, input gradient, LoRA gradient.
fn alone(lane: u64, n_tokens: usize) -> [Vec<f32>; 3] {
    let mut rig = rig(None);
    rig.admit(lane);
    let output = rig.train(lane, n_tokens);
    rig.turn();
    let grad = rig.backward(lane, n_tokens);
    rig.turn();
    [forwarded(output).unwrap().hidden.to_f32(), done(grad), rig.gradients(lane)]
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert_eq!(found.len(), expected.len());
    assert!(apart <= 1e-5 * largest, "{what}: {apart} apart of {largest}");
}

#[test]
fn a_batch_equals_its_jobs_alone_whatever_its_company() {
    for mode in [LoraMode::Loop, LoraMode::Stacked] {
        let mut rig = rig(None);
        rig.worker.part.set_lora_mode(mode);
        (0..4).for_each(|lane| rig.admit(lane));
        // 0, 1 and an evaluation by 3 share a forward; 2 comes later.
        let mut outputs = vec![rig.train(0, 5), rig.train(1, 7)];
        let evaluation = rig.forward(3, 4, Mode::Eval);
        rig.turn();
        outputs.push(rig.train(2, 6));
        rig.turn();
        let evaluation = forwarded(evaluation).unwrap();
        assert_eq!((evaluation.times.n_jobs, evaluation.times.n_tokens), (3, 16));
        assert_eq!(evaluation.tape_bytes, 0);
        // The backward has another company, in another order.
        let grads = [2, 1, 0].map(|lane| rig.backward(lane, [5, 7, 6][lane as usize]));
        rig.turn();
        assert_eq!(rig.worker.tapes.len(), 0);
        let mut grads: Vec<Vec<f32>> = grads.into_iter().map(done).collect();
        grads.reverse();
        for (lane, (output, grad)) in outputs.into_iter().zip(grads).enumerate() {
            let expected = alone(lane as u64, [5, 7, 6][lane]);
            let output = forwarded(output).unwrap();
            assert_eq!(output.times.n_jobs, if lane == 2 { 1 } else { 3 });
            assert_close("output", &output.hidden.to_f32(), &expected[0]);
            assert_close("input gradient", &grad, &expected[1]);
            assert_close("gradient", &rig.gradients(lane as u64), &expected[2]);
        }
    }
}

#[test]
fn out_of_memory_in_a_batch_runs_its_jobs_alone() {
    let mut rig = rig(None);
    (0..4).for_each(|lane| rig.admit(lane));
    rig.worker.row_limit = Some(10);
    let outputs: Vec<_> = (0..3).map(|lane| rig.train(lane, 6)).collect();
    let too_large = rig.train(3, 12);
    rig.turn();
    let error = forwarded(too_large).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { job: "Forward" }), "{error}");
    let grads: Vec<_> = (0..3).map(|lane| rig.backward(lane, 6)).collect();
    rig.turn();
    for (lane, (output, grad)) in outputs.into_iter().zip(grads).enumerate() {
        let expected = alone(lane as u64, 6);
        assert_eq!(forwarded(output).unwrap().hidden.to_f32(), expected[0]);
        assert_eq!(done(grad), expected[1]);
        assert_eq!(rig.gradients(lane as u64), expected[2]);
    }
    // The refused frame took no number: a smaller one goes on.
    rig.sequences.insert(3, 0);
    let again = rig.train(3, 6);
    rig.turn();
    assert_eq!(forwarded(again).unwrap().hidden.to_f32(), alone(3, 6)[0]);
}

#[test]
fn values_that_overflow_stay_home() {
    for mode in [LoraMode::Loop, LoraMode::Stacked] {
        let mut rig = rig(None);
        rig.worker.part.set_lora_mode(mode);
        (0..3).for_each(|lane| rig.admit(lane));
        // Adapters that have grown without end: one holds infinity, one multiplies up to it.
        rig.grow(1, f32::INFINITY);
        rig.grow(2, 1e30);
        let good = rig.train(0, 5);
        let bad = [1, 2].map(|lane| rig.train(lane, 5));
        rig.turn();
        for bad in bad {
            let error = forwarded(bad).unwrap_err();
            assert!(matches!(error, Error::Overflow { .. }), "{error}");
        }
        assert_close("output", &forwarded(good).unwrap().hidden.to_f32(), &alone(0, 5)[0]);
        assert_eq!(rig.worker.tapes.len(), 1);
    }
}

#[test]
fn frames_behind_a_refused_one_are_refused() {
    let mut rig = rig(None);
    rig.admit(0);
    rig.worker.row_limit = Some(10);
    let (bad, behind) = (rig.forward(0, 12, Mode::Eval), rig.forward(0, 5, Mode::Eval));
    rig.turn();
    assert!(matches!(forwarded(bad), Err(Error::OutOfMemory { .. })));
    rig.turn();
    assert!(matches!(forwarded(behind), Err(Error::Gap { found: 2, expected: 1 })));
    assert_eq!(rig.worker.slots[&LaneId(0)].applied, 0);
}

/// What the adapters of all sessions take.
fn adapter_bytes(rig: &Rig) -> u64 {
    rig.worker.slots.values().map(|slot| slot.adapters.bytes()).sum()
}

/// The bytes of open microbatches of 6 tokens, all full but the last of this size.
fn room_for(rig: &Rig, n_full: u64, last: TapeSize) -> u64 {
    let part = &rig.worker.part;
    let gradient = 4 * rig.worker.slots[&LaneId(2)].adapters.n_parameters() as u64;
    let running = part.workspace_bytes(6, Work::Backward(TapeSize::Input)) + gradient;
    let tapes: u64 = (0..=n_full)
        .map(|lane| {
            let size = if lane == n_full { last } else { TapeSize::Full };
            part.tape_bytes(6, size, Some(&rig.worker.slots[&LaneId(lane)].adapters))
        })
        .sum();
    adapter_bytes(rig) + tapes + running.max(part.workspace_bytes(6, Work::Forward))
}

#[test]
fn tapes_shrink_under_pressure_and_give_the_same_gradients() {
    let mut free = rig(None);
    (0..3).for_each(|lane| free.admit(lane));
    let mut rig = rig(Some(room_for(&free, 1, TapeSize::Input)));
    (0..3).for_each(|lane| rig.admit(lane));
    let mut outputs = Vec::new();
    for lane in 0..3 {
        outputs.push(rig.train(lane, 6));
        rig.turn();
    }
    let sizes = rig.sizes(0..3);
    assert!(sizes.iter().all(Option::is_some), "{sizes:?}");
    assert!(sizes[0] < Some(TapeSize::Full), "{sizes:?}");
    let usage = rig.worker.ledger.usage();
    assert!(usage.now.total() <= usage.budget.unwrap(), "{usage:?}");
    let grads: Vec<_> = (0..3).map(|lane| rig.backward(lane, 6)).collect();
    // Together if there is room for it, else one after the other.
    while rig.worker.tapes.len() > 0 {
        rig.turn();
    }
    for (lane, (output, grad)) in outputs.into_iter().zip(grads).enumerate() {
        let expected = alone(lane as u64, 6);
        assert_close("output", &forwarded(output).unwrap().hidden.to_f32(), &expected[0]);
        assert_close("input gradient", &done(grad), &expected[1]);
        assert_close("gradient", &rig.gradients(lane as u64), &expected[2]);
    }
    assert_eq!(rig.worker.ledger.usage().now.total(), adapter_bytes(&rig));
}

#[test]
fn a_forward_without_room_waits_until_somebody_is_done() {
    let mut free = rig(None);
    (0..2).for_each(|lane| free.admit(lane));
    // Enough for one open microbatch of 120 tokens and nothing else.
    let part = &free.worker.part;
    let adapters = Some(&free.worker.slots[&LaneId(1)].adapters);
    let one = TapeSize::ALL.map(|size| {
        let running = part.workspace_bytes(120, Work::Forward);
        let gradient = 4 * free.worker.slots[&LaneId(1)].adapters.n_parameters() as u64;
        let standing = part.workspace_bytes(120, Work::Backward(size)) + gradient;
        part.tape_bytes(120, size, adapters) + running.max(standing)
    });
    let mut rig = rig(one.into_iter().min().map(|bytes| bytes + adapter_bytes(&free)));
    (0..2).for_each(|lane| rig.admit(lane));
    let first = rig.train(0, 60);
    rig.turn();
    let mut waits = rig.train(1, 120);
    rig.turn();
    let early = waits.try_recv();
    assert!(early.is_err(), "{:?}", early.map(|r| r.map(|done| done.tape_bytes)));
    // What the same session sends beside its open microbatch cannot wait for itself.
    let (reply, second) = oneshot::channel();
    let hidden = rig.tensor(9, 120);
    let work = ForwardWork {
        microbatch: 77,
        hidden,
        seq_lens: vec![120],
        position_ids: None,
        mode: Mode::Train,
        want_input_grad: true,
        dropout_key: 1,
    };
    rig.submit(0, FrameWork::Forward { work: Box::new(work), reply });
    rig.turn();
    let error = forwarded(second).unwrap_err();
    assert!(matches!(error, Error::NoRoom { retry_after: Some(_), .. }), "{error}");
    rig.sequences.insert(0, 1);
    let grad = rig.backward(0, 60);
    rig.turn();
    rig.turn();
    assert_eq!(forwarded(waits).unwrap().hidden.to_f32(), alone(1, 120)[0]);
    forwarded(first).unwrap();
    done(grad);
    // What is larger than everything is not kept waiting.
    let grad = rig.backward(1, 120);
    rig.turn();
    done(grad);
    let never = rig.train(0, 900);
    rig.turn();
    let error = forwarded(never).unwrap_err();
    assert!(matches!(error, Error::NoRoom { retry_after: None, .. }), "{error}");
}

#[test]
fn a_step_of_one_session_leaves_the_others_alone() {
    let mut rig = rig(None);
    (0..2).for_each(|lane| rig.admit(lane));
    let (outputs, _) = ([0, 1].map(|lane| rig.train(lane, 6)), rig.turn());
    let (grads, _) = ([0, 1].map(|lane| rig.backward(lane, 6)), rig.turn());
    drop((outputs, grads));
    let (reply, stepped): (Reply<_>, _) = oneshot::channel();
    let work = StepWork { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None };
    rig.submit(0, FrameWork::Step { work, reply });
    rig.turn();
    assert_eq!(stepped.blocking_recv().unwrap().unwrap().step, 1);
    assert!(rig.gradients(0).iter().all(|g| *g == 0.0));
    assert_close("gradient", &rig.gradients(1), &alone(1, 6)[2]);
}
