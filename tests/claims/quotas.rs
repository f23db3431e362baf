//! What a tenant may have, refused before it is taken: over real sockets, as the wire says it.

use crate::tenants::{Row, Shared, token};
use offshoot_proto::WireDType;
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use offshoot_server::ServerConfig;
use offshoot_tests::raw::{self, RawStream, Rpc, bearing, frame};
use offshoot_tests::run::{input, open_request, train};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// One tenant, by the wire.
struct Caller {
    rpc: Rpc,
    token: String,
    about: v1::DescribeResponse,
}

impl Caller {
    async fn of(shared: &Shared, tenant: &str) -> Caller {
        let (mut rpc, token) = (raw::rpc(&shared.server.endpoint()).await, token(tenant));
        let about = rpc.describe(bearing(v1::DescribeRequest {}, &token)).await.unwrap();
        Caller { rpc, token, about: about.into_inner() }
    }

    async fn describe(&mut self) -> v1::DescribeResponse {
        let request = bearing(v1::DescribeRequest {}, &self.token);
        self.rpc.describe(request).await.unwrap().into_inner()
    }

    async fn memory(&mut self) -> v1::MemoryReport {
        self.describe().await.memory.unwrap()
    }

    async fn open(&mut self, r: u32) -> Result<v1::OpenSessionResponse, Status> {
        let lora = v1::LoraConfig { r, lora_alpha: 8.0, ..v1::LoraConfig::default() };
        let adamw = v1::AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
        let request = v1::OpenSessionRequest {
            fingerprint: self.about.fingerprint.clone(),
            split_point_1: self.about.split_point_1,
            split_point_2: self.about.split_point_2,
            lora: Some(lora),
            adamw: Some(adamw),
            wire_dtype: WireDType::F32.to_proto() as i32,
            ..v1::OpenSessionRequest::default()
        };
        self.rpc.open_session(bearing(request, &self.token)).await.map(tonic::Response::into_inner)
    }

    async fn close(&mut self, session_id: &str, forget: bool) {
        let request = v1::CloseSessionRequest { session_id: session_id.into(), forget };
        self.rpc.close_session(bearing(request, &self.token)).await.unwrap();
    }

    async fn attach(&mut self, id: &str) -> Result<RawStream, v1::FrameError> {
        RawStream::attach_with(&mut self.rpc, id, 0, &self.token).await
    }

    /// A training Forward of so many tokens in one sequence.
    fn forward(&self, microbatch: u64, n_tokens: u32) -> Body {
        let input = input(microbatch, &[n_tokens], self.about.hidden_size as usize);
        Body::Forward(raw::forward(input, microbatch, v1::Mode::Train))
    }

    fn backward(&self, microbatch: u64, n_tokens: u32) -> Body {
        let grad = input(microbatch + 100, &[n_tokens], self.about.hidden_size as usize).hidden;
        Body::Backward(v1::Backward { microbatch, grad: Some(grad.into_proto()) })
    }
}

/// What a status says of a quota: its name, limit and value, and when to try again.
fn refused(status: &Status) -> (String, i64, u64, Option<Duration>) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    println!("{}", status.message());
    let violation = status.get_details_quota_failure().unwrap().violations.remove(0);
    assert!(violation.subject.starts_with("tenant:"), "{violation:?}");
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let header = status.metadata().get("grpc-retry-pushback-ms");
    let header = header.map(|value| value.to_str().unwrap().parse::<u64>().unwrap());
    assert_eq!(header, retry.map(|retry| retry.as_millis() as u64));
    let value = violation.quota_dimensions["value"].parse().unwrap();
    for part in [&violation.quota_id, &violation.quota_value.to_string()] {
        assert!(status.message().contains(part.as_str()), "{part}: {}", status.message());
    }
    (violation.quota_id, violation.quota_value, value, retry)
}

/// The same of a refused frame.
fn frame_refused(error: &v1::FrameError) -> (&str, u64, u64, u32) {
    println!("{}", error.message);
    let Some(v1::QuotaViolation { quota, limit, value }) = &error.quota else {
        panic!("{error:?}")
    };
    assert_eq!(error.code(), v1::ErrorCode::Exhausted, "{error:?}");
    assert!(error.message.contains(quota.as_str()), "{error:?}");
    (quota.as_str(), *limit, *value, error.retry_after_millis)
}

const RED: Row<'static> = ("red", 1, "");

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_bounded_for_one_tenant_and_a_place_comes_free() {
    let quotas = "sessions = 2\nstored_sessions = 3";
    let shared = Shared::start(&[("blue", 1, quotas), RED], |_| {}).await;
    let mut blue = Caller::of(&shared, "blue").await;
    let mut red = Caller::of(&shared, "red").await;
    let (first, second) = (blue.open(2).await.unwrap(), blue.open(2).await.unwrap());
    let before = blue.memory().await;
    let status = blue.open(2).await.unwrap_err();
    let retry = Some(Duration::from_secs(5));
    assert_eq!(refused(&status), ("sessions".into(), 2, 3, retry));
    assert_eq!(blue.memory().await.adapter_bytes, before.adapter_bytes);
    for _ in 0..4 {
        red.open(2).await.unwrap();
    }
    // Parked, it is stored and not live.
    blue.close(&first.session_id, false).await;
    let third = blue.open(2).await.unwrap();
    // Its stream would make it live again.
    let refusal = blue.attach(&first.session_id).await.err().unwrap();
    assert_eq!(frame_refused(&refusal), ("sessions", 2, 3, 5000));
    blue.close(&third.session_id, false).await;
    let mut attached = blue.attach(&first.session_id).await.unwrap();
    attached.apply(blue.forward(1, 4)).await;
    drop(attached);
    blue.close(&second.session_id, false).await;
    let status = blue.open(2).await.unwrap_err();
    let (quota, limit, value, retry) = refused(&status);
    assert_eq!((quota.as_str(), limit, value, retry.is_some()), ("stored_sessions", 3, 4, true));
    blue.close(&third.session_id, true).await;
    blue.open(2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rank_and_microbatches_are_bounded_and_clients_are_told_before() {
    let quotas = "rank = 4\ntokens_per_microbatch = 16";
    let shared = Shared::start(&[("blue", 1, quotas), RED], |_| {}).await;
    let mut blue = Caller::of(&shared, "blue").await;
    let limits = blue.about.limits.unwrap();
    assert_eq!((limits.max_rank, limits.max_tokens_per_microbatch), (4, 16));
    let status = blue.open(5).await.unwrap_err();
    assert_eq!(refused(&status), ("rank".into(), 4, 5, None));
    assert_eq!(blue.memory().await.adapter_bytes, 0);
    let opened = blue.open(4).await.unwrap();
    assert_eq!(opened.limits.unwrap(), limits);
    let mut stream = blue.attach(&opened.session_id).await.unwrap();
    assert_eq!(stream.attached.limits.unwrap(), limits);
    let error = stream.refused(frame(stream.next, blue.forward(1, 17))).await;
    assert_eq!(frame_refused(&error), ("tokens_per_microbatch", 16, 17, 0));
    stream.apply(blue.forward(1, 16)).await;
    // Less from now on, for what runs as well; what is open has its backward.
    shared.change(&[("blue", 1, "tokens_per_microbatch = 8"), RED]);
    let deadline = Instant::now() + Duration::from_secs(30);
    while blue.describe().await.limits.unwrap().max_tokens_per_microbatch != 8 {
        assert!(Instant::now() < deadline, "the new file does not count");
    }
    let error = stream.refused(frame(stream.next, blue.forward(2, 9))).await;
    assert_eq!(frame_refused(&error), ("tokens_per_microbatch", 8, 9, 0));
    stream.apply(blue.backward(1, 16)).await;
    blue.open(5).await.unwrap();
    let mut red = Caller::of(&shared, "red").await;
    let opened = red.open(64).await.unwrap();
    let mut stream = red.attach(&opened.session_id).await.unwrap();
    stream.apply(red.forward(1, 100)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_on_the_device_are_bounded_and_an_idle_one_makes_room_for_its_own() {
    let one = {
        let shared = Shared::start(&[RED], |_| {}).await;
        Caller::of(&shared, "red").await.open(4).await.unwrap().adapter_bytes
    };
    let quota = format!("adapter_bytes = {}", one + one / 2);
    let shared = Shared::start(&[("blue", 1, &quota), RED], |config| {
        config.limits.admission_wait_seconds = 0.5;
        config.session.turn_seconds = 0.0;
    })
    .await;
    let mut blue = Caller::of(&shared, "blue").await;
    let first = blue.open(4).await.unwrap();
    let mut stream = blue.attach(&first.session_id).await.unwrap();
    stream.apply(blue.forward(1, 4)).await;
    // The first has an open microbatch and stays.
    let status = blue.open(4).await.unwrap_err();
    let (quota, limit, value, retry) = refused(&status);
    assert_eq!(quota, "adapter_bytes");
    assert_eq!((limit as u64, value, retry.is_some()), (one + one / 2, 2 * one, true));
    assert_eq!(blue.memory().await.adapter_bytes, one);
    // What never fits is not waited for.
    let status = blue.open(16).await.unwrap_err();
    assert_eq!(refused(&status).3, None);
    let mut red = Caller::of(&shared, "red").await;
    for _ in 0..3 {
        red.open(4).await.unwrap();
    }
    stream.apply(blue.backward(1, 4)).await;
    let second = blue.open(4).await.unwrap();
    assert_eq!(blue.memory().await.adapter_bytes, one);
    // And back, with the next frame.
    stream.apply(blue.forward(2, 4)).await;
    stream.apply(blue.backward(2, 4)).await;
    assert_eq!(blue.memory().await.adapter_bytes, one);
    blue.close(&second.session_id, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_bytes_are_bounded_and_a_backward_always_runs() {
    const N: u32 = 100;
    let wide = |config: &mut ServerConfig| config.limits.max_open_microbatches = 1000;
    let (full, cache) = {
        let shared = Shared::start(&[RED], |_| {}).await;
        let mut red = Caller::of(&shared, "red").await;
        let opened = red.open(4).await.unwrap();
        let mut stream = red.attach(&opened.session_id).await.unwrap();
        let answer = stream.apply(red.forward(1, N)).await;
        let server_frame::Body::Forward(done) = answer else { panic!("{answer:?}") };
        let server_frame::Body::Forward(next) = stream.apply(extend(&red, 1, 3)).await else {
            panic!("an Extend has an output")
        };
        (done.tape_bytes, next.cache_bytes)
    };
    assert!(full > 0 && cache > 0);
    // One tape as large as it likes; tapes that are kept smaller are some more.
    let quota = format!("open_bytes = {}", full.max(cache) + 100);
    let shared = Shared::start(&[("blue", 1, &quota), RED], wide).await;
    let mut blue = Caller::of(&shared, "blue").await;
    let opened = blue.open(4).await.unwrap();
    let mut stream = blue.attach(&opened.session_id).await.unwrap();
    let mut n_open = 0;
    let error = loop {
        let body = blue.forward(n_open + 1, N);
        match stream.ask(frame(stream.next, body)).await.body {
            Some(server_frame::Body::Error(error)) => break error,
            Some(_) => (stream.next, n_open) = (stream.next + 1, n_open + 1),
            None => panic!("an empty answer"),
        }
        assert!(n_open < 900, "nothing is refused");
    };
    let (quota, limit, value, retry) = frame_refused(&error);
    assert_eq!((quota, limit, retry > 0), ("open_bytes", full.max(cache) + 100, true));
    assert!(value > limit);
    let memory = blue.memory().await;
    assert!(memory.tape_bytes + memory.cache_bytes <= limit, "{memory:?}");
    assert_eq!(u64::from(memory.open_microbatches), n_open);
    let error = stream.refused(frame(stream.next, extend(&blue, 1, 3))).await;
    if memory.tape_bytes + cache > limit {
        assert_eq!(frame_refused(&error).0, "open_bytes");
    }
    let mut red = Caller::of(&shared, "red").await;
    let other = red.open(4).await.unwrap();
    let mut others = red.attach(&other.session_id).await.unwrap();
    for microbatch in 1..=4 {
        others.apply(red.forward(microbatch, N)).await;
    }
    for microbatch in 1..=n_open {
        stream.apply(blue.backward(microbatch, N)).await;
    }
    stream.apply(extend(&blue, 1, 3)).await;
    stream.apply(Body::DropCache(v1::DropCache { cache: 1 })).await;
    stream.apply(blue.forward(9, N)).await;
    stream.apply(blue.backward(9, N)).await;
    let memory = blue.memory().await;
    assert_eq!((memory.tape_bytes, memory.cache_bytes), (0, 0));
}

fn extend(caller: &Caller, cache: u64, n_tokens: u32) -> Body {
    let hidden = input(7, &[n_tokens], caller.about.hidden_size as usize).hidden.into_proto();
    Body::Extend(v1::Extend { cache, start: 0, hidden: Some(hidden) })
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_per_second_are_an_average_with_a_time_to_come_back() {
    let shared = Shared::start(&[("blue", 1, "tokens_per_second = 10"), RED], |_| {}).await;
    let mut blue = Caller::of(&shared, "blue").await;
    let opened = blue.open(2).await.unwrap();
    let mut stream = blue.attach(&opened.session_id).await.unwrap();
    // A burst of four seconds, at once.
    stream.apply(blue.forward(1, 40)).await;
    let error = stream.refused(frame(stream.next, blue.forward(2, 20))).await;
    let (quota, limit, value, retry) = frame_refused(&error);
    assert_eq!((quota, limit), ("tokens_per_second", 10));
    assert!(value > 10 && (1..=2001).contains(&retry), "{value} {retry}");
    // Backwards and steps are free.
    stream.apply(blue.backward(1, 40)).await;
    let step = v1::Step { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None };
    stream.apply(Body::Step(step)).await;
    let mut red = Caller::of(&shared, "red").await;
    let other = red.open(2).await.unwrap();
    let mut others = red.attach(&other.session_id).await.unwrap();
    others.apply(red.forward(1, 100)).await;
    // At the time that it was told, it fits.
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut wait = retry;
    loop {
        tokio::time::sleep(Duration::from_millis(wait.into())).await;
        match stream.ask(frame(stream.next, blue.forward(2, 20))).await.body {
            Some(server_frame::Body::Forward(_)) => break,
            Some(server_frame::Body::Error(error)) => wait = error.retry_after_millis.max(1),
            other => panic!("{other:?}"),
        }
        assert!(Instant::now() < deadline);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_waits_for_its_tokens_and_its_numbers_are_the_same() {
    let shared = Shared::start(&[("blue", 1, "tokens_per_second = 50"), RED], |_| {}).await;
    let mut exported = Vec::new();
    for tenant in ["blue", "red"] {
        let client = shared.client(tenant).await.unwrap();
        let h = client.describe().await.unwrap().hidden_size;
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        // 27 tokens each: eleven steps are more than the burst of 200.
        train(&session, h, 0..11).await.unwrap();
        exported.push(session.export().await.unwrap());
    }
    offshoot_tests::run::assert_same_adapter(&exported[0], &exported[1]);
}
