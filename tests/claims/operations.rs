//! What operators and tenants do to sessions without training them, on a real server with real clients:
//! nobody who trains notices, what is deleted is gone, and each sees his own.

#[path = "strangers/tenants.rs"]
#[allow(dead_code)]
mod tenants;

use offshoot_client::operations::{Overview, SessionView};
use offshoot_client::{
    Client, ClientError, ErrorCode, ExportedAdapter, Residency, Session, SessionId, SessionState,
};
use offshoot_server::ServerConfig;
use offshoot_tests::run::{assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tenants::{Shared, entry};
use tokio::time::Instant;

async fn open(client: &Client) -> Session {
    client.open(open_request(client).await.unwrap()).await.unwrap()
}

async fn hidden_size(client: &Client) -> usize {
    client.describe().await.unwrap().hidden_size
}

/// A session in an overview.
fn find(overview: &Overview, id: &SessionId) -> Option<SessionView> {
    let is_it =
        |view: &&SessionView| view.info.as_ref().is_some_and(|info| info.session_id == id.as_str());
    overview.sessions.iter().find(is_it).cloned()
}

async fn view(client: &Client, id: &SessionId) -> SessionView {
    find(&client.overview(0).await.unwrap(), id).expect("it is there")
}

fn residency(view: &SessionView) -> Residency {
    view.info.as_ref().unwrap().residency()
}

fn code(error: &ClientError) -> ErrorCode {
    error.code().unwrap_or_else(|| panic!("the server said no: {error}"))
}

/// What a session ends with that nobody disturbs.
async fn expected(steps: u64) -> ExportedAdapter {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let session = open(&client).await;
    train(&session, hidden_size(&client).await, 0..steps).await.unwrap();
    let adapter = session.export().await.unwrap();
    server.drain().await;
    adapter
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_session_comes_back_bit_equal_also_from_the_middle_of_its_training() {
    const STEPS: u64 = 6;
    let alone = expected(STEPS).await;
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = hidden_size(&client).await;
    let session = open(&client).await;
    let id = session.id().clone();
    train(&session, h, 0..2).await.unwrap();
    session.settle().await.unwrap();
    client.evict_session(&id).await.unwrap();
    assert_eq!(residency(&view(&client, &id).await), Residency::Disk);
    // Of what left, the newest snapshot is it.
    let snapshots = client.list_snapshots(&id).await.unwrap();
    assert_eq!((snapshots[0].reason.as_str(), snapshots[0].is_head), ("left", true));

    // Sent away over and over while it trains: microbatches in flight come to their end first.
    let (done, mut is_done) = tokio::sync::oneshot::channel::<()>();
    let (evictor, evicted) = (client.clone(), id.clone());
    let evicting = tokio::spawn(async move {
        let mut times = 0;
        while is_done.try_recv().is_err() {
            evictor.evict_session(&evicted).await.unwrap();
            times += 1;
        }
        times
    });
    train(&session, h, 2..STEPS).await.unwrap();
    session.settle().await.unwrap();
    done.send(()).unwrap();
    let times = evicting.await.unwrap();
    println!("evicted {times} times within {} steps", STEPS - 2);
    assert!(times > 1);
    assert_same_adapter(&session.export().await.unwrap(), &alone);

    // One that is away, or parked, is fine as it is.
    client.evict_session(&id).await.unwrap();
    client.evict_session(&id).await.unwrap();
    session.close(false).await.unwrap();
    client.evict_session(&id).await.unwrap();
    server.drain().await;
}

/// A device that holds so many adapters and half of one more for work, and takes turns at once.
async fn crowded(
    store: &Path,
    n_adapters: u64,
    change: impl FnOnce(&mut ServerConfig),
) -> TestServer {
    let probe = TestServer::start().await;
    let client = Client::connect(&probe.endpoint()).await.unwrap();
    let session = open(&client).await;
    let memory = client.describe().await.unwrap().memory;
    drop(session);
    probe.drain().await;
    let mut config = server_config(store);
    let adapters = n_adapters * memory.adapter_bytes + memory.adapter_bytes / 2;
    config.limits.memory_bytes = Some(memory.weights_bytes + adapters);
    config.limits.max_tokens_per_microbatch = 16;
    config.session.turn_seconds = 0.0;
    change(&mut config);
    TestServer::start_with(config).await
}

/// A microbatch whose gradients stay on the server.
async fn accumulate(session: &Session, h: usize, key: u64) {
    let (output, microbatch, _) = session.forward(input(key, &[3, 2], h)).await.unwrap();
    microbatch.backward(output).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_session_stays_for_idleness_and_pressure_and_pins_have_a_bound() {
    let store = tempfile::tempdir().unwrap();
    let server = crowded(store.path(), 6, |config| config.session.idle_seconds = 0.1).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = hidden_size(&client).await;
    let pinned = open(&client).await;
    accumulate(&pinned, h, 1).await;
    client.pin_session(pinned.id(), true).await.unwrap();
    assert!(view(&client, pinned.id()).await.pinned);

    // Ten others for what is left of the room, twice each, and time in which all are idle.
    let mut others = Vec::new();
    for key in 0..10 {
        let other = open(&client).await;
        accumulate(&other, h, key).await;
        others.push(other);
    }
    for other in &others {
        accumulate(other, h, 20).await;
        assert_eq!(residency(&view(&client, pinned.id()).await), Residency::Device);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while client.describe().await.unwrap().memory.sessions_on_device > 1 {
        assert!(Instant::now() < deadline, "all others leave when they are idle");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(residency(&view(&client, pinned.id()).await), Residency::Device);
    let error = client.evict_session(pinned.id()).await.unwrap_err();
    assert!(error.to_string().contains("unpin it first"), "{error}");

    // Half of what adapters can have fits two; a pin brings its session back by itself.
    client.pin_session(others[0].id(), true).await.unwrap();
    while residency(&view(&client, others[0].id()).await) != Residency::Device {
        assert!(Instant::now() < deadline, "a pinned session comes to the device");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let error = client.pin_session(others[1].id(), true).await.unwrap_err();
    println!("{error}");
    assert_eq!(code(&error), ErrorCode::Exhausted);
    assert!(error.to_string().contains("unpin another"), "{error}");

    // Unpinned, it leaves as any other, and makes room among the pinned.
    client.pin_session(pinned.id(), false).await.unwrap();
    client.pin_session(others[1].id(), true).await.unwrap();
    while residency(&view(&client, pinned.id()).await) == Residency::Device {
        assert!(Instant::now() < deadline, "an unpinned session leaves");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A pin ends with the session's life.
    let id = others[1].id().clone();
    others.remove(1).close(false).await.unwrap();
    let error = client.pin_session(&id, true).await.unwrap_err();
    assert!(error.to_string().contains("is parked"), "{error}");
    client.pin_session(pinned.id(), true).await.unwrap();
    accumulate(&pinned, h, 30).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_is_gone_with_its_files_and_the_rest_stays() {
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(server_config(store.path())).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = hidden_size(&client).await;
    let session = open(&client).await;
    let id = session.id().clone();
    let mut taken = Vec::new();
    for step in 0..3 {
        train(&session, h, step..step + 1).await.unwrap();
        taken.push(session.snapshot().await.unwrap().snapshot_id);
    }
    let blobs = || std::fs::read_dir(store.path().join("blobs")).unwrap().count();
    let before = blobs();
    let listed = client.list_snapshots(&id).await.unwrap();
    let ids: Vec<&str> =
        listed.iter().map(|s| s.info.as_ref().unwrap().snapshot_id.as_str()).collect();
    assert_eq!(ids[..3], [&taken[2][..], &taken[1], &taken[0]]);
    assert!(listed[0].is_head && listed[0].reason == "client" && listed[0].taken_millis > 0);
    assert_eq!(listed.last().unwrap().reason, "opened");

    let error = client.delete_snapshot(&id, &taken[2]).await.unwrap_err();
    assert!(error.to_string().contains("goes on from"), "{error}");
    client.delete_snapshot(&id, &taken[0]).await.unwrap();
    assert_eq!(
        code(&client.delete_snapshot(&id, &taken[0]).await.unwrap_err()),
        ErrorCode::NotFound
    );
    assert!(blobs() < before);
    // It trains on, and goes back to what is left.
    train(&session, h, 3..4).await.unwrap();
    session.settle().await.unwrap();
    assert!(client.restore(&id, Some(&taken[0])).await.is_err());
    let (session, restored) = client.restore(&id, Some(&taken[1])).await.unwrap();
    assert_eq!(restored.snapshot.step, 2);

    let other = open(&client).await;
    let kept = blobs();
    client.delete_session(&id).await.unwrap();
    assert_eq!(code(&client.delete_session(&id).await.unwrap_err()), ErrorCode::NotFound);
    assert!(blobs() < kept);
    assert!(find(&client.overview(0).await.unwrap(), &id).is_none());
    // Its client hears of it.
    let error = train(&session, h, 2..3).await.err().expect("the session is gone");
    assert!(matches!(code(&error), ErrorCode::NotFound), "{error}");
    train(&other, h, 0..1).await.unwrap();
    server.drain().await;
}

/// Blue trains, red does not, and ops is an operator.
async fn three() -> Shared {
    let ops = entry("ops", &[("ops", "")])
        .replace("name = \"ops\"\n", "name = \"ops\"\noperator = true\n");
    let text = entry("blue", &[("blue", "")]) + &entry("red", &[("red", "")]) + &ops;
    Shared::start_with_text(&text, |_| {}).await
}

fn ids(overview: &Overview) -> Vec<String> {
    let mut ids: Vec<String> =
        overview.sessions.iter().map(|v| v.info.as_ref().unwrap().session_id.clone()).collect();
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_sees_its_own_and_an_operator_all() {
    let shared = three().await;
    let (blue, red) = (shared.client("blue").await.unwrap(), shared.client("red").await.unwrap());
    let ops = shared.client("ops").await.unwrap();
    let h = hidden_size(&blue).await;
    let (of_blue, of_red) = (open(&blue).await, open(&red).await);
    let mut step = 0;
    // Until the server has looked twice while blue trains.
    let deadline = Instant::now() + Duration::from_secs(60);
    let all = loop {
        train(&of_blue, h, step..step + 1).await.unwrap();
        step += 1;
        let all = ops.overview(0).await.unwrap();
        if all.samples.iter().any(|sample| sample.tokens_per_second > 0.0) {
            break all;
        }
        assert!(Instant::now() < deadline, "what blue does is in the samples");
    };
    of_blue.settle().await.unwrap();
    // Red is refused something that names a secret of its own.
    let refused = red.restore(of_red.id(), Some("no-such-snapshot")).await;
    assert!(refused.is_err());

    assert!(all.is_operator);
    let mut both = [of_blue.id().to_string(), of_red.id().to_string()];
    both.sort();
    assert_eq!(ids(&all), both);
    let tenants: BTreeMap<_, _> =
        all.sessions.iter().map(|v| (v.tenant.as_str(), v.info.as_ref().unwrap().step)).collect();
    assert!(tenants["blue"] > 0 && tenants["red"] == 0);
    assert!(all.samples.iter().any(|sample| sample.sessions_live > 0 && sample.adapter_bytes > 0));

    let own = blue.overview(0).await.unwrap();
    assert!(!own.is_operator && ids(&own) == [of_blue.id().to_string()]);
    assert!(
        own.samples
            .iter()
            .any(|sample| sample.tokens_per_second > 0.0 && sample.steps_per_second > 0.0)
    );
    let metering = own.sessions[0].metering.unwrap();
    // Each step of `train` is 27 tokens in five frames.
    assert_eq!((metering.tokens, metering.steps), (27 * step, step));
    assert!(metering.bytes_in > 0 && metering.bytes_out > 0 && metering.device_seconds > 0.0);
    assert!(own.sessions[0].last_frame_millis > 0 && own.sessions[0].opened_millis > 0);
    for sample in &own.samples {
        // Nothing of the whole server.
        assert_eq!((sample.queued_jobs, sample.adapter_bytes, sample.sessions_live), (0, 0, 0));
        assert_eq!((sample.device_busy, sample.batch_tokens, sample.tape_bytes), (0.0, 0.0, 0));
    }
    assert!(own.refusals.is_empty());
    let server = own.server.unwrap();
    assert_eq!((server.queued_jobs, server.device), (0, None));
    assert_eq!(server.trunk.unwrap().memory.unwrap().live_sessions, 1);

    let other = red.overview(0).await.unwrap();
    assert_eq!(ids(&other), [of_red.id().to_string()]);
    assert!(other.samples.iter().all(|s| s.tokens_per_second == 0.0 && s.steps_per_second == 0.0));
    assert_eq!(other.refusals.len(), 1);
    assert!(other.refusals[0].message.contains("no-such-snapshot"));
    let seen: Vec<_> =
        ops.overview(0).await.unwrap().refusals.into_iter().map(|r| r.tenant).collect();
    assert_eq!(seen, ["red"]);
    // Only what is newer than asked.
    let last = all.samples.last().unwrap().at_millis;
    assert!(ops.overview(last).await.unwrap().samples.iter().all(|s| s.at_millis > last));

    let names = |all: &[offshoot_client::operations::TenantView]| {
        all.iter().map(|t| t.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&blue.list_tenants().await.unwrap()), ["blue"]);
    let all = ops.list_tenants().await.unwrap();
    assert_eq!(names(&all), ["blue", "ops", "red"]);
    assert_eq!((all[0].sessions_live, all[0].sessions_stored, all[1].is_operator), (1, 1, true));
    assert!(all[0].adapter_bytes > 0 && all[0].metering.unwrap().tokens == 27 * step);
    assert_eq!(all[2].tokens.iter().map(|t| t.id.as_str()).collect::<Vec<_>>(), ["red"]);
    shared.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_manages_what_is_others_and_neither_reads_nor_trains_it() {
    let shared = three().await;
    let (blue, ops) = (shared.client("blue").await.unwrap(), shared.client("ops").await.unwrap());
    let h = hidden_size(&blue).await;
    let session = open(&blue).await;
    let id = session.id().clone();
    train(&session, h, 0..1).await.unwrap();
    let snapshot = session.snapshot().await.unwrap().snapshot_id;
    train(&session, h, 1..2).await.unwrap();
    session.snapshot().await.unwrap();

    assert_eq!(code(&ops.export_session(&id).await.unwrap_err()), ErrorCode::NotFound);
    assert_eq!(code(&ops.restore(&id, None).await.err().unwrap()), ErrorCode::NotFound);
    assert_eq!(code(&ops.close_session(&id, true).await.unwrap_err()), ErrorCode::NotFound);
    assert!(ops.list_sessions().await.unwrap().is_empty());

    ops.pin_session(&id, true).await.unwrap();
    ops.pin_session(&id, false).await.unwrap();
    ops.evict_session(&id).await.unwrap();
    assert_eq!(residency(&view(&ops, &id).await), Residency::Disk);
    ops.delete_snapshot(&id, &snapshot).await.unwrap();
    // Nobody has noticed.
    train(&session, h, 2..3).await.unwrap();
    let state = view(&ops, &id).await.info.unwrap().state();
    assert_eq!(state, SessionState::Attached);
    // A tenant may do it to his own, and what is no operator's any more is not.
    blue.evict_session(&id).await.unwrap();
    let others = ["blue", "red", "ops"].map(|name| entry(name, &[(name, "")])).concat();
    shared.write(&others);
    shared.server.reload();
    assert_eq!(code(&ops.evict_session(&id).await.unwrap_err()), ErrorCode::NotFound);
    assert!(ids(&ops.overview(0).await.unwrap()).is_empty());
    blue.delete_session(&id).await.unwrap();
    assert!(blue.list_sessions().await.unwrap().is_empty());
    shared.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_known_only_if_it_is_shared_and_changes_no_number() {
    let alone = expected(2).await;
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = hidden_size(&client).await;
    let session = open(&client).await;
    train(&session, h, 0..1).await.unwrap();
    session.settle().await.unwrap();
    assert_eq!(view(&client, session.id()).await.shared_loss, None);
    // The same step as `train` takes, and a loss with it.
    let first = session.send_forward(input(3, &[5, 2, 4], h)).await.unwrap();
    let second = session.send_forward(input(4, &[3, 6], h)).await.unwrap();
    let (output, microbatch, _) = first.await.unwrap();
    microbatch.backward(output).await.unwrap();
    let (output, microbatch, _) = second.await.unwrap();
    let norm_squared = microbatch.backward(output).await.unwrap().norm_squared;
    let clip_factor = (0.5 / norm_squared.sqrt()).min(1.0);
    let error = session.step_sharing_loss(0.01, clip_factor, f64::NAN).await.unwrap().await;
    assert!(error.unwrap_err().to_string().contains("shared_loss"));
    session.step_sharing_loss(0.01, clip_factor, 1.75).await.unwrap().await.unwrap();
    assert_eq!(view(&client, session.id()).await.shared_loss, Some(1.75));
    assert_same_adapter(&session.export().await.unwrap(), &alone);
    server.drain().await;
}
