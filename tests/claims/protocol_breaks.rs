//! Broken connections, drained and killed servers.

use offshoot_client::{Client, ClientError, ClientOptions, ExportedAdapter, Retry, Session};
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use offshoot_tests::child::Child;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::raw::{self, RawStream};
use offshoot_tests::run::{Numbers, assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::time::Duration;

/// Comes back quickly and does not give up before the test does.
pub(super) fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    ClientOptions { retry, ..ClientOptions::default() }
}

/// A run of `n_steps` that nothing disturbs.
async fn undisturbed(n_steps: u64) -> (Vec<Numbers>, ExportedAdapter) {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let numbers = train(&session, h, 0..n_steps).await.unwrap();
    let adapter = session.export().await.unwrap();
    server.drain().await;
    (numbers, adapter)
}

pub(super) async fn through(proxy: &Proxy) -> (Client, usize, Session) {
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    (client, h, session)
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cut_goes_on() {
    let (expected, adapter) = undisturbed(12).await;
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (_client, h, session) = through(&proxy).await;

    // Connections end in the middle of a handshake, of a Hello, of frames and of answers.
    let cuts = (1..=60).map(|n: i64| 150 + n * n * 7919 % 9973);
    proxy.cut_after(cuts);
    proxy.cut();
    let mut numbers = Vec::new();
    for step in 0..12 {
        numbers.extend(train(&session, h, step..step + 1).await.unwrap());
        if step % 3 == 2 {
            session.snapshot().await.unwrap();
        }
    }
    println!("{} connections, {} cuts left", proxy.connections(), proxy.cuts_left());
    assert!(proxy.connections() > 20, "the cuts did not take place");
    assert!(numbers == expected, "a number differs from the uninterrupted run's");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_between_any_two_frames_goes_on() {
    let (_, adapter) = undisturbed(4).await;
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (_client, h, session) = through(&proxy).await;
    for step in 0..4 {
        // The step before is on its way and not awaited.
        proxy.cut();
        let first = session.send_forward(input(3 * step, &[5, 2, 4], h)).await.unwrap();
        let second = session.send_forward(input(3 * step + 1, &[3, 6], h)).await.unwrap();
        proxy.cut();
        let (output, microbatch, _) = first.await.unwrap();
        proxy.cut();
        let first = microbatch.send_backward(output).await.unwrap();
        proxy.cut();
        let (output, microbatch, _) = second.await.unwrap();
        let second = microbatch.send_backward(output).await.unwrap();
        let evaluated = session.send_evaluate(input(3 * step + 2, &[7], h)).await.unwrap();
        proxy.cut();
        first.await.unwrap();
        let norm_squared = second.await.unwrap().norm_squared;
        evaluated.await.unwrap();
        session.step(0.01, (0.5 / norm_squared.sqrt()).min(1.0)).await.unwrap();
    }
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drained_restart_goes_on() {
    let (expected, adapter) = undisturbed(12).await;
    let store = tempfile::tempdir().unwrap();
    let mut server = TestServer::start_with(server_config(store.path())).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (_client, h, session) = through(&proxy).await;
    let mut numbers = train(&session, h, 0..2).await.unwrap();

    // Drained and started again while the client goes on without knowing.
    let running = tokio::spawn(async move {
        let numbers = train(&session, h, 2..12).await;
        (session, numbers)
    });
    for _ in 0..2 {
        server.drain().await;
        server = TestServer::start_with(server_config(store.path())).await;
        proxy.set_upstream(Some(server.address()));
    }
    let (session, rest) = running.await.unwrap();
    numbers.extend(rest.unwrap());
    assert!(numbers == expected, "a number differs from the uninterrupted run's");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_were_lost_survive_a_restart() {
    let mut adapters = Vec::new();
    for lost in [false, true] {
        let store = tempfile::tempdir().unwrap();
        let mut server = TestServer::start_with(server_config(store.path())).await;
        let proxy = Proxy::start(server.address()).await.unwrap();
        let (_client, h, session) = through(&proxy).await;
        train(&session, h, 0..2).await.unwrap();
        session.settle().await.unwrap();

        // The server takes both steps, and nobody hears of it. A step doubled would show.
        proxy.mute(lost);
        let first = session.step(0.01, 1.0).await.unwrap();
        let second = session.step(0.02, 1.0).await.unwrap();
        if lost {
            let watcher = Client::connect(&server.endpoint()).await.unwrap();
            while watcher.list_sessions().await.unwrap()[0].step < 4 {}
            proxy.set_upstream(None);
            proxy.cut();
            server.drain().await;
            server = TestServer::start_with(server_config(store.path())).await;
            proxy.mute(false);
            proxy.set_upstream(Some(server.address()));
        }
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (3, 4));
        train(&session, h, 2..3).await.unwrap();
        adapters.push(session.export().await.unwrap());
        server.drain().await;
    }
    assert_same_adapter(&adapters[1], &adapters[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_waits_for_an_open_microbatch() {
    let (_, adapter) = undisturbed(1).await;
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(server_config(store.path())).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (client, h, session) = through(&proxy).await;
    let (first_output, first, _) = session.forward(input(0, &[5, 2, 4], h)).await.unwrap();

    // A server that drains opens no sessions any more.
    let raw = raw::rpc(&proxy.endpoint()).await;
    let request = raw_open(&client).await;
    let drain = tokio::spawn(server.drain());
    while raw.clone().open_session(request.clone()).await.is_ok() {}
    assert!(!drain.is_finished(), "microbatch 1 is open");

    // A forward that came too late waits for the next server, and the backward passes it.
    let second = session.send_forward(input(1, &[3, 6], h)).await.unwrap();
    first.backward(first_output).await.unwrap();
    drain.await.unwrap();

    let server = TestServer::start_with(server_config(store.path())).await;
    proxy.set_upstream(Some(server.address()));
    let (output, microbatch, _) = second.await.unwrap();
    let norm_squared = microbatch.backward(output).await.unwrap().norm_squared;
    session.evaluate(input(2, &[7], h)).await.unwrap();
    session.step(0.01, (0.5 / norm_squared.sqrt()).min(1.0)).await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_waits_for_no_step_and_keeps_its_gradients() {
    let (_, adapter) = undisturbed(1).await;
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(server_config(store.path())).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (_client, h, session) = through(&proxy).await;
    let (output, first, _) = session.forward(input(0, &[5, 2, 4], h)).await.unwrap();
    let (second_output, second, _) = session.forward(input(1, &[3, 6], h)).await.unwrap();
    first.backward(output).await.unwrap();
    let norm_squared = second.backward(second_output).await.unwrap().norm_squared;
    session.evaluate(input(2, &[7], h)).await.unwrap();

    // The client is attached and says nothing.
    let drain = tokio::time::timeout(Duration::from_secs(20), server.drain());
    drain.await.expect("a drain that does not wait for the Step");
    let server = TestServer::start_with(server_config(store.path())).await;
    proxy.set_upstream(Some(server.address()));
    session.step(0.01, (0.5 / norm_squared.sqrt()).min(1.0)).await.unwrap();
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

async fn raw_open(client: &Client) -> v1::OpenSessionRequest {
    let server = client.describe().await.unwrap();
    v1::OpenSessionRequest {
        fingerprint: server.fingerprint,
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: Some(v1::LoraConfig { r: 2, lora_alpha: 2.0, ..Default::default() }),
        adamw: Some(offshoot_client::ADAMW_DEFAULTS),
        wire_dtype: v1::DType::DtypeF32 as i32,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_restart_rolls_back() {
    let (expected, adapter) = undisturbed(8).await;
    let store = tempfile::tempdir().unwrap();
    let server = Child::start(store.path());
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (client, h, session) = through(&proxy).await;
    let id = session.id().clone();
    train(&session, h, 0..3).await.unwrap();
    let snapshot = session.snapshot().await.unwrap();
    assert_eq!(snapshot.step, 3);

    // Killed while frames are on their way.
    let running = tokio::spawn(async move {
        train(&session, h, 3..5).await.unwrap();
        (train(&session, h, 5..u64::MAX).await.err().unwrap(), session)
    });
    let caught_up = async |client: &Client| loop {
        let sessions = client.list_sessions().await.unwrap();
        if sessions.iter().any(|s| s.id == id && s.step >= 5) {
            return;
        }
    };
    caught_up(&client).await;
    server.kill();
    let server = Child::start(store.path());
    proxy.set_upstream(Some(server.address()));
    let (error, session) = running.await.unwrap();
    println!("{error}");
    let ClientError::RolledBack { last_applied, answered, snapshots, .. } = error else {
        panic!("RolledBack, not {error}");
    };
    assert_eq!(snapshots.first(), Some(&snapshot));
    assert_eq!(last_applied, snapshot.sequence);
    assert!(answered > last_applied);
    // The session has ended, and says so again.
    let again = session.forward(input(0, &[1], h)).await.unwrap_err();
    assert!(matches!(again, ClientError::RolledBack { .. }), "{again}");

    let (session, restored) = client.restore(&id, Some(&snapshot.snapshot_id)).await.unwrap();
    assert_eq!(restored.snapshot, snapshot);
    let numbers = train(&session, h, 3..8).await.unwrap();
    assert!(numbers == expected[3..], "a number differs from the uninterrupted run's");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_asked_of_a_server_that_fell_back_is_a_rollback() {
    let store = tempfile::tempdir().unwrap();
    let mut server = Child::start(store.path());
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (client, h, mut session) = through(&proxy).await;
    let id = session.id().clone();
    for round in 0..5 {
        train(&session, h, round..round + 1).await.unwrap();
        let snapshot = session.snapshot().await.unwrap();
        train(&session, h, round + 1..round + 2).await.unwrap();
        session.settle().await.unwrap();
        server.kill();
        server = Child::start(store.path());
        proxy.set_upstream(Some(server.address()));
        // Nothing is on the stream: the call may be there before the stream knows anything.
        let error = session.snapshot().await.unwrap_err();
        assert!(matches!(error, ClientError::RolledBack { .. }), "{error}");
        session = client.restore(&id, Some(&snapshot.snapshot_id)).await.unwrap().0;
    }
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_right_after_a_snapshot_goes_on() {
    let (expected, adapter) = undisturbed(4).await;
    let store = tempfile::tempdir().unwrap();
    let mut server = Child::start(store.path());
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (_client, h, session) = through(&proxy).await;
    for step in 0..4 {
        // Nothing happened since the last snapshot: nothing is lost, nobody notices.
        let numbers = train(&session, h, step..step + 1).await.unwrap();
        assert!(numbers == expected[step as usize..=step as usize], "step {step}");
        session.snapshot().await.unwrap();
        server.kill();
        server = Child::start(store.path());
        proxy.set_upstream(Some(server.address()));
    }
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_frame_changes_nothing() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut adapters = Vec::new();
    for times in [1, 3] {
        let session = rpc.open_session(raw_open(&client).await).await.unwrap().into_inner();
        let id = session.session_id;
        let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
        for step in 0..3 {
            let forward = raw::forward(input(step, &[4, 3], h), step + 1, v1::Mode::Train);
            let answer = repeat(&mut rpc, &id, &mut stream, Body::Forward(forward), times).await;
            let server_frame::Body::Forward(done) = answer else { panic!("a forward") };
            let backward = v1::Backward { microbatch: step + 1, grad: done.hidden };
            repeat(&mut rpc, &id, &mut stream, Body::Backward(backward), times).await;
            let step = v1::Step { learning_rate: 0.01, clip_factor: 0.7, shared_loss: None };
            repeat(&mut rpc, &id, &mut stream, Body::Step(step), times).await;
        }
        let export = v1::ExportAdapterRequest { session_id: id, ..Default::default() };
        adapters.push(rpc.export_adapter(export).await.unwrap().into_inner());
    }
    assert_eq!(adapters[0].step, 3);
    assert!(adapters[0] == adapters[1], "repetition changed the adapter");
    server.drain().await;
}

/// Sends a body under the next number so many times, from the second one on over a new stream each.
async fn repeat(
    rpc: &mut raw::Rpc,
    id: &str,
    stream: &mut RawStream,
    body: Body,
    times: usize,
) -> server_frame::Body {
    let sequence = stream.next;
    let first = stream.apply(body.clone()).await;
    for _ in 1..times {
        let again = stream.ask(raw::frame(sequence, body.clone())).await;
        assert!(again.body.as_ref() == Some(&first), "another answer to frame {sequence}");
        *stream = RawStream::attach(rpc, id).await.unwrap();
        assert_eq!(stream.attached.last_applied, sequence);
        let again = stream.ask(raw::frame(sequence, body.clone())).await;
        assert!(again.body.as_ref() == Some(&first), "another answer to frame {sequence}");
    }
    first
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stays_away_is_given_up() {
    let server = TestServer::start().await;
    let endpoint = server.endpoint();
    let retry = Retry { max_elapsed: Duration::from_millis(100), ..quick().retry };
    let options = ClientOptions { retry, ..quick() };
    let client = Client::connect_with(&endpoint, options).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    session.evaluate(input(1, &[3], h)).await.unwrap();
    server.drain().await;
    let error = session.evaluate(input(1, &[3], h)).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&endpoint), "{error}");
    let error = client.list_sessions().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_waited_out() {
    let (expected, adapter) = undisturbed(3).await;
    let server = TestServer::start_limited(|limits| limits.max_queued_jobs = 1).await;
    let client = Client::connect_with(&server.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        running.spawn(async move {
            let numbers = train(&session, h, 0..3).await.unwrap();
            (numbers, session.export().await.unwrap())
        });
    }
    for (numbers, exported) in running.join_all().await {
        assert!(numbers == expected, "a number differs from the uninterrupted run's");
        assert_same_adapter(&exported, &adapter);
    }
    server.drain().await;
}
