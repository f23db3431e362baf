//! Sequences that go on: their keys and values stay on the server, only the new rows travel, and the
//! numbers are those of one forward over all rows, whatever happens to the cache meanwhile.

#[path = "generation/lost.rs"]
mod lost;

use offshoot_client::{
    Client, ClientError, ErrorCode, ExtendInput, ForwardInput, HostTensor, MemoryReport,
    OpenSession, Session, WireDType,
};
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use offshoot_server::ServerConfig;
use offshoot_tests::raw::{self, RawStream};
use offshoot_tests::run::{open_request, train, values};
use offshoot_tests::{TestServer, fixture, server_config};
use prost::Message;
use std::ops::Range;

/// What float32 may differ, relative to the largest value.
const F32: f64 = 1e-5;
/// Tokens of every sequence here.
const N_TOKENS: usize = 20;

/// A session whose adapter does something.
async fn trained(client: &Client, seed: u64) -> Session {
    let request = OpenSession { seed, ..open_request(client).await.unwrap() };
    let session = client.open(request).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    train(&session, h, 0..2).await.unwrap();
    session.settle().await.unwrap();
    session
}

/// Rows of a sequence: the same for the same number.
fn rows(sequence: u64, tokens: Range<usize>, h: usize) -> HostTensor {
    let all = values(sequence, N_TOKENS * h);
    let shape = vec![tokens.len(), h];
    HostTensor::from_f32(&all[tokens.start * h..tokens.end * h], shape, WireDType::F32)
}

fn next(sequence: u64, tokens: Range<usize>, h: usize) -> ExtendInput {
    let (cache, start) = (sequence, tokens.start as u32);
    ExtendInput { cache, start, hidden: rows(sequence, tokens, h) }
}

/// What one forward over all rows gives.
async fn whole(session: &Session, sequence: u64, h: usize) -> Vec<f32> {
    let input = ForwardInput {
        hidden: rows(sequence, 0..N_TOKENS, h),
        seq_lens: vec![N_TOKENS as u32],
        position_ids: vec![],
        want_input_grad: false,
        dropout_key: 0,
    };
    session.evaluate(input).await.unwrap().to_f32()
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    let far = f64::from(apart / largest);
    println!("{what}: {far:.1e}");
    assert!(far < F32, "{what}: {far:.1e}");
}

async fn memory(client: &Client) -> MemoryReport {
    client.describe().await.unwrap().memory
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_over_the_wire_equal_one_forward_for_every_family() {
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let store = tempfile::tempdir().unwrap();
        let mut config = server_config(store.path());
        config.model.name = fixture(family).display().to_string();
        let server = TestServer::start_with(config).await;
        let client = Client::connect(&server.endpoint()).await.unwrap();
        let h = client.describe().await.unwrap().hidden_size;
        let session = trained(&client, 5).await;
        let before = memory(&client).await;

        // Two sequences of one session, token by token in turn.
        let mut outputs = [Vec::new(), Vec::new()];
        for (sequence, output) in (1..).zip(&mut outputs) {
            let (prefill, report) = session.extend(next(sequence, 0..13, h)).await.unwrap();
            output.extend(prefill.to_f32());
            assert_eq!((report.batch_jobs, report.batch_tokens), (1, 13));
            assert!(report.cache_bytes > 0 && report.tape_bytes == 0);
        }
        for token in 13..N_TOKENS {
            // Both on their way at once.
            let first = session.send_extend(next(1, token..token + 1, h)).await.unwrap();
            let second = session.send_extend(next(2, token..token + 1, h)).await.unwrap();
            for (pending, output) in [first, second].into_iter().zip(&mut outputs) {
                output.extend(pending.await.unwrap().0.to_f32());
            }
        }
        let now = memory(&client).await;
        assert_eq!(now.open_caches, 2);
        assert_eq!(now.cache_bytes, now.peak.unwrap().cache_bytes);
        let listed = client.list_sessions().await.unwrap();
        assert_eq!(listed[0].cache_bytes, now.cache_bytes);
        println!("{family}: {} bytes of caches", now.cache_bytes);
        for (sequence, output) in (1..).zip(&outputs) {
            assert_close(family, output, &whole(&session, sequence, h).await);
        }
        session.drop_cache(1).await.unwrap();
        session.drop_cache(2).await.unwrap();
        let MemoryReport { cache_bytes, open_caches, adapter_bytes, tape_bytes, .. } =
            memory(&client).await;
        assert_eq!((cache_bytes, open_caches), (0, 0));
        assert_eq!((adapter_bytes, tape_bytes), (before.adapter_bytes, before.tape_bytes));
        server.drain().await;
    }
}

/// What a frame adds to its row: names, lengths, shape, timing.
const FRAME_BYTES: usize = 64;

#[tokio::test(flavor = "multi_thread")]
async fn a_token_costs_one_row_each_way_however_long_its_sequence_is() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let mut rpc = raw::rpc(&server.endpoint()).await;
    for (dtype, row_bytes) in [(WireDType::F32, 4 * h), (WireDType::Bf16, 2 * h)] {
        let request = OpenSession { wire_dtype: dtype, ..open_request(&client).await.unwrap() };
        let session = client.open(request).await.unwrap();
        let mut stream = RawStream::attach(&mut rpc, session.id().as_str()).await.unwrap();
        let mut extend = async |tokens: Range<usize>| {
            let hidden = rows(3, tokens.clone(), h).to_f32();
            let hidden = HostTensor::from_f32(&hidden, vec![tokens.len(), h], dtype).into_proto();
            let (cache, start) = (1, tokens.start as u32);
            let body = Body::Extend(v1::Extend { cache, start, hidden: Some(hidden) });
            let sent = raw::frame(stream.next, body);
            let came = stream.ask(sent.clone()).await;
            stream.next += 1;
            let Some(server_frame::Body::Forward(done)) = &came.body else { panic!("{came:?}") };
            let Some(v1::client_frame::Body::Extend(asked)) = &sent.body else { panic!() };
            let tensors = [&asked.hidden, &done.hidden].map(|t| t.as_ref().unwrap().data.len());
            assert_eq!(tensors, [tokens.len() * row_bytes; 2]);
            [sent.encoded_len(), came.encoded_len()]
        };
        extend(0..1).await;
        let mut largest = [0; 2];
        for token in 1..N_TOKENS {
            let bytes = extend(token..token + 1).await;
            assert!(bytes.iter().all(|&b| b < row_bytes + FRAME_BYTES), "{token}: {bytes:?}");
            largest = [0, 1].map(|i| largest[i].max(bytes[i]));
        }
        println!("{dtype:?}: a row has {row_bytes} bytes; frames have at most {largest:?}");
    }
    server.drain().await;
}

/// Decode steps of so many sessions begin as soon as all have sent their token.
fn in_step(n_sessions: usize, config: ServerConfig) -> ServerConfig {
    let mut config = config;
    config.limits.max_tokens_per_batch = n_sessions;
    // Never over in a test that passes.
    config.limits.batch_wait_seconds = 10.0;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_decode_together_get_what_each_gets_alone() {
    const N: usize = 4;
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(in_step(N, server_config(store.path()))).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let (mut sessions, mut outputs) = (Vec::new(), Vec::new());
    for seed in 0..N {
        let session = trained(&client, seed as u64).await;
        // Other lengths, so that their rows stand at other positions.
        let (prefill, _) = session.extend(next(7, 0..5 + seed, h)).await.unwrap();
        outputs.push(prefill.to_f32());
        sessions.push(session);
    }
    for token in 5..N_TOKENS - N + 1 {
        let mut pending = Vec::new();
        for (i, session) in sessions.iter().enumerate() {
            let token = token + i;
            pending.push(session.send_extend(next(7, token..token + 1, h)).await.unwrap());
        }
        for (pending, output) in pending.into_iter().zip(&mut outputs) {
            let (row, report) = pending.await.unwrap();
            assert_eq!(report.batch_jobs as usize, N);
            output.extend(row.to_f32());
        }
    }
    for (session, output) in sessions.iter().zip(&outputs) {
        let all = whole(session, 7, h).await;
        assert_close("together", output, &all[..output.len()]);
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_cache_cannot_do_is_refused_with_what_to_do() {
    let server = TestServer::start_limited(|limits| {
        limits.max_open_caches = 2;
        limits.max_cache_tokens = 16;
    })
    .await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let (session, other) = (trained(&client, 1).await, trained(&client, 2).await);
    assert_eq!((session.limits().max_open_caches, session.limits().max_cache_tokens), (2, 16));
    let refused = async |session: &Session, sequence, tokens: Range<usize>| {
        let error = session.extend(next(sequence, tokens, h)).await.unwrap_err();
        assert!(matches!(error, ClientError::Refused { .. }) && !error.ends_session(), "{error}");
        println!("{error}");
        error
    };
    session.extend(next(1, 0..5, h)).await.unwrap();
    // More than it holds.
    let error = refused(&session, 1, 7..8).await;
    assert!(error.is_cache_gone() && error.to_string().contains("holds 5 tokens"), "{error}");
    // Another session's number.
    assert!(refused(&other, 1, 5..6).await.is_cache_gone());
    // One that is not there.
    assert!(refused(&session, 9, 5..6).await.is_cache_gone());
    // Too long for a cache.
    let error = refused(&session, 1, 5..17).await;
    assert_eq!(error.code(), Some(ErrorCode::Invalid), "{error}");
    assert!(error.to_string().contains("17 tokens") && error.to_string().contains("16"), "{error}");
    // Too many.
    session.extend(next(2, 0..1, h)).await.unwrap();
    let error = refused(&session, 3, 0..1).await;
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{error}");
    session.drop_cache(2).await.unwrap();
    session.extend(next(3, 0..1, h)).await.unwrap();

    // A Forward is not disturbed by any of this, and the caches are where they were.
    let (row, _) = session.extend(next(1, 5..6, h)).await.unwrap();
    let all = whole(&session, 1, h).await;
    assert_close("after refusals", &row.to_f32(), &all[5 * h..6 * h]);
    // Back to a prefix, and on from there.
    let (row, _) = session.extend(next(1, 2..4, h)).await.unwrap();
    assert_close("after going back", &row.to_f32(), &all[2 * h..4 * h]);

    // Of older weights.
    session.step(0.01, 1.0).await.unwrap().await.unwrap();
    assert!(refused(&session, 1, 4..5).await.is_cache_gone());
    assert_eq!(memory(&client).await.open_caches, 0);
    server.drain().await;
}
