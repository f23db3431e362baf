//! Sessions on a device that holds only some of them: they leave, come back and end with the same
//! bits; who finds no room waits or is told why; what is damaged on disk harms only its own.

use offshoot_client::{
    Client, ClientError, ClientOptions, ErrorCode, ExportedAdapter, MemoryReport, Residency, Retry,
    Session, SessionInfo, SessionState,
};
use offshoot_server::ServerConfig;
use offshoot_tests::memory::until_memory;
use offshoot_tests::run::{assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinSet;

/// Large beside the tapes and the workspace of the microbatches here.
const RANK: u32 = 16;

/// With a device that holds so many adapters and half of one more for work.
async fn crowded(store: &Path, n_adapters: u64, change: impl FnOnce(&mut ServerConfig)) -> Crowded {
    let (weights, adapter) = sizes().await;
    let mut config = server_config(store);
    config.limits.memory_bytes = Some(weights + n_adapters * adapter + adapter / 2);
    config.limits.max_tokens_per_microbatch = 16;
    config.session.turn_seconds = 0.0;
    change(&mut config);
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let hidden_size = client.describe().await.unwrap().hidden_size;
    Crowded { server, client, hidden_size, adapter }
}

struct Crowded {
    server: TestServer,
    client: Client,
    hidden_size: usize,
    /// Bytes of one.
    adapter: u64,
}

/// Bytes of the weights and of one adapter.
async fn sizes() -> (u64, u64) {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let session = open(&client, 0).await.unwrap();
    let memory = client.describe().await.unwrap().memory;
    session.close(true).await.unwrap();
    server.drain().await;
    assert!(memory.budget_bytes > 0, "on the CPU the budget is known: {memory:?}");
    (memory.weights_bytes, memory.adapter_bytes)
}

async fn open(client: &Client, seed: u64) -> Result<Session, ClientError> {
    let mut request = open_request(client).await?;
    request.lora.r = RANK;
    request.seed = seed;
    client.open(request).await
}

/// A microbatch whose gradients stay on the server.
async fn accumulate(session: &Session, h: usize, key: u64) -> Result<(), ClientError> {
    let (output, microbatch, _) = session.forward(input(key, &[3, 2], h)).await?;
    microbatch.backward(output).await.map(drop)
}

/// Two steps, with pauses between microbatches in which a session may be sent away.
async fn part(session: &Session, h: usize, part: u64) -> Result<(), ClientError> {
    match part {
        0 => accumulate(session, h, 1).await,
        1 => {
            accumulate(session, h, 2).await?;
            session.step(0.01, 0.7).await?.await?;
            accumulate(session, h, 3).await
        }
        _ => {
            train(session, h, 4..5).await?;
            // Its step was not waited for.
            session.settle().await.map(drop)
        }
    }
}
const N_PARTS: u64 = 3;

/// What a session of this seed ends with if it is never sent away.
async fn expected(seed: u64) -> ExportedAdapter {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = open(&client, seed).await.unwrap();
    for n in 0..N_PARTS {
        part(&session, h, n).await.unwrap();
    }
    let adapter = session.export().await.unwrap();
    server.drain().await;
    adapter
}

impl Crowded {
    async fn memory(&self) -> MemoryReport {
        self.client.describe().await.unwrap().memory
    }

    async fn info(&self, session: &Session) -> SessionInfo {
        let all = self.client.list_sessions().await.unwrap();
        all.into_iter().find(|info| info.id == *session.id()).expect("it is listed")
    }

    /// Asks until what the server says of itself is as wanted.
    async fn until(&self, what: &str, wanted: impl Fn(&MemoryReport) -> bool) -> MemoryReport {
        until_memory(&self.client, what, wanted).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_sessions_on_a_device_for_ten_end_as_if_they_were_alone() {
    const N: u64 = 100;
    const N_SEEDS: u64 = 4;
    let mut alone = Vec::new();
    for seed in 0..N_SEEDS {
        alone.push(expected(seed).await);
    }
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 10, |_| {}).await;
    let h = crowded.hidden_size;
    let mut sessions = Vec::new();
    for n in 0..N {
        let seed = n % N_SEEDS;
        sessions.push((seed, open(&crowded.client, seed).await.unwrap()));
    }
    let memory = crowded.memory().await;
    assert_eq!(memory.live_sessions, N as u32);
    assert!((1..=10).contains(&memory.sessions_on_device), "{memory:?}");

    // One after the other, with gradients that go away with them; then all at once, twice.
    for (_, session) in &sessions {
        part(session, h, 0).await.unwrap();
    }
    for n in 1..N_PARTS {
        let mut together = JoinSet::new();
        for (seed, session) in sessions.drain(..) {
            together.spawn(async move {
                part(&session, h, n).await.unwrap();
                (seed, session)
            });
        }
        sessions = together.join_all().await;
    }
    let memory = crowded.memory().await;
    let peak = memory.peak.unwrap();
    println!("{memory:?}");
    assert!(peak.adapter_bytes <= 10 * crowded.adapter, "{peak:?}");
    assert!(peak.total_bytes <= memory.budget_bytes, "{peak:?}");

    let list = crowded.client.list_sessions().await.unwrap();
    let on_device = list.iter().filter(|info| info.residency == Residency::Device).count();
    assert!((1..=10).contains(&on_device), "{on_device}");
    assert!(list.iter().all(|info| info.state == SessionState::Attached));
    for (seed, session) in &sessions {
        assert_same_adapter(&session.export().await.unwrap(), &alone[*seed as usize]);
    }
    for (_, session) in sessions {
        session.close(false).await.unwrap();
    }
    let all_gone = |m: &MemoryReport| (m.adapter_bytes, m.tape_bytes, m.live_sessions) == (0, 0, 0);
    let memory = crowded.until("empty", all_gone).await;
    assert_eq!((memory.sessions_on_device, memory.workspace_bytes), (0, 0));
    crowded.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_away_are_bounded_by_their_number_only() {
    const N: u64 = 300;
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 2, |config| {
        config.limits.max_live_sessions = N as usize;
    })
    .await;
    let h = crowded.hidden_size;
    let mut sessions = Vec::new();
    for _ in 0..N {
        sessions.push(open(&crowded.client, 1).await.unwrap());
    }
    let memory = crowded.memory().await;
    assert_eq!(memory.live_sessions, N as u32);
    assert!(memory.sessions_on_device <= 2, "{memory:?}");
    // All on one connection, and each can train.
    for session in sessions.iter().step_by(50) {
        accumulate(session, h, 1).await.unwrap();
    }

    let retry = Retry { max_elapsed: Duration::from_millis(50), ..Retry::default() };
    let options = ClientOptions { retry, ..ClientOptions::default() };
    let hasty = Client::connect_with(&crowded.server.endpoint(), options).await.unwrap();
    let error = open(&hasty, 2).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{error}");
    assert!(error.to_string().contains(&N.to_string()), "{error}");
    assert!(error.retry_after().is_some(), "{error}");
    sessions.pop().unwrap().close(false).await.unwrap();
    open(&hasty, 2).await.unwrap();
    crowded.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_room_waits_until_another_is_quiet() {
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 1, |_| {}).await;
    let h = crowded.hidden_size;
    let first = open(&crowded.client, 1).await.unwrap();
    // An open microbatch keeps its session on the device.
    let (output, microbatch, _) = first.forward(input(1, &[3, 2], h)).await.unwrap();
    let client = crowded.client.clone();
    let opening = tokio::spawn(async move { open(&client, 2).await });
    crowded.until("one waits", |memory| memory.waiting_for_room == 1).await;
    assert_eq!(crowded.info(&first).await.residency, Residency::Device);
    microbatch.backward(output).await.unwrap();
    let second = opening.await.unwrap().unwrap();
    assert_eq!(crowded.info(&first).await.residency, Residency::Disk);
    assert_eq!(crowded.info(&second).await.residency, Residency::Device);

    // The same for a frame: the first session wants to come back, and the second one is busy.
    let (output, microbatch, _) = second.forward(input(1, &[3, 2], h)).await.unwrap();
    let frame = first.send_evaluate(input(2, &[4], h)).await.unwrap();
    crowded.until("one waits", |memory| memory.waiting_for_room == 1).await;
    microbatch.backward(output).await.unwrap();
    frame.await.unwrap();
    assert_eq!(crowded.memory().await.waiting_for_room, 0);
    crowded.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_names_the_need_the_limit_and_when_to_come_again() {
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 1, |config| {
        config.limits.admission_wait_seconds = 0.02;
    })
    .await;
    let (h, adapter) = (crowded.hidden_size, crowded.adapter);
    let budget = crowded.memory().await.budget_bytes;
    let first = open(&crowded.client, 1).await.unwrap();
    let (output, microbatch, _) = first.forward(input(1, &[3, 2], h)).await.unwrap();

    let retry = Retry { max_elapsed: Duration::from_millis(300), ..Retry::default() };
    let options = ClientOptions { retry, ..ClientOptions::default() };
    let hasty = Client::connect_with(&crowded.server.endpoint(), options).await.unwrap();
    let error = open(&hasty, 2).await.err().unwrap();
    let text = error.to_string();
    println!("{text}");
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{text}");
    for number in [adapter, budget] {
        assert!(text.contains(&number.to_string()), "{number} is not in {text}");
    }
    assert!(text.contains("try again in"), "{text}");

    // What never fits is not tried again, and says so.
    let mut large = open_request(&hasty).await.unwrap();
    large.lora.r = 2 * RANK;
    let error = crowded.client.open(large).await.err().unwrap();
    let text = error.to_string();
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{text}");
    assert!(text.contains(&(2 * adapter).to_string()) && text.contains("never"), "{text}");

    // Nothing of the refused is left, and with room it goes on.
    assert_eq!(crowded.memory().await.live_sessions, 1);
    microbatch.backward(output).await.unwrap();
    let second = open(&hasty, 2).await.unwrap();
    accumulate(&second, h, 1).await.unwrap();
    crowded.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_leaves_without_pressure_and_nobody_notices() {
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 10, |config| config.session.idle_seconds = 0.05).await;
    let h = crowded.hidden_size;
    let alone = expected(3).await;
    let session = open(&crowded.client, 3).await.unwrap();
    for n in 0..N_PARTS {
        part(&session, h, n).await.unwrap();
        crowded.until("away", |memory| memory.sessions_on_device == 0).await;
        let info = crowded.info(&session).await;
        assert_eq!((info.residency, info.adapter_bytes), (Residency::Disk, 0));
        assert_eq!(info.state, SessionState::Attached);
    }

    // What can be answered from the disk does not bring it back, and writes nothing anew.
    let blobs = blobs(store.path());
    assert_same_adapter(&session.export().await.unwrap(), &alone);
    let gradients = session.export_with_gradients().await.unwrap().gradients;
    assert_eq!(gradients.len(), alone.tensors.len());
    let snapshot = session.snapshot().await.unwrap();
    let info = crowded.info(&session).await;
    assert_eq!((info.residency, info.snapshots.last()), (Residency::Disk, Some(&snapshot)));
    assert_eq!(self::blobs(store.path()), blobs);
    accumulate(&session, h, 9).await.unwrap();

    // The lease of a session that is away ends, too.
    let id = session.id().clone();
    let parked = session.close(false).await.unwrap().unwrap();
    let (session, restored) = crowded.client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot, parked);
    accumulate(&session, h, 10).await.unwrap();
    crowded.server.drain().await;
}

fn blobs(store: &Path) -> HashSet<PathBuf> {
    let entries = std::fs::read_dir(store.join("blobs")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_on_disk_is_named_and_harms_nobody_else() {
    let store = tempfile::tempdir().unwrap();
    let crowded = crowded(store.path(), 1, |_| {}).await;
    let h = crowded.hidden_size;
    let first = open(&crowded.client, 1).await.unwrap();
    accumulate(&first, h, 1).await.unwrap();
    let good = first.snapshot().await.unwrap();
    accumulate(&first, h, 2).await.unwrap();
    let before = blobs(store.path());
    // The first one is sent away.
    let second = open(&crowded.client, 2).await.unwrap();
    let info = crowded.info(&first).await;
    assert_eq!(info.residency, Residency::Disk);
    accumulate(&second, h, 1).await.unwrap();
    let newest = info.snapshots.last().unwrap();
    assert!(newest.sequence > good.sequence);
    let new: Vec<PathBuf> = blobs(store.path()).difference(&before).cloned().collect();
    let len = |path: &PathBuf| std::fs::metadata(path).unwrap().len();
    // Its state is larger than its recorded answers; the second one's is there, too.
    let states: Vec<&PathBuf> = new.iter().filter(|path| len(path) > crowded.adapter).collect();
    for path in states {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    }

    // It goes back by itself to what is whole, and its client learns how far.
    let error = first.evaluate(input(1, &[4], h)).await.unwrap_err();
    let ClientError::RolledBack { last_applied, snapshots, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((*last_applied, snapshots.first()), (good.sequence, Some(&good)), "{error}");
    let error = crowded.client.restore(first.id(), Some(&newest.snapshot_id)).await.err().unwrap();
    let text = error.to_string();
    assert!(matches!(error, ClientError::Damaged { .. }), "{text}");
    for part in ["damaged", "blobs", &format!("{} is whole", good.snapshot_id)] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // The other one is where it was and trains.
    accumulate(&second, h, 2).await.unwrap();
    second.step(0.01, 1.0).await.unwrap().await.unwrap();
    // The snapshot before is whole.
    let id = first.id().clone();
    let (first, restored) = crowded.client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot, good);
    accumulate(&first, h, 2).await.unwrap();
    crowded.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trunk_larger_than_the_budget_does_not_start() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.limits.memory_bytes = Some(1000);
    let error = offshoot_server::Server::start(config).await.err().unwrap().to_string();
    assert!(error.contains("1000") && error.contains("limits.memory_bytes"), "{error}");
}
