//! The life of sessions: leases, takeover, limits, snapshots.

use offshoot_client::{
    Client, ClientError, ClientOptions, ErrorCode, ForwardInput, HostTensor, MemoryReport, Retry,
    SessionInfo, SessionState, WireDType,
};
use offshoot_tests::memory::until_memory;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::raw::{self, RawStream};
use offshoot_tests::run::{assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::time::Duration;
use tokio::time::Instant;

/// Asks the server until its only session is in this state.
async fn until(client: &Client, state: SessionState) -> SessionInfo {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let mut sessions = client.list_sessions().await.unwrap();
        assert_eq!(sessions.len(), 1);
        let session = sessions.remove(0);
        if session.state == state {
            return session;
        }
        assert!(Instant::now() < deadline, "{session:?}");
    }
}

async fn until_parked(client: &Client) {
    let session = until(client, SessionState::Parked).await;
    assert_eq!((session.adapter_bytes, session.tape_bytes), (0, 0));
}

/// Asks the server until it counts so many bytes of adapters and of tapes.
async fn until_bytes(client: &Client, adapters: u64, tapes: u64) -> MemoryReport {
    let wanted = (adapters, tapes);
    let is_so = |memory: &MemoryReport| (memory.adapter_bytes, memory.tape_bytes) == wanted;
    until_memory(client, &format!("{wanted:?}"), is_so).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_client_is_parked_and_comes_back() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.session.lease_seconds = 0.3;
    let server = TestServer::start_with(config).await;
    let watcher = Client::connect(&server.endpoint()).await.unwrap();
    let h = watcher.describe().await.unwrap().hidden_size;

    // An undisturbed run in the same server, for comparison.
    let session = watcher.open(open_request(&watcher).await.unwrap()).await.unwrap();
    let expected = train(&session, h, 0..4).await.unwrap();
    let adapter = session.export().await.unwrap();
    session.close(true).await.unwrap();
    until_bytes(&watcher, 0, 0).await;

    let proxy = Proxy::start(server.address()).await.unwrap();
    let retry = Retry { first_delay: Duration::from_millis(2), ..Retry::default() };
    let options = ClientOptions { retry, ..ClientOptions::default() };
    let client = Client::connect_with(&proxy.endpoint(), options).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let first = train(&session, h, 0..2).await.unwrap();
    session.settle().await.unwrap();
    assert!(watcher.describe().await.unwrap().memory.adapter_bytes > 0);

    // Cut off for longer than the lease: the bytes come back, and then the client does.
    proxy.set_upstream(None);
    proxy.cut();
    until_parked(&watcher).await;
    assert_eq!(until_bytes(&watcher, 0, 0).await.live_sessions, 0);
    proxy.set_upstream(Some(server.address()));
    let second = train(&session, h, 2..3).await.unwrap();

    // Gone for good, and another process takes the session up.
    session.settle().await.unwrap();
    let id = session.id().clone();
    drop((session, client));
    until_parked(&watcher).await;
    let (session, restored) = watcher.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot.step, 3);
    let third = train(&session, h, 3..4).await.unwrap();

    let numbers: Vec<_> = first.into_iter().chain(second).chain(third).collect();
    assert!(numbers == expected, "a number differs from the uninterrupted run's");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_in_the_middle_of_a_microbatch_rolls_back() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.session.lease_seconds = 0.3;
    let server = TestServer::start_with(config).await;
    let watcher = Client::connect(&server.endpoint()).await.unwrap();
    let h = watcher.describe().await.unwrap().hidden_size;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let client = Client::connect(&proxy.endpoint()).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    let snapshot = session.snapshot().await.unwrap();
    let (output, microbatch, report) = session.forward(input(9, &[3], h)).await.unwrap();
    assert!(report.tape_bytes > 0);
    proxy.set_upstream(None);
    proxy.cut();
    until_parked(&watcher).await;
    until_bytes(&watcher, 0, 0).await;
    proxy.set_upstream(Some(server.address()));
    let error = microbatch.backward(output).await.unwrap_err();
    let ClientError::RolledBack { lost_microbatches, .. } = &error else { panic!("{error}") };
    assert_eq!(lost_microbatches.len(), 1, "{error}");
    let id = session.id().clone();
    let (session, _) = client.restore(&id, Some(&snapshot.snapshot_id)).await.unwrap();
    train(&session, h, 1..2).await.unwrap();
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stream_takes_over() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    let last = session.settle().await.unwrap();

    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut second = RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
    assert_eq!(second.attached.last_applied, last);
    let error = session.evaluate(input(1, &[2], h)).await.unwrap_err();
    assert!(matches!(error, ClientError::TakenOver { .. }), "{error}");
    assert!(error.ends_session() && error.to_string().contains(session.id().as_str()), "{error}");
    // The first does not fight for it.
    let eval = raw::forward(input(1, &[2], h), 0, offshoot_proto::v1::Mode::Eval);
    second.apply(offshoot_proto::v1::client_frame::Body::Forward(eval)).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_was_taken_over_from_cannot_come_back() {
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let retry = Retry { first_delay: Duration::from_millis(2), ..Retry::default() };
    let options = ClientOptions { retry, ..ClientOptions::default() };
    let older = Client::connect_with(&proxy.endpoint(), options).await.unwrap();
    let h = older.describe().await.unwrap().hidden_size;
    let session = older.open(open_request(&older).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    session.settle().await.unwrap();
    // It may come back itself.
    proxy.cut();
    session.evaluate(input(1, &[2], h)).await.unwrap();

    // It is cut off, another one begins, and then the network is there again.
    proxy.set_upstream(None);
    proxy.cut();
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut newer = RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
    proxy.set_upstream(Some(server.address()));
    let error = session.evaluate(input(1, &[2], h)).await.unwrap_err();
    assert!(matches!(error, ClientError::TakenOver { .. }), "{error}");
    let body = || {
        let eval = raw::forward(input(1, &[2], h), 0, offshoot_proto::v1::Mode::Eval);
        offshoot_proto::v1::client_frame::Body::Forward(eval)
    };
    newer.apply(body()).await;

    // The same if the newer one restored the session, and has no stream at the moment.
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let (restored, _) = client.restore(session.id(), None).await.unwrap();
    let epoch = newer.attached.epoch;
    drop(newer);
    drop(restored);
    let error =
        RawStream::attach_again(&mut rpc, session.id().as_str(), epoch).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::TakenOver, "{}", error.message);
    RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_sets_back_and_ends_the_old_session() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    let first = session.snapshot().await.unwrap();
    let expected = train(&session, h, 1..4).await.unwrap();
    let adapter = session.export().await.unwrap();
    let second = session.snapshot().await.unwrap();
    assert!(second.step == 4 && second.sequence > first.sequence && second.bytes > 0);

    // An open microbatch does not survive a restore.
    let (_, microbatch, _) = session.forward(input(5, &[3], h)).await.unwrap();
    let (again, restored) = client.restore(session.id(), Some(&first.snapshot_id)).await.unwrap();
    assert_eq!(restored.snapshot, first);
    assert_eq!((restored.lora.r, restored.lora.lora_alpha), (3, 6.0));
    let error = session.evaluate(input(1, &[2], h)).await.unwrap_err();
    assert!(error.ends_session(), "{error}");
    drop(microbatch);
    let numbers = train(&again, h, 1..4).await.unwrap();
    assert!(numbers == expected, "a replayed number differs");
    assert_same_adapter(&again.export().await.unwrap(), &adapter);

    let error = client.restore(again.id(), Some("nonsense")).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));
    assert!(error.to_string().contains(&second.snapshot_id), "{error}");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_asked_for_outlives_drains_and_parkings() {
    let store = tempfile::tempdir().unwrap();
    let config = || {
        let mut config = server_config(store.path());
        config.store.server_snapshots_kept = 1;
        config
    };
    let mut server = TestServer::start_with(config()).await;
    let mut client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().clone();
    train(&session, h, 0..1).await.unwrap();
    let first = session.snapshot().await.unwrap();
    let expected = train(&session, h, 1..3).await.unwrap();
    let adapter = session.export().await.unwrap();

    // Asked for while it is parked: the snapshot of the parking is it.
    let parked = session.close(false).await.unwrap().unwrap();
    let asked = offshoot_proto::v1::SnapshotRequest {
        session_id: id.as_str().into(),
        after_sequence: parked.sequence,
        ..Default::default()
    };
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let answer = rpc.snapshot(asked).await.unwrap().into_inner().snapshot.unwrap();
    assert_eq!(answer.snapshot_id, parked.snapshot_id);

    let mut newest = parked.clone();
    for step in 3..7 {
        (session, _) = client.restore(&id, None).await.unwrap();
        train(&session, h, step..step + 1).await.unwrap();
        session.close(false).await.unwrap();
        (session, _) = client.restore(&id, None).await.unwrap();
        session.evaluate(input(1, &[2], h)).await.unwrap();
        session.settle().await.unwrap();
        server.drain().await;
        server = TestServer::start_with(config()).await;
        client = Client::connect(&server.endpoint()).await.unwrap();
        let sessions = client.list_sessions().await.unwrap();
        newest = sessions[0].snapshots.last().unwrap().clone();
        assert_eq!(sessions[0].snapshots, [first.clone(), parked.clone(), newest.clone()]);
    }
    assert_eq!(newest.step, 7);
    let (_, restored) = client.restore(&id, Some(&parked.snapshot_id)).await.unwrap();
    assert_eq!(restored.snapshot, parked);
    let (session, restored) = client.restore(&id, Some(&first.snapshot_id)).await.unwrap();
    assert_eq!(restored.snapshot, first);
    let numbers = train(&session, h, 1..3).await.unwrap();
    assert!(numbers == expected, "a replayed number differs");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_said_and_kept() {
    let server = TestServer::start_limited(|limits| {
        limits.max_open_microbatches = 2;
        limits.max_frames_in_flight = 3;
        limits.max_tokens_per_microbatch = 64;
    })
    .await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let limits = session.limits();
    assert_eq!((limits.max_open_microbatches, limits.max_frames_in_flight), (2, 3));

    let (output, first, _) = session.forward(input(1, &[4], h)).await.unwrap();
    let (_, second, _) = session.forward(input(2, &[4], h)).await.unwrap();
    let error = session.forward(input(3, &[4], h)).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{error}");
    assert!(error.to_string().contains('2'), "{error}");
    first.backward(output.clone()).await.unwrap();
    let (_, third, _) = session.forward(input(3, &[4], h)).await.unwrap();
    second.backward(output.clone()).await.unwrap();
    third.backward(output).await.unwrap();
    session.step(0.1, 1.0).await.unwrap().await.unwrap();

    // More frames than may be on their way: sending waits for room.
    let expected = session.evaluate(input(1, &[60], h)).await.unwrap();
    let mut pending = Vec::new();
    for _ in 0..40 {
        pending.push(session.send_evaluate(input(1, &[60], h)).await.unwrap());
    }
    for one in pending {
        assert!(one.await.unwrap() == expected);
    }

    let error = session.evaluate(input(1, &[65], h)).await.unwrap_err();
    assert!(matches!(error, ClientError::TooLarge { max_tokens: 64, .. }), "{error}");
    session.evaluate(input(1, &[64], h)).await.unwrap();
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_sessions_can_be_taken_up_and_forgotten_ones_not() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..2).await.unwrap();
    let adapter = session.export().await.unwrap();
    let id = session.id().clone();
    let parked = session.close(false).await.unwrap().expect("a snapshot is taken");
    assert_eq!(parked.step, 2);
    let sessions = client.list_sessions().await.unwrap();
    assert_eq!(sessions.len(), 1);
    assert_eq!((&sessions[0].id, sessions[0].state), (&id, SessionState::Parked));
    assert_eq!(sessions[0].snapshots.last(), Some(&parked));
    until_bytes(&client, 0, 0).await;

    let (session, restored) = client.restore(&id, None).await.unwrap();
    assert_eq!(restored.snapshot, parked);
    assert_same_adapter(&session.export().await.unwrap(), &adapter);

    // A start from given values.
    let mut request = open_request(&client).await.unwrap();
    request.initial_adapter = adapter.tensors.clone();
    let copy = client.open(request).await.unwrap();
    let copied = copy.export().await.unwrap();
    assert_eq!(copied.step, 0);
    assert_same_adapter(&offshoot_client::ExportedAdapter { step: 2, ..copied }, &adapter);

    assert_eq!(session.close(true).await.unwrap(), None);
    let error = client.restore(&id, None).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::NotFound), "{error}");
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_session_finishes_its_steps() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..3).await.unwrap();
    drop(session);
    assert_eq!(until(&client, SessionState::Detached).await.step, 3);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tapes_are_counted_and_given_back() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let (output, first, report) = session.forward(input(1, &[4, 3], h)).await.unwrap();
    let (_, second, other) = session.forward(input(2, &[9], h)).await.unwrap();
    assert!(report.tape_bytes > 0 && other.tape_bytes > report.tape_bytes);
    assert!(report.round_trip >= report.queue + report.execute && !report.execute.is_zero());
    let adapters = client.list_sessions().await.unwrap()[0].adapter_bytes;
    let both = report.tape_bytes + other.tape_bytes;
    let mut memory = until_bytes(&client, adapters, both).await;
    while memory.open_microbatches < 2 {
        memory = client.describe().await.unwrap().memory;
    }
    assert_eq!((memory.open_microbatches, memory.live_sessions), (2, 1));
    assert_eq!(client.list_sessions().await.unwrap()[0].tape_bytes, both);
    let gradients = first.backward(output).await.unwrap();
    assert_eq!(gradients.input.unwrap().shape(), [7, h]);
    session.evaluate(input(3, &[5], h)).await.unwrap();
    until_bytes(&client, adapters, other.tape_bytes).await;
    let grad = HostTensor::from_f32(&vec![0.0; 9 * h], vec![9, h], WireDType::F32);
    second.backward(grad).await.unwrap();
    until_bytes(&client, adapters, 0).await;
    session.step(0.1, 1.0).await.unwrap().await.unwrap();
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wire_dtype_is_kept() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut request = open_request(&client).await.unwrap();
    let wide = client.open(request.clone()).await.unwrap();
    request.wire_dtype = WireDType::Bf16;
    let narrow = client.open(request).await.unwrap();
    let id = narrow.id().clone();
    let good = input(1, &[4, 3], h);
    let rounded = HostTensor::from_f32(&good.hidden.to_f32(), vec![7, h], WireDType::Bf16);
    let exact = HostTensor::from_f32(&rounded.to_f32(), vec![7, h], WireDType::F32);
    let expected = wide.evaluate(ForwardInput { hidden: exact, ..good.clone() }).await.unwrap();
    let expected = HostTensor::from_f32(&expected.to_f32(), vec![7, h], WireDType::Bf16);

    let narrow_input = ForwardInput { hidden: rounded, ..good.clone() };
    assert!(narrow.evaluate(narrow_input.clone()).await.unwrap() == expected);
    let error = narrow.evaluate(good).await.unwrap_err();
    assert!(error.to_string().contains("bf16") && error.to_string().contains("f32"), "{error}");
    narrow.close(false).await.unwrap();
    let (narrow, restored) = client.restore(&id, None).await.unwrap();
    assert_eq!((restored.wire_dtype, narrow.wire_dtype()), (WireDType::Bf16, WireDType::Bf16));
    assert!(narrow.evaluate(narrow_input).await.unwrap() == expected);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropout_is_named_by_the_client() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    // B starts at zero: without a step no mask shows.
    train(&session, h, 0..1).await.unwrap();
    let mut outputs = Vec::new();
    for dropout_key in [7, 8, 7] {
        let input = ForwardInput { dropout_key, ..input(1, &[4, 3], h) };
        let evaluated = session.evaluate(input.clone()).await.unwrap();
        let (output, microbatch, _) = session.forward(input).await.unwrap();
        microbatch.backward(output.clone()).await.unwrap();
        outputs.push((evaluated, output));
    }
    assert!(outputs[0] == outputs[2], "the same key, the same masks");
    assert!(outputs[0].1 != outputs[1].1, "another key, other masks");
    assert!(outputs[0].0 == outputs[1].0, "no masks in evaluation");
    session.step(0.1, 1.0).await.unwrap().await.unwrap();
    server.drain().await;
}
