//! Bad requests: each gets an error that says what is wrong, and changes nothing.

use offshoot_client::{
    Client, ClientError, ClientOptions, ErrorCode, ForwardInput, HostTensor, OpenSession,
    SessionId, WireDType,
};
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use offshoot_tests::TestServer;
use offshoot_tests::proxy::Proxy;
use offshoot_tests::raw::{self, BadFrame, RawStream, check_protocol, frame};
use offshoot_tests::run::{assert_same_adapter, input, open_request, train, values};
use std::time::Duration;

const TRAIN: v1::Mode = v1::Mode::Train;

fn forward(input: ForwardInput) -> Option<Body> {
    Some(Body::Forward(raw::forward(input, 100, TRAIN)))
}

/// A forward whose values are changed after it was made.
fn changed(h: usize, change: impl Fn(&mut v1::Forward)) -> Option<Body> {
    let mut forward = raw::forward(input(5, &[4, 3], h), 100, TRAIN);
    change(&mut forward);
    Some(Body::Forward(forward))
}

fn with_value(h: usize, value: f32) -> HostTensor {
    let mut numbers = values(1, 7 * h);
    numbers[3 * h + 1] = value;
    HostTensor::from_f32(&numbers, vec![7, h], WireDType::F32)
}

fn bad_forwards(h: usize) -> Vec<BadFrame> {
    let good = input(5, &[4, 3], h);
    let bad = |what, body, names| BadFrame { what, body, code: ErrorCode::Invalid, names };
    let hidden = |hidden| forward(ForwardInput { hidden, ..good.clone() });
    let zeros = |shape: Vec<usize>, dtype| {
        HostTensor::from_f32(&vec![0.0; shape.iter().product()], shape, dtype)
    };
    vec![
        bad("too wide", hidden(zeros(vec![7, h + 1], WireDType::F32)), &["[7, 41]", "40"]),
        bad("one axis", hidden(zeros(vec![7 * h], WireDType::F32)), &["[280]", "40"]),
        bad("no rows", hidden(zeros(vec![0, h], WireDType::F32)), &["0"]),
        bad("other dtype", hidden(zeros(vec![7, h], WireDType::Bf16)), &["bf16", "f32"]),
        bad("NaN", hidden(with_value(h, f32::NAN)), &["hidden", "not finite", "121"]),
        bad("infinity", hidden(with_value(h, f32::NEG_INFINITY)), &["hidden", "not finite", "121"]),
        bad("short data", changed(h, |f| cut_data(f, 12)), &["1120 bytes", "1108"]),
        bad("no tensor", changed(h, |f| f.hidden = None), &["missing"]),
        bad("unknown dtype", changed(h, |f| hidden_of(f).dtype = 77), &["77"]),
        bad("huge shape", changed(h, |f| hidden_of(f).shape = vec![u32::MAX; 8]), &["too large"]),
        bad("many axes", changed(h, |f| hidden_of(f).shape = vec![1; 99_999]), &["99999", "8"]),
        bad("too few lengths", changed(h, |f| f.seq_lens = vec![4]), &["4", "7"]),
        bad("lengths that wrap", changed(h, |f| f.seq_lens = vec![u32::MAX, 8]), &["7"]),
        bad("no lengths", changed(h, |f| f.seq_lens = vec![]), &["seq_lens", "7"]),
        bad("empty sequence", changed(h, |f| f.seq_lens = vec![4, 0, 3]), &["sequence 1", "0"]),
        bad("positions", changed(h, |f| f.position_ids = vec![0, 1, 2]), &["3", "7"]),
        bad("no mode", changed(h, |f| f.mode = 0), &["mode"]),
        bad("unknown mode", changed(h, |f| f.mode = 9), &["mode"]),
        bad("no body", None, &["body"]),
        bad("second Hello", Some(Body::Hello(v1::Hello::default())), &["Hello"]),
        bad("too many tokens", forward(input(1, &[65], h)), &["65", "64"]),
        bad("learning rate", step(f64::NAN, 1.0), &["learning_rate", "NaN"]),
        bad("negative learning rate", step(-0.1, 1.0), &["learning_rate", "-0.1"]),
        bad("infinite clip factor", step(0.1, f64::INFINITY), &["clip_factor", "inf"]),
    ]
}

fn step(learning_rate: f64, clip_factor: f64) -> Option<Body> {
    Some(Body::Step(v1::Step { learning_rate, clip_factor, shared_loss: None }))
}

fn hidden_of(forward: &mut v1::Forward) -> &mut v1::Tensor {
    forward.hidden.get_or_insert_default()
}

fn cut_data(forward: &mut v1::Forward, bytes: usize) {
    let hidden = hidden_of(forward);
    hidden.data.truncate(hidden.data.len() - bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_frames_are_refused_and_the_session_goes_on() {
    let server = TestServer::start_limited(|limits| limits.max_tokens_per_microbatch = 64).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().to_string();
    drop(session);
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
    let good = raw::forward(input(5, &[4, 3], h), 0, v1::Mode::Eval);
    check_protocol(&mut stream, bad_forwards(h), &good).await;

    // The same for a backward, with its microbatch still there afterwards.
    let opened = raw::forward(input(6, &[4, 3], h), 100, TRAIN);
    let server_frame::Body::Forward(done) = stream.apply(Body::Forward(opened)).await else {
        panic!("a forward");
    };
    let grad = |tensor: HostTensor| {
        Some(Body::Backward(v1::Backward { microbatch: 100, grad: Some(tensor.into_proto()) }))
    };
    let zeros = |rows| HostTensor::from_f32(&vec![0.0; rows * h], vec![rows, h], WireDType::F32);
    let bad = |what, body, code, names| BadFrame { what, body, code, names };
    let nobody = v1::Backward { microbatch: 7, grad: done.hidden.clone() };
    check_protocol(
        &mut stream,
        vec![
            bad("other rows", grad(zeros(6)), ErrorCode::Invalid, &["[6, 40]", "7"]),
            bad("NaN", grad(with_value(h, f32::NAN)), ErrorCode::Invalid, &["grad", "not finite"]),
            bad("no tape", Some(Body::Backward(nobody)), ErrorCode::Microbatch, &["microbatch 7"]),
            bad("step too early", step(0.1, 1.0), ErrorCode::Microbatch, &["microbatch 100"]),
            bad(
                "microbatch twice",
                forward(input(6, &[4, 3], h)),
                ErrorCode::Microbatch,
                &["microbatch 100"],
            ),
        ],
        &good,
    )
    .await;
    stream.apply(Body::Backward(v1::Backward { microbatch: 100, grad: done.hidden })).await;
    stream
        .apply(Body::Step(v1::Step { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None }))
        .await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_payload_under_used_number_is_refused() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().to_string();
    drop(session);
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
    let good = Body::Forward(raw::forward(input(5, &[4, 3], h), 0, v1::Mode::Eval));
    let other = Body::Forward(raw::forward(input(6, &[4, 3], h), 0, v1::Mode::Eval));
    let first = stream.apply(good.clone()).await;

    let error = stream.refused(frame(1, other.clone())).await;
    assert_eq!(error.code(), ErrorCode::Sequence);
    assert!(error.message.contains("frame 1") && error.message.contains("payload"), "{error:?}");
    // The recorded answer is still the first one's.
    assert!(stream.ask(frame(1, good.clone())).await.body == Some(first));

    for (number, names) in [(5, "5"), (0, "0"), (u64::MAX, "18446744073709551615")] {
        let error = stream.refused(frame(number, good.clone())).await;
        let expected = if number == 0 { ErrorCode::Invalid } else { ErrorCode::Sequence };
        assert_eq!(error.code(), expected, "{number}: {}", error.message);
        assert!(error.message.contains(names), "{number}: {}", error.message);
    }
    let ahead = v1::ClientFrame { acknowledged: 9, ..frame(2, good.clone()) };
    let error = stream.refused(ahead).await;
    assert_eq!(error.code(), ErrorCode::Sequence);
    assert!(error.message.contains('9') && error.message.contains('1'), "{}", error.message);

    // An acknowledged answer is forgotten.
    let second = v1::ClientFrame { acknowledged: 1, ..frame(2, other) };
    assert!(matches!(stream.ask(second).await.body, Some(server_frame::Body::Forward(_))));
    let error = stream.refused(frame(1, good.clone())).await;
    assert_eq!(error.code(), ErrorCode::Sequence);
    stream.next = 3;
    stream.apply(good).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_do_not_fit_are_refused() {
    let server = TestServer::start_limited(|limits| limits.max_rank = 16).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let good = open_request(&client).await.unwrap();
    type Change = fn(&mut OpenSession);
    let cases: &[(&str, Change, &[&str])] = &[
        ("fingerprint", |s| s.fingerprint = "c0ffee".into(), &["fingerprint", "c0ffee"]),
        ("split", |s| s.split_point_2 = 4, &["1..3", "1..4"]),
        ("rank 0", |s| s.lora.r = 0, &["r ", "0"]),
        ("rank too large", |s| s.lora.r = 17, &["17", "16"]),
        ("alpha", |s| s.lora.lora_alpha = f64::NAN, &["lora_alpha", "NaN"]),
        ("no alpha", |s| s.lora.lora_alpha = 0.0, &["lora_alpha", "0"]),
        ("dropout", |s| s.lora.lora_dropout = 1.0, &["lora_dropout", "1"]),
        (
            "unknown target",
            |s| s.lora.target_modules = vec!["q_proj".into(), "query".into()],
            &["query", "q_proj"],
        ),
        ("beta", |s| s.adamw.beta2 = 1.0, &["beta2", "1"]),
        ("eps", |s| s.adamw.eps = -1.0, &["eps", "-1"]),
        ("weight decay", |s| s.adamw.weight_decay = f64::INFINITY, &["weight_decay", "inf"]),
        (
            "initial adapter with holes",
            |s| {
                let tensor = HostTensor::from_f32(&[0.0], vec![1, 1], WireDType::F32);
                s.initial_adapter = vec![("nonsense".into(), tensor)];
            },
            &["nonsense"],
        ),
    ];
    for (what, change, names) in cases {
        let mut request = good.clone();
        change(&mut request);
        let error = client.open(request).await.unwrap_err();
        println!("{what}: {error}");
        assert_eq!(error.code(), Some(ErrorCode::Invalid), "{what}: {error}");
        for name in *names {
            assert!(error.to_string().contains(name), "{what}: {name:?} is not in \"{error}\"");
        }
    }
    assert!(client.list_sessions().await.unwrap().is_empty(), "a refused session is left");
    let session = client.open(good).await.unwrap();
    session.close(true).await.unwrap();
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_sessions_are_not_found() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let mut rpc = raw::rpc(&server.endpoint()).await;
    for id in ["", "nonsense", "../../etc", "123e4567e89b42d3a456426614174000"] {
        let session_id = id.to_string();
        let id = SessionId::from(id);
        for error in [
            client.restore(&id, None).await.err().unwrap(),
            client.close_session(&id, true).await.unwrap_err(),
        ] {
            assert_eq!(error.code(), Some(ErrorCode::NotFound), "{error}");
        }
        let snapshot = v1::SnapshotRequest { session_id: session_id.clone(), ..Default::default() };
        let status = rpc.snapshot(snapshot).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
        let export =
            v1::ExportAdapterRequest { session_id: session_id.clone(), ..Default::default() };
        let status = rpc.export_adapter(export).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
        let error = RawStream::attach(&mut rpc, &session_id).await.err().unwrap();
        assert_eq!(error.code(), ErrorCode::NotFound, "{}", error.message);
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nan_stays_home() {
    let alone = TestServer::start().await;
    let client = Client::connect(&alone.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let expected = train(&session, h, 0..6).await.unwrap();
    let adapter = session.export().await.unwrap();
    alone.drain().await;

    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let wild = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let (done, mut over) = tokio::sync::oneshot::channel();
    let noise = tokio::spawn(async move {
        let mut refusals = 0;
        while over.try_recv().is_err() {
            // NaN is refused at the edge; 3e38 is finite and overflows inside.
            for value in [f32::NAN, 3e38] {
                let input = ForwardInput { hidden: with_value(h, value), ..input(1, &[4, 3], h) };
                match wild.forward(input).await {
                    Err(ClientError::Refused { .. }) => refusals += 1,
                    Err(other) => panic!("{other}"),
                    Ok((_, microbatch, _)) => {
                        let grad =
                            HostTensor::from_f32(&vec![3e38; 7 * h], vec![7, h], WireDType::F32);
                        if microbatch.backward(grad).await.is_err() {
                            refusals += 1;
                        }
                        let _ = wild.step(1e30, 1.0).await.unwrap().await;
                    }
                }
            }
        }
        refusals
    });
    let numbers = train(&session, h, 0..6).await.unwrap();
    done.send(()).unwrap();
    println!("{} refusals beside it", noise.await.unwrap());
    assert!(numbers == expected, "the neighbour changed a number");
    assert_same_adapter(&session.export().await.unwrap(), &adapter);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_frames_take_only_those_behind_them() {
    let server = TestServer::start().await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let client = Client::connect(&proxy.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let good = input(1, &[4, 3], h);
    let bad = ForwardInput { hidden: with_value(h, f32::NAN), ..good.clone() };

    let expected = session.evaluate(good.clone()).await.unwrap();
    // All three are under way before anything is answered.
    proxy.hold(true);
    let before = session.send_evaluate(good.clone()).await.unwrap();
    let refused = session.send_forward(bad).await.unwrap();
    let behind = session.send_evaluate(good.clone()).await.unwrap();
    proxy.hold(false);
    assert!(before.await.unwrap() == expected);
    let error = refused.await.err().unwrap();
    assert!(matches!(error, ClientError::Refused { code: ErrorCode::Invalid, .. }), "{error}");
    assert!(!error.ends_session());
    let error = behind.await.unwrap_err();
    assert!(matches!(error, ClientError::Aborted { .. }), "{error}");
    assert!(error.to_string().contains("not finite"), "{error}");
    assert!(session.evaluate(good.clone()).await.unwrap() == expected);

    // A step that nobody waits for is not refused in silence.
    drop(session.step(f64::NAN, 1.0).await.unwrap());
    let error = session.snapshot().await.unwrap_err();
    assert!(error.to_string().contains("learning_rate"), "{error}");
    session.snapshot().await.unwrap();
    assert!(session.evaluate(good).await.unwrap() == expected);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_says_what_is_wrong() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options =
        ClientOptions { connect_patience: Duration::from_millis(50), ..ClientOptions::default() };
    let error = Client::connect_with(&free.to_string(), options.clone()).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    for name in [&free.to_string(), "refused", "offshoot serve"] {
        assert!(error.to_string().contains(name), "{error}");
    }
    let error = Client::connect_with("localhost", options).await.unwrap_err();
    assert!(matches!(error, ClientError::BadEndpoint { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_answered_in_order() {
    let server = TestServer::start_limited(|limits| limits.max_frames_in_flight = 2).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().to_string();
    drop(session);
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
    let good = Body::Forward(raw::forward(input(5, &[60], h), 0, v1::Mode::Eval));
    for sequence in 1..=50 {
        stream.send(frame(sequence, good.clone())).await;
    }
    let mut applied = 0;
    for sequence in 1..=50 {
        let answer = stream.answer().await;
        assert_eq!(answer.sequence, sequence);
        match answer.body {
            Some(server_frame::Body::Error(error)) => {
                assert!(
                    matches!(error.code(), ErrorCode::Exhausted | ErrorCode::Sequence),
                    "{error:?}"
                );
                assert_eq!(error.retry_after_millis > 0, error.code() == ErrorCode::Exhausted);
            }
            Some(_) => applied += 1,
            None => panic!("an empty answer"),
        }
    }
    println!("{applied} of 50 applied");
    stream.next = applied + 1;
    stream.apply(good).await;
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_frame_is_hello() {
    let server = TestServer::start().await;
    let mut rpc = raw::rpc(&server.endpoint()).await;
    let step = v1::Step { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None };
    let hello = v1::Hello::default();
    for (first, names) in [
        (Some(frame(1, Body::Step(step))), ["Hello", "Step with sequence 1"]),
        (Some(frame(3, Body::Hello(hello))), ["Hello", "sequence 3"]),
        (Some(v1::ClientFrame::default()), ["Hello", "empty frame"]),
        (None, ["Hello", "end"]),
    ] {
        let stream = tokio_stream::iter(first);
        let mut answers = rpc.train(stream).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().expect("an answer");
        let Some(server_frame::Body::Error(error)) = answer.body else { panic!("{answer:?}") };
        assert_eq!((answer.sequence, error.code()), (0, ErrorCode::Invalid), "{}", error.message);
        for name in names {
            assert!(error.message.contains(name), "{name:?} is not in {:?}", error.message);
        }
        assert!(answers.message().await.unwrap().is_none(), "the stream ends");
    }
    server.drain().await;
}
