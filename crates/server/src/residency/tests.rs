//! The host's memory as a tier, which a server on the CPU does not have of itself: the real engine,
//! store and actors, without sockets.

use super::*;
use crate::access::{Access, Audit};
use crate::config::{LimitsConfig, TrunkConfig};
use crate::engine::Engine;
use crate::pool::{ActorPool, PoolThreads};
use crate::registry::{AttachedStream, Opening, OwnSession, Owners, Parts, Registry, StreamEnd};
use crate::session::{
    BackwardWork, Digest, ForwardWork, Frame, Frames, Greeting, Head, Mode, SnapshotEvery,
    StepWork, Work,
};
use crate::store::{Kept, Origin};
use offshoot_adapters::LoraSpec;
use offshoot_proto::v1::{self, ServerFrame, server_frame::Body};
use offshoot_proto::{HostTensor, WireDType};

/// H of the tiny llama.
const HIDDEN: usize = 40;
const N_TOKENS: usize = 5;

struct Fixture {
    registry: Arc<Registry>,
    engine: Engine,
    threads: PoolThreads,
    _dir: tempfile::TempDir,
    store: Arc<Store>,
}

/// A session with its stream.
struct Training {
    id: SessionId,
    stream: AttachedStream,
    out: mpsc::Sender<Result<ServerFrame, tonic::Status>>,
    answers: mpsc::Receiver<Result<ServerFrame, tonic::Status>>,
    next: u64,
}

fn lora() -> LoraSpec {
    LoraSpec { r: 16, target_modules: vec!["all-linear".into()], ..LoraSpec::default() }
}

/// For room on the device.
const MAX_WAITING: usize = 20;

impl Fixture {
    /// With room for so many adapters on the device and in the host's memory.
    async fn start(on_device: u64, on_host: u64) -> Fixture {
        Fixture::start_taking(on_device, on_host, SnapshotEvery::default()).await
    }

    /// The same, with sessions that are made durable while they train.
    async fn start_taking(on_device: u64, on_host: u64, snapshots: SnapshotEvery) -> Fixture {
        let model = TrunkConfig {
            name: concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama").into(),
            split_point_1: 1,
            split_point_2: 3,
            n_threads: Some(1),
            ..TrunkConfig::default()
        };
        let mut limits = LimitsConfig {
            max_tokens_per_batch: 1,
            max_tokens_per_microbatch: 16,
            ..LimitsConfig::default()
        };
        let probe = Engine::start(model.clone(), &limits).await.unwrap();
        let (weights, adapter) = {
            let client = probe.client();
            (client.trunk().weights_bytes, client.trunk().adapter_bytes(&lora()))
        };
        probe.client().abort();
        tokio::task::spawn_blocking(move || probe.join()).await.unwrap();
        limits.memory_bytes = Some(weights + on_device * adapter + adapter / 2);

        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path(), Kept { of_client: 8, of_server: 1 }).unwrap());
        let engine = Engine::start(model, &limits).await.unwrap();
        let (pool, threads) = ActorPool::start(1).await.unwrap();
        let slots = Arc::<Slots>::default();
        let residency = Residency::start(ResidencyParts {
            engine: engine.client(),
            store: store.clone(),
            slots: slots.clone(),
            host_bytes: on_host * adapter,
            wait: Duration::from_secs(30),
            max_waiting: MAX_WAITING,
            ages: Ages { idle: Duration::from_secs(3600), turn: Duration::ZERO },
        });
        let registry = Registry::start(Parts {
            access: Access::start(None, Audit::default()).unwrap(),
            owners: Owners::load(&store).unwrap(),
            engine: engine.client(),
            store: store.clone(),
            slots,
            residency,
            refusals: Arc::default(),
            meters: Arc::default(),
            pool,
            limits: v1::Limits {
                max_tokens_per_microbatch: 16,
                max_frames_in_flight: 4,
                max_open_microbatches: 4,
                max_rank: 64,
                lease_seconds: 3600,
                max_open_caches: 2,
                max_cache_tokens: 32,
            },
            lease: Duration::from_secs(3600),
            snapshots,
            max_live_sessions: 100,
        });
        Fixture { registry, engine, threads, _dir: dir, store }
    }

    async fn open(&self, seed: u64) -> Training {
        let settings = Settings {
            tenant: "".into(),
            lora: lora(),
            adamw: Default::default(),
            seed,
            wire_dtype: WireDType::F32,
        };
        let opening = Opening { name: String::new(), settings, start: Start::Fresh };
        let (id, _) = self.registry.open(opening).await.unwrap();
        let (out, mut answers) = mpsc::channel(6);
        let end = StreamEnd {
            greeting: Greeting::default(),
            hello: out.clone().try_reserve_owned().unwrap(),
            farewell: out.clone().try_reserve_owned().unwrap(),
            ends: oneshot::channel().0,
        };
        let stream = self.registry.attach(self.own(id), end).await.unwrap();
        let hello = answers.recv().await.unwrap().unwrap();
        assert!(matches!(hello.body, Some(Body::Attached(_))), "{hello:?}");
        Training { id, stream, out, answers, next: 1 }
    }

    fn own(&self, id: SessionId) -> OwnSession {
        self.registry.owners().check("", &id.to_string()).unwrap()
    }

    fn residency(&self) -> &Residency {
        self.registry.residency()
    }

    /// The parameters and gradients of a session, from wherever it is.
    async fn export(&self, training: &Training) -> Vec<(String, Vec<f32>)> {
        let (_, exported) = self.registry.export(self.own(training.id), true).await.unwrap();
        let all = exported.tensors.into_iter().chain(exported.gradients);
        all.map(|(name, tensor)| (name, tensor.to_f32())).collect()
    }

    async fn end(self) {
        let Fixture { registry, engine, threads, .. } = self;
        tokio::task::spawn_blocking(move || threads.join()).await.unwrap();
        drop(registry);
        engine.client().abort();
        tokio::task::spawn_blocking(move || engine.join()).await.unwrap();
    }
}

impl Training {
    async fn ask(&mut self, work: Work) -> ServerFrame {
        let sequence = self.next;
        self.next += 1;
        let digest: Digest = [sequence as u8; 32];
        let head = Head { sequence, acknowledged: sequence - 1, digest, effect: work.effect() };
        let permit = self.out.clone().reserve_owned().await.unwrap();
        let frame = Ok(Frame { head, work });
        let frames = Frames {
            stream: self.stream.number,
            sequence,
            frame,
            permit,
            span: tracing::Span::none(),
        };
        self.stream.actor.send(frames).await.unwrap();
        let answer = self.answers.recv().await.unwrap().unwrap();
        assert!(answer.sequence == sequence && !matches!(answer.body, Some(Body::Error(_))));
        answer
    }

    /// A forward and its backward.
    async fn accumulate(&mut self, key: u64) {
        let value = |i: usize| ((i as u64 * 37 + key * 11) % 101) as f32 / 50.0 - 1.0;
        let values: Vec<f32> = (0..N_TOKENS * HIDDEN).map(value).collect();
        let rows = HostTensor::from_f32(&values, vec![N_TOKENS, HIDDEN], WireDType::F32);
        let forward = ForwardWork {
            microbatch: key,
            hidden: rows.clone(),
            seq_lens: vec![3, 2],
            position_ids: None,
            mode: Mode::Train,
            want_input_grad: true,
            dropout_key: key,
        };
        self.ask(Work::Forward(forward)).await;
        self.ask(Work::Backward(BackwardWork { microbatch: key, grad: rows })).await;
    }

    /// Whether a snapshot of it is on its way.
    async fn step(&mut self) -> bool {
        let work =
            Work::Step(StepWork { learning_rate: 0.01, clip_factor: 1.0, shared_loss: None });
        match self.ask(work).await.body {
            Some(Body::Step(done)) => done.snapshot,
            other => panic!("{other:?}"),
        }
    }
}

/// What a session of this seed has after two microbatches, a step, and one more.
async fn alone(seed: u64) -> Vec<(String, Vec<f32>)> {
    let fixture = Fixture::start(2, 0).await;
    let mut training = fixture.open(seed).await;
    for key in [1, 2] {
        training.accumulate(key).await;
    }
    training.step().await;
    training.accumulate(3).await;
    let exported = fixture.export(&training).await;
    fixture.end().await;
    exported
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_go_to_the_host_and_then_to_disk_and_come_back_with_their_gradients() {
    let expected = [alone(0).await, alone(1).await];
    let fixture = Fixture::start(1, 2).await;
    let mut sessions = Vec::new();
    for n in 0..5 {
        let mut training = fixture.open(n % 2).await;
        training.accumulate(1).await;
        sessions.push(training);
    }
    // The device holds one and the host two; the first ones made room for the later ones.
    let count = |tier| fixture.residency().count(tier);
    assert_eq!((count(Tier::Device), fixture.residency().n_live()), (1, 5));
    assert!((1..=2).contains(&count(Tier::Host)), "{}", count(Tier::Host));
    let on_disk = |training: &Training| {
        let record = fixture.store.record(training.id).unwrap().unwrap();
        record.head().unwrap().sequence == training.next - 1
    };
    let n_on_disk = sessions.iter().filter(|training| on_disk(training)).count();
    assert!((1..=4).contains(&n_on_disk), "{n_on_disk}");
    // What is in memory only is not on disk: gradients came through the host's memory.
    assert!(sessions.iter().any(|training| !on_disk(training)));

    for training in &mut sessions {
        training.accumulate(2).await;
        training.step().await;
    }
    for training in &mut sessions {
        training.accumulate(3).await;
    }
    for (n, training) in sessions.iter().enumerate() {
        assert!(fixture.export(training).await == expected[n % 2], "session {n} ends otherwise");
    }
    // A snapshot of one that is in the host's memory is taken from there.
    for training in &sessions {
        let taken = fixture
            .registry
            .snapshot(fixture.own(training.id), training.next - 1, vec![])
            .await
            .unwrap();
        assert_eq!(taken.sequence, training.next - 1);
        assert!(on_disk(training));
    }
    for training in &sessions {
        fixture.registry.close(fixture.own(training.id), true).await.unwrap();
    }
    assert_eq!(fixture.residency().n_live(), 0);
    assert_eq!((count(Tier::Device), count(Tier::Host)), (0, 0));
    assert_eq!(fixture.residency().host().usage().now.total(), 0);
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_that_nobody_waits_for_any_more_is_given_back() {
    let fixture = Fixture::start(1, 0).await;
    let mut training = fixture.open(1).await;
    // Busy: it has an open microbatch.
    let rows = HostTensor::from_f32(&[0.5; HIDDEN], vec![1, HIDDEN], WireDType::F32);
    let forward = ForwardWork {
        microbatch: 1,
        hidden: rows.clone(),
        seq_lens: vec![1],
        position_ids: None,
        mode: Mode::Train,
        want_input_grad: false,
        dropout_key: 1,
    };
    training.ask(Work::Forward(forward)).await;
    let wanted = fixture.engine.client().trunk().adapter_bytes(&lora());
    let mut given_up = Box::pin(fixture.residency().reserve_on_device(wanted));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(given_up.as_mut().poll(&mut context).is_pending());
    assert_eq!(fixture.residency().n_waiting(), 1);
    drop(given_up);
    training.ask(Work::Backward(BackwardWork { microbatch: 1, grad: rows })).await;
    // Whoever comes next gets the room, and nothing is held for the other.
    let reserved = fixture.residency().reserve_on_device(wanted).await.unwrap();
    assert_eq!(fixture.residency().n_waiting(), 0);
    let usage = fixture.engine.client().ledger().usage();
    assert_eq!(usage.now.adapters, reserved.bytes());
    drop(reserved);
    training.accumulate(2).await;
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_by_steps_is_the_session_right_behind_its_step() {
    let every = SnapshotEvery { time: None, steps: Some(3) };
    let fixture = Fixture::start_taking(2, 0, every).await;
    let mut training = fixture.open(1).await;
    let mut at_three = (0, Vec::new());
    let mut told = Vec::new();
    for step in 1..=5 {
        training.accumulate(step).await;
        told.push(training.step().await);
        if step == 3 {
            at_three = (training.next - 1, fixture.export(&training).await);
        }
    }
    assert_eq!(told, [false, false, true, false, false]);
    // Nobody asked: it is there because the server took it.
    let begun = Instant::now();
    let head = loop {
        let record = fixture.store.record(training.id).unwrap().unwrap();
        let head = record.head().unwrap().clone();
        if head.step == 3 {
            break head;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{record:?}");
        tokio::task::yield_now().await;
    };
    assert_eq!((head.sequence, head.origin), (at_three.0, Origin::Server));
    let copied = Copied::decode(fixture.store.read(training.id, &head).unwrap()).unwrap();
    // The recorded answers end with that Step, and its says the same again.
    let last = copied.resume.answers.last().unwrap();
    assert_eq!(last.sequence, head.sequence);
    assert!(matches!(&last.answer.body, Some(Body::Step(done)) if done.snapshot && done.step == 3));
    let restored = fixture.registry.restore(fixture.own(training.id), &head.id).await.unwrap();
    assert_eq!(restored.snapshot, head);
    assert!(fixture.export(&training).await == at_three.1, "the snapshot holds another point");
    fixture.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_those_who_want_room_is_refused_and_the_others_get_it() {
    let fixture = Fixture::start(1, 0).await;
    let settings = || Settings {
        tenant: "".into(),
        lora: lora(),
        adamw: Default::default(),
        seed: 1,
        wire_dtype: WireDType::F32,
    };
    let all = fixture.residency().reserve(&settings()).await.unwrap();
    let waiting: Vec<_> = (0..MAX_WAITING)
        .map(|_| {
            let registry = fixture.registry.clone();
            tokio::spawn(async move { registry.residency().reserve(&settings()).await.map(drop) })
        })
        .collect();
    while fixture.residency().n_waiting() < MAX_WAITING {
        tokio::task::yield_now().await;
    }
    for _ in 0..3 {
        let error = fixture.residency().reserve(&settings()).await.unwrap_err();
        assert!(matches!(error, Error::WaitingForRoom { limit: MAX_WAITING }), "{error}");
        assert!(error.retry_after().is_some());
    }
    assert_eq!(fixture.residency().n_waiting(), MAX_WAITING);
    drop(all);
    for one in waiting {
        one.await.unwrap().unwrap();
    }
    assert_eq!(fixture.residency().n_waiting(), 0);
    fixture.end().await;
}
