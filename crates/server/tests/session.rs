//! A session's life through the generated client on a real socket, with the tiny llama of the
//! fixtures. The product's claims, through the SDK, are in the workspace's `tests/`.

use offshoot_proto::v1::{
    self, client_frame, server_frame, trunk_service_client::TrunkServiceClient,
};
use offshoot_proto::{HostTensor, WireDType};
use offshoot_server::{RunningServer, Server, ServerConfig};
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

type Rpc = TrunkServiceClient<Channel>;
use client_frame::Body as Ask;
use server_frame::Body as Answer;

const HIDDEN: usize = 40;
/// Longer than any drain here should take.
const PATIENCE: Duration = Duration::from_secs(60);

async fn start(store: &Path) -> (RunningServer, Rpc) {
    let mut config = ServerConfig::default();
    config.listen.port = 0;
    config.model.name = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama").into();
    config.model.split_point_1 = 1;
    config.model.split_point_2 = 3;
    config.model.n_threads = Some(1);
    config.store.dir = store.into();
    let server = Server::start(config).await.unwrap();
    let rpc = Rpc::connect(format!("http://{}", server.local_addr())).await.unwrap();
    (server, rpc)
}

async fn opening(rpc: &mut Rpc) -> v1::OpenSessionRequest {
    let described = rpc.describe(v1::DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((described.hidden_size, described.model_type.as_str()), (HIDDEN as u32, "llama"));
    v1::OpenSessionRequest {
        name: "test".into(),
        fingerprint: described.fingerprint,
        split_point_1: described.split_point_1,
        split_point_2: described.split_point_2,
        lora: Some(v1::LoraConfig { r: 3, lora_alpha: 6.0, ..Default::default() }),
        adamw: Some(v1::AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }),
        seed: 5,
        wire_dtype: v1::DType::DtypeF32 as i32,
        initial_adapter: Vec::new(),
    }
}

async fn open(rpc: &mut Rpc) -> String {
    let opening = opening(rpc).await;
    rpc.open_session(opening).await.unwrap().into_inner().session_id
}

struct Stream {
    attached: v1::Attached,
    out: mpsc::Sender<v1::ClientFrame>,
    answers: tonic::Streaming<v1::ServerFrame>,
}

impl Stream {
    async fn attach(rpc: &mut Rpc, session: &str, last_answered: u64) -> Stream {
        let (out, frames) = mpsc::channel(16);
        let hello = v1::Hello { session_id: session.into(), last_answered, ..Default::default() };
        out.send(frame(0, Ask::Hello(hello))).await.unwrap();
        let mut answers = rpc.train(ReceiverStream::new(frames)).await.unwrap().into_inner();
        let first = answers.message().await.unwrap().unwrap();
        let Some(Answer::Attached(attached)) = first.body else { panic!("{first:?}") };
        Stream { attached, out, answers }
    }

    async fn send(&mut self, sequence: u64, body: Ask) {
        self.out.send(frame(sequence, body)).await.unwrap();
    }

    async fn next(&mut self) -> v1::ServerFrame {
        self.answers.message().await.unwrap().expect("an answer")
    }

    async fn ask(&mut self, sequence: u64, body: Ask) -> Answer {
        self.send(sequence, body).await;
        let answer = self.next().await;
        assert_eq!(answer.sequence, sequence);
        answer.body.unwrap()
    }

    async fn refused(&mut self, sequence: u64, body: Ask) -> v1::ErrorCode {
        match self.ask(sequence, body).await {
            Answer::Error(error) => error.code(),
            other => panic!("{other:?}"),
        }
    }

    /// Forward, Backward and Step, beginning with this number.
    async fn train(&mut self, sequence: u64) -> f64 {
        let forward = self.ask(sequence, forward(sequence, 1)).await;
        assert!(matches!(forward, Answer::Forward(_)), "{forward:?}");
        let answer = self.ask(sequence + 1, backward(sequence, 5)).await;
        let Answer::Backward(done) = answer else { panic!("{answer:?}") };
        let stepped = self.ask(sequence + 2, step()).await;
        assert!(matches!(stepped, Answer::Step(_)), "{stepped:?}");
        done.grad_norm_squared
    }
}

fn frame(sequence: u64, body: Ask) -> v1::ClientFrame {
    v1::ClientFrame { sequence, body: Some(body), ..Default::default() }
}

fn rows(n: usize, seed: u64) -> Option<v1::Tensor> {
    let value = |i: usize| ((i as u64 * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0;
    let values: Vec<f32> = (0..n * HIDDEN).map(value).collect();
    Some(HostTensor::from_f32(&values, vec![n, HIDDEN], WireDType::F32).into_proto())
}

fn forward(microbatch: u64, seed: u64) -> Ask {
    Ask::Forward(v1::Forward {
        microbatch,
        hidden: rows(5, seed),
        seq_lens: vec![3, 2],
        position_ids: Vec::new(),
        mode: v1::Mode::Train as i32,
        want_input_grad: true,
        dropout_key: microbatch,
    })
}

fn backward(microbatch: u64, n: usize) -> Ask {
    Ask::Backward(v1::Backward { microbatch, grad: rows(n, 9) })
}

fn step() -> Ask {
    Ask::Step(v1::Step { learning_rate: 1e-2, clip_factor: 1.0, shared_loss: None })
}

async fn export(rpc: &mut Rpc, session: &str) -> v1::ExportAdapterResponse {
    let request = v1::ExportAdapterRequest { session_id: session.into(), include_gradients: true };
    rpc.export_adapter(request).await.unwrap().into_inner()
}

/// Numbers of two runs with the same frames.
async fn undisturbed() -> (Vec<f64>, v1::ExportAdapterResponse) {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut stream = Stream::attach(&mut rpc, &session, 0).await;
    let norms = vec![stream.train(1).await, stream.train(4).await];
    let exported = export(&mut rpc, &session).await;
    drop(stream);
    assert_eq!(server.drain(PATIENCE).await, 0);
    (norms, exported)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_and_restarted_session_goes_on_with_the_same_numbers() {
    let (norms, expected) = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut stream = Stream::attach(&mut rpc, &session, 0).await;
    assert_eq!(stream.attached.last_applied, 0);
    assert!(stream.attached.durable.is_some(), "a session is durable from the start");
    assert_eq!(stream.train(1).await, norms[0]);

    // What was computed once is not computed again, and not for another payload.
    let before = export(&mut rpc, &session).await;
    let first = stream.ask(2, backward(1, 5)).await;
    assert_eq!(stream.ask(2, backward(1, 5)).await, first);
    assert_eq!(stream.refused(2, backward(7, 5)).await, v1::ErrorCode::Sequence);
    assert_eq!(export(&mut rpc, &session).await, before);

    let taken = |after_sequence| v1::SnapshotRequest {
        session_id: session.clone(),
        after_sequence,
        ..Default::default()
    };
    let error = rpc.snapshot(taken(2)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    let snapshot = rpc.snapshot(taken(3)).await.unwrap().into_inner().snapshot.unwrap();
    assert_eq!((snapshot.step, snapshot.sequence), (1, 3));

    assert_eq!(server.drain(PATIENCE).await, 0);
    let last = stream.next().await;
    let Some(Answer::Error(error)) = last.body else { panic!("{last:?}") };
    assert_eq!(error.code(), v1::ErrorCode::Draining);
    assert!(error.retry_after_millis > 0);

    let (server, mut rpc) = start(store.path()).await;
    let mut stream = Stream::attach(&mut rpc, &session, 2).await;
    assert_eq!((stream.attached.last_applied, stream.attached.step), (3, 1));
    // The answer that the client had not seen.
    assert!(matches!(stream.ask(3, step()).await, Answer::Step(v1::StepDone { step: 1, .. })));
    assert_eq!(stream.train(4).await, norms[1]);
    assert_eq!(export(&mut rpc, &session).await, expected);
    drop(stream);
    assert_eq!(server.drain(PATIENCE).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_an_open_microbatch_finish_and_its_step_comes_later() {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut stream = Stream::attach(&mut rpc, &session, 0).await;
    stream.ask(1, forward(1, 1)).await;
    let another = opening(&mut rpc).await;
    let mut health = watch_health(&server).await;
    let draining = tokio::spawn(server.drain(PATIENCE));
    use tonic_health::pb::health_check_response::ServingStatus;
    while health.message().await.unwrap().unwrap().status() != ServingStatus::NotServing {}
    drop(health);
    let error = rpc.open_session(another).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable);
    assert!(error.metadata().contains_key("grpc-retry-pushback-ms"));

    let answer = stream.ask(2, backward(1, 5)).await;
    assert!(matches!(answer, Answer::Backward(_)), "{answer:?}");
    let last = stream.next().await;
    let Some(Answer::Error(error)) = last.body else { panic!("{last:?}") };
    assert_eq!((last.sequence, error.code()), (0, v1::ErrorCode::Draining));
    assert_eq!(draining.await.unwrap(), 0);

    let (server, mut rpc) = start(store.path()).await;
    let stream = Stream::attach(&mut rpc, &session, 2).await;
    assert_eq!((stream.attached.last_applied, stream.attached.step), (2, 0));
    // A crash: nothing more than the last snapshot is left, which is all there was.
    server.stop_now().await;
    drop(stream);
    let (server, mut rpc) = start(store.path()).await;
    let mut stream = Stream::attach(&mut rpc, &session, 2).await;
    assert_eq!((stream.attached.last_applied, stream.attached.step), (2, 0));
    assert!(matches!(stream.ask(3, step()).await, Answer::Step(v1::StepDone { step: 1, .. })));
    drop(stream);
    assert_eq!(server.drain(PATIENCE).await, 0);
}

async fn watch_health(
    server: &RunningServer,
) -> tonic::Streaming<tonic_health::pb::HealthCheckResponse> {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let url = format!("http://{}", server.local_addr());
    let channel = tonic::transport::Endpoint::new(url).unwrap().connect().await.unwrap();
    let mut client = HealthClient::new(channel);
    let request = HealthCheckRequest { service: "offshoot.v1.TrunkService".into() };
    client.watch(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_behind_a_refused_frame_is_refused_and_changes_nothing() {
    let (norms, _) = undisturbed().await;
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut stream = Stream::attach(&mut rpc, &session, 0).await;
    // All at once: the engine finds that the second has another number of rows than its Forward.
    stream.send(1, forward(1, 1)).await;
    stream.send(2, backward(1, 4)).await;
    stream.send(3, step()).await;
    assert!(matches!(stream.next().await.body, Some(Answer::Forward(_))));
    let codes = [stream.next().await, stream.next().await].map(|frame| match frame.body {
        Some(Answer::Error(error)) => (frame.sequence, error.code()),
        other => panic!("{other:?}"),
    });
    assert_eq!(codes, [(2, v1::ErrorCode::Invalid), (3, v1::ErrorCode::Sequence)]);
    // The tape is still there, and the numbers are free.
    let answer = stream.ask(2, backward(1, 5)).await;
    let Answer::Backward(done) = answer else { panic!("{answer:?}") };
    assert_eq!(done.grad_norm_squared, norms[0]);
    assert!(matches!(stream.ask(3, step()).await, Answer::Step(v1::StepDone { step: 1, .. })));
    assert_eq!(stream.train(4).await, norms[1]);
    drop(stream);
    assert_eq!(server.drain(PATIENCE).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_stream_takes_over_and_gets_the_answers() {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut first = Stream::attach(&mut rpc, &session, 0).await;
    first.send(1, forward(1, 1)).await;
    let mut second = Stream::attach(&mut rpc, &session, 0).await;
    // Whether it came through, is under way or was never read: it is asked for once more.
    assert!(matches!(second.ask(1, forward(1, 1)).await, Answer::Forward(_)));
    let mut last = first.next().await;
    if last.sequence == 1 {
        last = first.next().await;
    }
    let Some(Answer::Error(error)) = last.body else { panic!("{last:?}") };
    assert_eq!((last.sequence, error.code()), (0, v1::ErrorCode::TakenOver));
    assert!(first.answers.message().await.unwrap().is_none(), "the stream has ended");
    assert!(matches!(second.ask(2, backward(1, 5)).await, Answer::Backward(_)));
    drop(second);
    assert_eq!(server.drain(PATIENCE).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_that_does_not_fit_names_both_sides() {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let fine = opening(&mut rpc).await;
    let mut refusals = Vec::new();
    let lora = fine.lora.clone().unwrap();
    for wrong in [
        v1::OpenSessionRequest { fingerprint: "mine".into(), ..fine.clone() },
        v1::OpenSessionRequest { split_point_2: 4, ..fine.clone() },
        v1::OpenSessionRequest {
            lora: Some(v1::LoraConfig { target_modules: vec!["q_prj".into()], ..lora.clone() }),
            ..fine.clone()
        },
        v1::OpenSessionRequest { lora: Some(v1::LoraConfig { r: 1000, ..lora }), ..fine.clone() },
    ] {
        let status = rpc.open_session(wrong).await.unwrap_err();
        refusals.push((status.code(), status.message().to_string()));
    }
    let expect = [
        (tonic::Code::FailedPrecondition, vec!["mine", &fine.fingerprint]),
        (tonic::Code::FailedPrecondition, vec!["1..3", "1..4"]),
        (tonic::Code::InvalidArgument, vec!["q_prj", "self_attn.q_proj"]),
        (tonic::Code::InvalidArgument, vec!["1000", "256"]),
    ];
    for ((code, text), (expected, words)) in refusals.iter().zip(expect) {
        assert_eq!(*code, expected, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    assert_eq!(server.drain(PATIENCE).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_has_said_all_gets_its_answers() {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let Stream { out, mut answers, .. } = Stream::attach(&mut rpc, &session, 0).await;
    for (sequence, body) in [(1, forward(1, 1)), (2, backward(1, 5)), (3, step())] {
        out.send(frame(sequence, body)).await.unwrap();
    }
    drop(out);
    let mut sequences = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        assert!(!matches!(answer.body, Some(Answer::Error(_))), "{answer:?}");
        sequences.push(answer.sequence);
    }
    assert_eq!(sequences, [1, 2, 3]);
    assert_eq!(server.drain(PATIENCE).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gradient_that_overflows_changes_nothing_but_uses_its_tape() {
    let store = tempfile::tempdir().unwrap();
    let (server, mut rpc) = start(store.path()).await;
    let session = open(&mut rpc).await;
    let mut stream = Stream::attach(&mut rpc, &session, 0).await;
    stream.train(1).await;
    stream.ask(4, forward(2, 1)).await;
    let before = export(&mut rpc, &session).await;
    let huge = HostTensor::from_f32(&[3e38; 5 * HIDDEN], vec![5, HIDDEN], WireDType::F32);
    let huge = Ask::Backward(v1::Backward { microbatch: 2, grad: Some(huge.into_proto()) });
    assert_eq!(stream.refused(5, huge).await, v1::ErrorCode::Invalid);
    assert_eq!(export(&mut rpc, &session).await, before);
    assert_eq!(stream.refused(5, backward(2, 5)).await, v1::ErrorCode::Microbatch);
    stream.train(5).await;
    drop(stream);
    assert_eq!(server.drain(PATIENCE).await, 0);
}
