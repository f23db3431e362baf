//! A server that breaks the protocol: the client says so, and neither panics nor waits for ever.

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ClientError, ClientOptions, ErrorCode, LoraConfig, OpenSession, Retry,
    Session, WireDType,
};
use offshoot_proto::v1::trunk_service_server::{TrunkService, TrunkServiceServer};
use offshoot_proto::v1::{self, client_frame, server_frame};
use offshoot_tests::run::input;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, QuotaViolation, StatusExt};

const HIDDEN: usize = 4;

type Frames = Pin<Box<dyn Stream<Item = Result<v1::ServerFrame, Status>> + Send>>;
/// What is answered to a frame that is not Hello.
type Answer = dyn Fn(v1::ClientFrame) -> Vec<v1::ServerFrame> + Send + Sync;
/// What is answered to Snapshot, the first time, the second, ...
type Snapshot = dyn Fn(u32) -> Result<v1::SnapshotResponse, Status> + Send + Sync;

/// A trunk that has no layers.
#[derive(Clone)]
struct Liar {
    attached: v1::Attached,
    answer: Arc<Answer>,
    snapshot: Arc<Snapshot>,
    n_snapshots: Arc<AtomicU32>,
}

fn limits() -> v1::Limits {
    v1::Limits {
        max_tokens_per_microbatch: 64,
        max_frames_in_flight: 4,
        max_open_microbatches: 4,
        max_rank: 8,
        ..Default::default()
    }
}

#[tonic::async_trait]
impl TrunkService for Liar {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(v1::DescribeResponse {
            hidden_size: HIDDEN as u32,
            limits: Some(limits()),
            ..Default::default()
        }))
    }

    async fn open_session(
        &self,
        _: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        Ok(Response::new(v1::OpenSessionResponse {
            session_id: "s".into(),
            limits: Some(limits()),
            ..Default::default()
        }))
    }

    type TrainStream = Frames;

    async fn train(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Frames>, Status> {
        let this = self.clone();
        let frames = request.into_inner().map_while(Result::ok);
        let answers = frames.map(move |frame| match frame.body {
            Some(client_frame::Body::Hello(_)) => {
                vec![to(0, server_frame::Body::Attached(this.attached.clone()))]
            }
            _ => (this.answer)(frame),
        });
        let answers = answers.map(|answers| tokio_stream::iter(answers.into_iter().map(Ok)));
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            let mut answers = Box::pin(answers);
            while let Some(mut some) = answers.next().await {
                while let Some(answer) = some.next().await {
                    if sender.send(answer).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        (self.snapshot)(self.n_snapshots.fetch_add(1, Ordering::SeqCst)).map(Response::new)
    }

    async fn restore(
        &self,
        _: Request<v1::RestoreRequest>,
    ) -> Result<Response<v1::RestoreResponse>, Status> {
        Err(Status::data_loss("the file of snapshot x is not what its hash says"))
    }

    async fn export_adapter(
        &self,
        _: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<v1::ExportAdapterResponse>, Status> {
        Err(Status::unauthenticated("the token has expired"))
    }

    async fn list_sessions(
        &self,
        _: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        Ok(Response::new(v1::ListSessionsResponse::default()))
    }

    async fn close_session(
        &self,
        _: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        Ok(Response::new(v1::CloseSessionResponse::default()))
    }
}

fn to(sequence: u64, body: server_frame::Body) -> v1::ServerFrame {
    v1::ServerFrame { sequence, body: Some(body) }
}

fn tensor(shape: &[u32], bytes: usize) -> v1::Tensor {
    let dtype = WireDType::F32.to_proto() as i32;
    v1::Tensor { dtype, shape: shape.to_vec(), data: vec![0; bytes].into(), ..Default::default() }
}

fn forwarded(sequence: u64, hidden: v1::Tensor) -> v1::ServerFrame {
    let done = v1::ForwardDone { hidden: Some(hidden), ..Default::default() };
    to(sequence, server_frame::Body::Forward(done))
}

impl Liar {
    fn new(
        answer: impl Fn(v1::ClientFrame) -> Vec<v1::ServerFrame> + Send + Sync + 'static,
    ) -> Self {
        Liar {
            attached: v1::Attached { epoch: 1, limits: Some(limits()), ..Default::default() },
            answer: Arc::new(answer),
            snapshot: Arc::new(|_| Err(Status::unimplemented("no"))),
            n_snapshots: Arc::default(),
        }
    }

    async fn listen(self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = TrunkServiceServer::new(self);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    async fn open(self) -> (Client, Session) {
        let retry = Retry {
            first_delay: Duration::from_millis(2),
            max_delay: Duration::from_millis(10),
            max_elapsed: Duration::from_millis(500),
        };
        let options = ClientOptions { retry, ..ClientOptions::default() };
        let address = self.listen().await.to_string();
        let client = Client::connect_with(&address, options).await.unwrap();
        let session = OpenSession {
            name: String::new(),
            fingerprint: String::new(),
            split_point_1: 0,
            split_point_2: 1,
            lora: LoraConfig { r: 1, lora_alpha: 1.0, ..Default::default() },
            adamw: ADAMW_DEFAULTS,
            seed: 0,
            wire_dtype: WireDType::F32,
            initial_adapter: vec![],
        };
        let session = client.open(session).await.unwrap();
        (client, session)
    }
}

/// What a forward of three tokens comes to.
async fn forward(liar: Liar) -> ClientError {
    let (_client, session) = liar.open().await;
    let forward = session.forward(input(1, &[3], HIDDEN));
    let ended = tokio::time::timeout(Duration::from_secs(60), forward).await;
    ended.expect("it does not wait for ever").unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_fit_no_frame_are_the_servers_fault() {
    for (what, shift) in
        [("too early", 1i64), ("a number that was answered", -1), ("far away", i64::MAX - 7)]
    {
        let error = forward(Liar::new(move |frame| {
            vec![forwarded(frame.sequence.wrapping_add_signed(shift), tensor(&[3, 4], 48))]
        }))
        .await;
        println!("{what}: {error}");
        assert!(
            matches!(error, ClientError::Protocol { .. } | ClientError::NotTakenBack { .. }),
            "{error}"
        );
    }
    let error = forward(Liar::new(|frame| {
        vec![to(frame.sequence, server_frame::Body::Step(v1::StepDone::default()))]
    }))
    .await;
    assert!(error.to_string().contains("answered as another kind of frame"), "{error}");
    let error =
        forward(Liar::new(|frame| vec![v1::ServerFrame { sequence: frame.sequence, body: None }]))
            .await;
    assert!(error.to_string().contains("is empty"), "{error}");
    // Twice the same answer: the second one fits nothing.
    let (_client, session) = Liar::new(|frame| {
        let answer = forwarded(frame.sequence, tensor(&[3, 4], 48));
        vec![answer.clone(), answer]
    })
    .open()
    .await;
    let first = session.forward(input(1, &[3], HIDDEN)).await;
    let error = match first {
        Ok((_, microbatch, _)) => {
            let grad =
                offshoot_client::HostTensor::from_f32(&[0.0; 12], vec![3, 4], WireDType::F32);
            microbatch.backward(grad).await.unwrap_err()
        }
        Err(error) => error,
    };
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_that_lie_about_their_size_are_refused() {
    for (what, lie) in [
        ("too few bytes", tensor(&[3, 4], 4)),
        ("too many bytes", tensor(&[3, 4], 4096)),
        ("no shape", tensor(&[], 0)),
        ("a product that overflows", tensor(&[u32::MAX, u32::MAX], 48)),
        ("more than there is memory", tensor(&[1 << 31, 1 << 31], 48)),
    ] {
        let error =
            forward(Liar::new(move |frame| vec![forwarded(frame.sequence, lie.clone())])).await;
        println!("{what}: {error}");
        assert!(matches!(error, ClientError::Tensor { .. }), "{what}: {error}");
    }
    // Larger than any answer can be: the library refuses it before it is read.
    let error = forward(Liar::new(|frame| {
        vec![forwarded(frame.sequence, tensor(&[1 << 20, 4], 16 << 20))]
    }))
    .await;
    println!("far too long: {error}");
    assert!(error.ends_session(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_says_about_quotas_damage_and_tokens_reaches_the_caller() {
    let mut liar = Liar::new(|_| Vec::new());
    liar.snapshot = Arc::new(|n| {
        let mut violation = QuotaViolation::new("tenant:blue", "too many");
        violation.quota_id = "stored_sessions".into();
        violation.quota_value = 100;
        violation.quota_dimensions.insert("value".into(), "101".into());
        let mut details = ErrorDetails::new();
        details.add_quota_failure_violation("", "");
        details.set_quota_failure(vec![violation]);
        if n < 2 {
            details.set_retry_info(Some(Duration::from_millis(5)));
        }
        let text = "no room for another";
        Err(Status::with_error_details(Code::ResourceExhausted, text, details))
    });
    let counter = liar.n_snapshots.clone();
    let (client, session) = liar.open().await;
    // Not waited for.
    let error = session.try_snapshot(vec![]).await.unwrap_err();
    assert_eq!(error.retry_after(), Some(Duration::from_millis(5)));
    assert_eq!(counter.load(Ordering::SeqCst), 1);
    // Waited for as long as there is hope.
    let error = session.snapshot().await.unwrap_err();
    assert_eq!(counter.load(Ordering::SeqCst), 3);
    let ClientError::Refused { code: ErrorCode::Exhausted, quota: Some(quota), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((quota.quota.as_str(), quota.limit, quota.value), ("stored_sessions", 100, 101));
    let text = error.to_string();
    println!("{text}");
    assert!(text.contains("quota stored_sessions: the limit is 100, this would be 101"), "{text}");

    let error = client.restore(session.id(), None).await.unwrap_err();
    assert!(matches!(error, ClientError::Damaged { .. }), "{error}");
    println!("{error}");
    let error = session.export().await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, ClientError::Unauthenticated { token_sent: false, .. }), "{error}");
    assert!(error.to_string().contains("the token has expired; no token was sent"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_of_tokens_is_waited_out_and_is_no_retry() {
    let refusals = AtomicU32::new(0);
    let liar = Liar::new(move |frame| {
        if refusals.fetch_add(1, Ordering::SeqCst) < 80 {
            let quota =
                v1::QuotaViolation { quota: "tokens_per_second".into(), limit: 10, value: 13 };
            let error = v1::FrameError {
                code: ErrorCode::Exhausted as i32,
                message: "too fast".into(),
                retry_after_millis: 10,
                quota: Some(quota),
                ..Default::default()
            };
            return vec![to(frame.sequence, server_frame::Body::Error(error))];
        }
        vec![forwarded(frame.sequence, tensor(&[3, 4], 48))]
    });
    let (_client, session) = liar.open().await;
    // Longer than any other refusal is waited for here.
    let (_, microbatch, report) = session.forward(input(1, &[3], HIDDEN)).await.unwrap();
    assert!(report.round_trip > Duration::from_millis(700), "{report:?}");
    assert_eq!(report.retries, 0);
    drop(microbatch);
}
