//! Caches that are lost: nothing but time is lost with them.

use super::*;
use offshoot_client::{ClientOptions, Residency, Retry};
use offshoot_tests::memory::until_memory;
use offshoot_tests::proxy::Proxy;
use std::time::Duration;

/// Comes back quickly and does not give up before the test does.
fn quick() -> ClientOptions {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    ClientOptions { retry, ..ClientOptions::default() }
}

/// The next token of a sequence, as a client that generates asks for it: from the beginning, if the
/// cache is gone. Whether it was.
async fn token(session: &Session, token: usize, h: usize) -> (Vec<f32>, bool) {
    match session.extend(next(7, token..token + 1, h)).await {
        Ok((row, _)) => (row.to_f32(), false),
        Err(error) if error.is_cache_gone() => {
            let (all, _) = session.extend(next(7, 0..token + 1, h)).await.unwrap();
            (all.to_f32()[token * h..].to_vec(), true)
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_comes_again_extends_once() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut stream = RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
    let extend = |tokens: Range<usize>| {
        let hidden = Some(rows(7, tokens.clone(), h).into_proto());
        Body::Extend(v1::Extend { cache: 1, start: tokens.start as u32, hidden })
    };
    stream.apply(extend(0..4)).await;
    let sent = raw::frame(stream.next, extend(4..6));
    let first = stream.ask(sent.clone()).await;
    // On this stream and, as after a break, on another one.
    assert_eq!(stream.ask(sent.clone()).await, first);
    let epoch = stream.attached.epoch;
    let mut stream = RawStream::attach_again(&mut rpc, session.id().as_str(), epoch).await.unwrap();
    assert_eq!(stream.attached.last_applied, sent.sequence);
    assert_eq!(stream.ask(sent.clone()).await, first);
    let other = raw::frame(sent.sequence, extend(4..5));
    assert_eq!(stream.refused(other).await.code(), v1::ErrorCode::Sequence);
    // It holds six tokens, not eight.
    let error = stream.refused(raw::frame(stream.next, extend(8..9))).await;
    assert_eq!(error.code(), v1::ErrorCode::Cache, "{}", error.message);
    assert!(error.message.contains("holds 6 tokens"), "{}", error.message);
    stream.apply(extend(6..7)).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generation_goes_on_through_broken_connections_and_a_restart() {
    let store = tempfile::tempdir().unwrap();
    let mut server = TestServer::start_with(server_config(store.path())).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = trained(&client, 3).await;
    let (prefill, _) = session.extend(next(7, 0..6, h)).await.unwrap();
    let (mut output, mut lost) = (prefill.to_f32(), Vec::new());
    for n in 6..N_TOKENS {
        match n {
            // The connection alone loses nothing.
            8 | 9 => proxy.cut(),
            12 => {
                server.drain().await;
                server = TestServer::start_with(server_config(store.path())).await;
                proxy.set_upstream(Some(server.address()));
            }
            _ => {}
        }
        let (row, was_lost) = token(&session, n, h).await;
        output.extend(row);
        lost.extend(was_lost.then_some(n));
    }
    assert_eq!(lost, [12]);
    assert_close("sequence", &output, &whole(&session, 7, h).await);

    // Set back to a snapshot, its caches are those of nobody.
    let snapshot = session.snapshot().await.unwrap();
    let (again, _) = client.restore(session.id(), Some(&snapshot.snapshot_id)).await.unwrap();
    let error = again.extend(next(7, 19..20, h)).await.unwrap_err();
    assert!(error.is_cache_gone(), "{error}");
    assert_eq!(memory(&client).await.cache_bytes, 0);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generation_goes_on_while_servers_drain_under_it() {
    let store = tempfile::tempdir().unwrap();
    let mut server = TestServer::start_with(server_config(store.path())).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let client = Client::connect_with(&proxy.endpoint(), quick()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = trained(&client, 4).await;
    let all = whole(&session, 7, h).await;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(async move {
        let (mut n_tokens, mut n_lost) = (0, 0);
        // At least one whole sequence after the last drain.
        let mut again = 2;
        while again > 0 {
            for n in 0..N_TOKENS {
                let (row, was_lost) = token(&session, n, h).await;
                let expected = &all[n * h..(n + 1) * h];
                let apart = row.iter().zip(expected).map(|(a, b)| (a - b).abs());
                assert!(apart.fold(0f32, f32::max) < 1e-4, "token {n} after {n_tokens}");
                n_tokens += 1;
                n_lost += usize::from(was_lost);
            }
            again = if stopped.is_empty() { again } else { again - 1 };
        }
        (n_tokens, n_lost)
    });
    for _ in 0..2 {
        server.drain().await;
        server = TestServer::start_with(server_config(store.path())).await;
        proxy.set_upstream(Some(server.address()));
    }
    stop.send(()).unwrap();
    let (n_tokens, n_lost) = running.await.unwrap();
    println!("{n_lost} of {n_tokens} tokens began again");
    assert!(n_lost <= 2, "only a drain loses a cache, but {n_lost} began again");
    server.drain().await;
}

/// Large beside what a microbatch needs.
const RANK: u32 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn two_who_generate_in_the_room_of_one_both_get_there() {
    let open = async |client: &Client, seed| {
        let mut request = open_request(client).await.unwrap();
        (request.lora.r, request.seed) = (RANK, seed);
        client.open(request).await.unwrap()
    };
    let sizes = TestServer::start().await;
    let client = Client::connect(&sizes.endpoint()).await.unwrap();
    open(&client, 0).await;
    let MemoryReport { weights_bytes, adapter_bytes, .. } = memory(&client).await;
    sizes.drain().await;

    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.limits.memory_bytes = Some(weights_bytes + adapter_bytes + adapter_bytes / 2);
    config.limits.max_tokens_per_microbatch = 32;
    config.session.turn_seconds = 0.0;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let sessions = [open(&client, 1).await, open(&client, 2).await];
    let mut outputs = [Vec::new(), Vec::new()];
    let mut n_lost = 0;
    for n in 0..N_TOKENS {
        for (session, output) in sessions.iter().zip(&mut outputs) {
            let (row, was_lost) = token(session, n, h).await;
            output.extend(row);
            n_lost += usize::from(was_lost);
        }
    }
    println!("{n_lost} of {} tokens began again", 2 * N_TOKENS);
    assert!(n_lost >= N_TOKENS, "only one of them has room at a time, but {n_lost} began again");
    let listed = client.list_sessions().await.unwrap();
    let of = |session: &Session| listed.iter().find(|info| info.id == *session.id()).unwrap();
    assert_eq!(of(&sessions[0]).residency, Residency::Disk);
    let now = memory(&client).await;
    assert_eq!((now.open_caches, now.sessions_on_device), (1, 1));
    assert!(now.peak.unwrap().total_bytes <= now.budget_bytes, "{now:?}");
    for (session, output) in sessions.iter().zip(&outputs) {
        assert_close("sequence", output, &whole(session, 7, h).await);
    }
    for session in sessions {
        session.close(true).await.unwrap();
    }
    let is_empty = |m: &MemoryReport| (m.cache_bytes, m.adapter_bytes, m.tape_bytes) == (0, 0, 0);
    until_memory(&client, "empty", is_empty).await;
    server.drain().await;
}
