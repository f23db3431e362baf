//! A client of 0.1.0, by code generated from its contract, against today's server.

use offshoot_client::{Client, WireDType};
use offshoot_compat::frozen::{self, client_frame, server_frame, trunk_service_client};
use offshoot_proto::v1;
use offshoot_tests::TestServer;
use offshoot_tests::run::{open_request, values};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

type Rpc = trunk_service_client::TrunkServiceClient<Channel>;

/// A stream of the older client.
struct Stream {
    out: mpsc::Sender<frozen::ClientFrame>,
    answers: tonic::Streaming<frozen::ServerFrame>,
    next: u64,
}

impl Stream {
    async fn attach(rpc: &mut Rpc, id: &str) -> Stream {
        let (out, frames) = mpsc::channel(8);
        let answers = rpc.train(ReceiverStream::new(frames)).await;
        let mut stream = Stream { out, answers: answers.unwrap().into_inner(), next: 0 };
        let hello = frozen::Hello { session_id: id.into(), ..Default::default() };
        let answer = stream.ask(client_frame::Body::Hello(hello)).await;
        let server_frame::Body::Attached(attached) = answer else { panic!("{answer:?}") };
        assert_eq!((attached.last_applied, attached.step), (0, 0));
        stream
    }

    /// An answer that is a refusal leaves the number free.
    async fn ask(&mut self, body: client_frame::Body) -> server_frame::Body {
        let frame = frozen::ClientFrame { sequence: self.next, body: Some(body), acknowledged: 0 };
        self.out.send(frame).await.unwrap();
        let answer = self.answers.message().await.unwrap().expect("the stream is open");
        assert_eq!(answer.sequence, self.next);
        let body = answer.body.expect("an answer that this client knows");
        if !matches!(body, server_frame::Body::Error(_)) {
            self.next += 1;
        }
        body
    }

    async fn forward(&mut self, forward: frozen::Forward) -> frozen::Tensor {
        let answer = self.ask(client_frame::Body::Forward(forward)).await;
        let server_frame::Body::Forward(done) = answer else { panic!("{answer:?}") };
        done.hidden.expect("hidden states")
    }

    async fn backward(&mut self, microbatch: u64, grad: frozen::Tensor) -> frozen::BackwardDone {
        let backward = frozen::Backward { microbatch, grad: Some(grad) };
        let answer = self.ask(client_frame::Body::Backward(backward)).await;
        let server_frame::Body::Backward(done) = answer else { panic!("{answer:?}") };
        done
    }
}

const LENGTHS: [[u32; 3]; 2] = [[5, 2, 4], [3, 6, 1]];

fn tensor(values: &[f32], hidden_size: u32) -> frozen::Tensor {
    frozen::Tensor {
        dtype: frozen::DType::DtypeF32 as i32,
        shape: vec![values.len() as u32 / hidden_size, hidden_size],
        data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        ..Default::default()
    }
}

fn forward(microbatch: u64, hidden_size: u32) -> frozen::Forward {
    let lengths = LENGTHS[microbatch as usize - 1];
    let n_values = lengths.iter().sum::<u32>() * hidden_size;
    frozen::Forward {
        microbatch,
        hidden: Some(tensor(&values(microbatch, n_values as usize), hidden_size)),
        seq_lens: lengths.to_vec(),
        mode: frozen::Mode::Train as i32,
        want_input_grad: true,
        dropout_key: microbatch,
        ..Default::default()
    }
}

fn opening(server: &frozen::DescribeResponse) -> frozen::OpenSessionRequest {
    frozen::OpenSessionRequest {
        name: "claim".into(),
        fingerprint: server.fingerprint.clone(),
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: Some(frozen::LoraConfig {
            r: 3,
            lora_alpha: 6.0,
            lora_dropout: 0.1,
            ..Default::default()
        }),
        adamw: Some(frozen::AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.05,
        }),
        seed: 11,
        wire_dtype: frozen::DType::DtypeF32 as i32,
        initial_adapter: vec![],
    }
}

/// One step of two microbatches; the squared gradient norms, and the adapter as bytes.
async fn step_of_the_older_client(rpc: &mut Rpc) -> (Vec<f64>, Vec<(String, Vec<u8>)>) {
    let server = rpc.describe(frozen::DescribeRequest {}).await.unwrap().into_inner();
    assert!(!server.server_version.is_empty());
    let opened = rpc.open_session(opening(&server)).await.unwrap().into_inner();
    let mut stream = Stream::attach(rpc, &opened.session_id).await;

    // A refusal is understood, and its number is free again.
    let mut short = forward(1, server.hidden_size);
    short.seq_lens.pop();
    let answer = stream.ask(client_frame::Body::Forward(short)).await;
    let server_frame::Body::Error(error) = answer else { panic!("{answer:?}") };
    assert_eq!(error.code(), frozen::ErrorCode::Invalid);
    assert!(error.message.contains("seq_lens"), "{}", error.message);
    let backward = frozen::Backward { microbatch: 9, grad: Some(tensor(&[], server.hidden_size)) };
    let answer = stream.ask(client_frame::Body::Backward(backward)).await;
    assert!(matches!(answer, server_frame::Body::Error(_)), "{answer:?}");

    let mut norms = Vec::new();
    for microbatch in [1, 2] {
        let output = stream.forward(forward(microbatch, server.hidden_size)).await;
        let done = stream.backward(microbatch, output).await;
        assert!(done.grad.is_some(), "the input's gradient was asked for");
        norms.push(done.grad_norm_squared);
    }
    let step = frozen::Step { learning_rate: 0.01, clip_factor: 0.5 };
    let answer = stream.ask(client_frame::Body::Step(step)).await;
    let server_frame::Body::Step(done) = answer else { panic!("{answer:?}") };
    assert_eq!(done.step, 1);

    let id = opened.session_id;
    let ask = frozen::SnapshotRequest {
        session_id: id.clone(),
        after_sequence: stream.next - 1,
        ..Default::default()
    };
    let snapshot = rpc.snapshot(ask).await.unwrap().into_inner().snapshot.expect("a snapshot");
    assert_eq!((snapshot.step, snapshot.sequence), (1, stream.next - 1));
    let listed = rpc.list_sessions(frozen::ListSessionsRequest::default()).await.unwrap();
    let listed = listed.into_inner().sessions;
    assert!(listed.iter().any(|session| session.session_id == id && session.step == 1));
    let ask = frozen::ExportAdapterRequest { session_id: id.clone(), ..Default::default() };
    let adapter = rpc.export_adapter(ask).await.unwrap().into_inner();
    let tensors = adapter.tensors.into_iter().map(|each| {
        let tensor = each.tensor.expect("its values");
        (each.name, tensor.data)
    });
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort();
    let ask = frozen::CloseSessionRequest { session_id: id.clone(), forget: true };
    rpc.close_session(ask).await.unwrap();
    let gone = rpc.close_session(frozen::CloseSessionRequest { session_id: id, forget: true });
    assert_eq!(gone.await.unwrap_err().code(), tonic::Code::NotFound);
    (norms, tensors)
}

/// The same with today's SDK.
async fn step_of_todays_client(client: &Client) -> (Vec<f64>, Vec<(String, Vec<u8>)>) {
    let h = client.describe().await.unwrap().hidden_size as u32;
    let session = client.open(open_request(client).await.unwrap()).await.unwrap();
    let mut norms = Vec::new();
    for microbatch in [1, 2] {
        let old = forward(microbatch, h);
        let n_tokens = old.seq_lens.iter().sum::<u32>() as usize;
        let hidden = values(microbatch, n_tokens * h as usize);
        let shape = vec![n_tokens, h as usize];
        let input = offshoot_client::ForwardInput {
            hidden: offshoot_client::HostTensor::from_f32(&hidden, shape, WireDType::F32),
            seq_lens: old.seq_lens,
            position_ids: vec![],
            want_input_grad: true,
            dropout_key: microbatch,
        };
        let (output, open, _) = session.send_forward(input).await.unwrap().await.unwrap();
        let done = open.send_backward(output).await.unwrap().await.unwrap();
        norms.push(done.norm_squared);
    }
    session.step(0.01, 0.5).await.unwrap();
    session.settle().await.unwrap();
    let adapter = session.export().await.unwrap();
    let bytes = |tensor: &offshoot_client::HostTensor| {
        tensor.to_f32().iter().flat_map(|value| value.to_le_bytes()).collect()
    };
    let mut tensors: Vec<_> =
        adapter.tensors.iter().map(|(name, tensor)| (name.clone(), bytes(tensor))).collect();
    tensors.sort();
    session.close(true).await.unwrap();
    (norms, tensors)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_0_1_0_trains_and_gets_todays_numbers() {
    let server = TestServer::start().await;
    let mut rpc = Rpc::connect(format!("http://{}", server.endpoint())).await.unwrap();
    let older = step_of_the_older_client(&mut rpc).await;
    let today = step_of_todays_client(&Client::connect(&server.endpoint()).await.unwrap()).await;
    println!("squared norms: {:?}", older.0);
    assert_eq!(older.0, today.0);
    assert!(!older.1.is_empty());
    assert!(older.1 == today.1, "the adapters differ");
    drop(rpc);
    server.drain().await;
}

#[test]
fn what_is_new_in_a_message_is_passed_over() {
    // To an older client.
    let error = v1::FrameError {
        code: v1::ErrorCode::Exhausted as i32,
        message: "too much".into(),
        retry_after_millis: 7,
        request_id: "r-1".into(),
        ..Default::default()
    };
    let body = Some(v1::server_frame::Body::Error(error));
    let frame = v1::ServerFrame { sequence: 3, body };
    let old = frozen::ServerFrame::decode(&*frame.encode_to_vec()).unwrap();
    let expected = frozen::FrameError {
        code: frozen::ErrorCode::Exhausted as i32,
        message: "too much".into(),
        retry_after_millis: 7,
        quota: None,
    };
    let body = Some(frozen::server_frame::Body::Error(expected));
    assert_eq!(old, frozen::ServerFrame { sequence: 3, body });

    // To an older server, as in a rolling update in which clients came first.
    let step = v1::Step { learning_rate: 0.5, clip_factor: 1.0, shared_loss: Some(2.0) };
    let frame = v1::ClientFrame {
        sequence: 4,
        acknowledged: 3,
        body: Some(v1::client_frame::Body::Step(step)),
        traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into(),
        tracestate: "a=b".into(),
    };
    let old = frozen::ClientFrame::decode(&*frame.encode_to_vec()).unwrap();
    let step = frozen::Step { learning_rate: 0.5, clip_factor: 1.0 };
    let body = Some(frozen::client_frame::Body::Step(step));
    assert_eq!(old, frozen::ClientFrame { sequence: 4, acknowledged: 3, body });
}
