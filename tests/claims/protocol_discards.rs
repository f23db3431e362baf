//! Microbatches that are given up.

use super::breaks::{quick, through};
use offshoot_client::{Client, ErrorCode, Session};
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use offshoot_tests::proxy::Proxy;
use offshoot_tests::raw::{self, RawStream};
use offshoot_tests::run::{assert_same_adapter, input, open_request};
use offshoot_tests::{TestServer, server_config};
use std::time::Duration;
use tokio::time::Instant;

/// Tape bytes of the server's only session.
async fn tape_bytes(client: &Client) -> u64 {
    client.list_sessions().await.unwrap()[0].tape_bytes
}

/// Asks until neither the session nor the engine, which counts after it has answered, has a tape.
async fn until_no_tape(client: &Client) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let memory = client.describe().await.unwrap().memory;
        let left = (tape_bytes(client).await, memory.tape_bytes, memory.open_microbatches);
        if left == (0, 0, 0) {
            return;
        }
        assert!(Instant::now() < deadline, "{left:?}");
    }
}

/// One microbatch and a step.
async fn step(session: &Session, seed: u64, hidden_size: usize) {
    let (output, microbatch, _) = session.forward(input(seed, &[3, 6], hidden_size)).await.unwrap();
    microbatch.backward(output).await.unwrap();
    session.step(0.01, 0.5).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_dropped_leaves_no_tape_and_stands_in_no_steps_way() {
    let server = TestServer::start_limited(|limits| limits.max_open_microbatches = 2).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut adapters = Vec::new();
    for disturbed in [false, true] {
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        // Three times as many as may be open.
        for seed in 0..6 {
            if disturbed {
                let dropped = session.send_forward(input(100 + seed, &[5, 2], h)).await.unwrap();
                match seed % 3 {
                    // Before its answer, with the microbatch, after a refused backward.
                    0 => drop(dropped),
                    1 => drop(dropped.await.unwrap()),
                    _ => {
                        let (_, microbatch, _) = dropped.await.unwrap();
                        assert!(tape_bytes(&client).await > 0);
                        let wrong = input(1, &[3], h).hidden;
                        let error = microbatch.backward(wrong).await.unwrap_err();
                        println!("{error}");
                    }
                }
            }
            step(&session, seed, h).await;
        }
        session.settle().await.unwrap();
        assert_eq!(tape_bytes(&client).await, 0);
        until_no_tape(&client).await;
        adapters.push(session.export().await.unwrap());
        session.close(true).await.unwrap();
    }
    assert_same_adapter(&adapters[1], &adapters[0]);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_dropped_takes_its_microbatches_with_it() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let (_, microbatch, _) = session.forward(input(1, &[5, 2], h)).await.unwrap();
    drop(session);
    assert!(tape_bytes(&client).await > 0, "the microbatch is still wanted");
    drop(microbatch);
    until_no_tape(&client).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_what_is_given_up() {
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(server_config(store.path())).await;
    let client = Client::connect_with(&server.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let (_, microbatch, _) = session.forward(input(1, &[5, 2], h)).await.unwrap();
    let drain = tokio::spawn(server.drain());
    drop(microbatch);
    // Its own bound is a minute, and a session with an open microbatch would be lost.
    let bound = Duration::from_secs(20);
    tokio::time::timeout(bound, drain).await.expect("nothing is open any more").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_double_no_discard_and_lose_none() {
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let (client, h, session) = through(&proxy).await;
    for seed in 0..8 {
        let dropped = session.send_forward(input(100 + seed, &[5, 2], h)).await.unwrap();
        // Given up with its answer, or before it.
        if seed % 2 == 0 {
            let answered = dropped.await.unwrap();
            proxy.cut();
            drop(answered);
        } else {
            proxy.cut();
            drop(dropped);
        }
        step(&session, seed, h).await;
        proxy.cut();
    }
    session.settle().await.unwrap();
    assert_eq!(tape_bytes(&client).await, 0);
    assert_eq!(session.export().await.unwrap().step, 8);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discard_is_a_frame_like_others() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().to_string();
    drop(session);
    let mut stream = RawStream::attach(&mut raw::rpc(&server.endpoint()).await, &id).await.unwrap();
    let forward = raw::forward(input(1, &[4, 3], h), 7, v1::Mode::Train);
    let server_frame::Body::Forward(done) = stream.apply(Body::Forward(forward)).await else {
        panic!("a forward")
    };
    assert!(tape_bytes(&client).await > 0);

    // Again under the same number: the same answer. Under the next one: nothing is left to drop.
    let discard = Body::Discard(v1::Discard { microbatch: 7 });
    let number = stream.next;
    let first = stream.apply(discard.clone()).await;
    assert_eq!(first, server_frame::Body::Discard(v1::DiscardDone {}));
    assert_eq!(stream.ask(raw::frame(number, discard.clone())).await.body, Some(first.clone()));
    assert_eq!(stream.apply(discard).await, first);
    assert_eq!(tape_bytes(&client).await, 0);

    let backward = Body::Backward(v1::Backward { microbatch: 7, grad: done.hidden });
    let error = stream.refused(raw::frame(stream.next, backward)).await;
    assert_eq!(error.code(), ErrorCode::Microbatch, "{}", error.message);
    let step = v1::Step { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None };
    stream.apply(Body::Step(step)).await;
    server.drain().await;
}
