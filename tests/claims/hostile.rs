//! Clients that wish the server ill, beside one that trains: its numbers stay as they are, and
//! afterwards nothing of them is left.

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use offshoot_client::{Client, ExportedAdapter};
use offshoot_proto::v1::{self, client_frame::Body};
use offshoot_server::LimitsConfig;
use offshoot_tests::raw::{self, RawStream, Rpc, frame};
use offshoot_tests::run::{assert_same_adapter, input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Endpoint;

const SERVICE: &str = "/offshoot.v1.TrunkService";

/// A server under attack.
struct Attacked {
    server: TestServer,
    _store: tempfile::TempDir,
    client: Client,
    /// What a run comes to that nobody disturbs.
    expected: ExportedAdapter,
}

impl Attacked {
    async fn start(change: impl FnOnce(&mut LimitsConfig)) -> Attacked {
        let store = tempfile::tempdir().unwrap();
        let mut config = server_config(store.path());
        change(&mut config.limits);
        let server = TestServer::start_with(config).await;
        let client = Client::connect(&server.endpoint()).await.unwrap();
        let expected = run(&client).await;
        Attacked { server, _store: store, client, expected }
    }

    fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The same run again, and once more until the attack is over.
    async fn beside<T: Send + 'static>(
        &self,
        attack: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let attack = tokio::spawn(attack);
        loop {
            assert_same_adapter(&run(&self.client).await, &self.expected);
            if attack.is_finished() {
                return attack.await.unwrap();
            }
        }
    }

    /// Nothing is left of anybody.
    async fn until_empty(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let memory = self.client.describe().await.unwrap().memory;
            let bytes = [memory.adapter_bytes, memory.tape_bytes, memory.cache_bytes];
            let counts = [memory.live_sessions, memory.open_microbatches, memory.waiting_for_room];
            if bytes == [0; 3] && counts == [0; 3] && memory.workspace_bytes == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{memory:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Trains a session and forgets it.
async fn run(client: &Client) -> ExportedAdapter {
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(client).await.unwrap()).await.unwrap();
    train(&session, h, 0..3).await.unwrap();
    let exported = session.export().await.unwrap();
    session.close(true).await.unwrap();
    exported
}

/// HTTP/2 without gRPC's rules.
async fn http2(address: SocketAddr) -> SendRequest<Bytes> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (send, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    send.ready().await.unwrap()
}

fn request(address: SocketAddr, method: &str) -> http::request::Builder {
    Request::post(format!("http://{address}{SERVICE}/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// Sends a body as it is. The gRPC status, or none if the stream was reset.
async fn post(address: SocketAddr, method: &str, body: Vec<u8>) -> Option<Code> {
    let mut send = http2(address).await;
    let (response, mut stream) =
        send.send_request(request(address, method).body(()).unwrap(), false).unwrap();
    // The server may answer before it has all.
    let _ = stream.send_data(body.into(), true);
    let response = response.await.ok()?;
    let of = |headers: &HeaderMap| Some(Code::from_bytes(headers.get("grpc-status")?.as_bytes()));
    if let Some(code) = of(response.headers()) {
        return Some(code);
    }
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data.ok()?.len()).ok()?;
    }
    of(&body.trailers().await.ok()??)
}

/// gRPC's prefix before a message.
fn prefixed(compressed: u8, length: u32, message: &[u8]) -> Vec<u8> {
    [&[compressed][..], &length.to_be_bytes(), message].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_none_are_refused() {
    let attacked = Attacked::start(|_| {}).await;
    let address = attacked.address();
    let codes = attacked.beside(async move {
        let zeros = [0; 1000];
        // Ten bytes that say they are gigabytes when they are unpacked.
        let bomb = prefixed(1, 10, &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]);
        [
            ("no message", post(address, "OpenSession", vec![]).await),
            ("half a prefix", post(address, "OpenSession", vec![0, 0]).await),
            ("half a message", post(address, "OpenSession", prefixed(0, 5000, &zeros)).await),
            ("over the limit", post(address, "OpenSession", prefixed(0, u32::MAX, &zeros)).await),
            ("compressed", post(address, "OpenSession", bomb).await),
            ("another flag", post(address, "OpenSession", prefixed(7, 1000, &zeros)).await),
            ("no protobuf", post(address, "OpenSession", prefixed(0, 1000, &[255; 1000])).await),
            ("no such call", post(address, "Delete", prefixed(0, 0, &[])).await),
        ]
    });
    for (what, code) in codes.await {
        println!("{what}: {code:?}");
        assert!(code.is_some_and(|code| code != Code::Ok && code != Code::Unknown), "{what}");
    }
    // The same on a stream, where nobody waits for them.
    let streams = attacked.beside(async move {
        for body in [vec![0, 0], prefixed(0, 5000, &[0; 1000]), prefixed(1, 4, &[1; 4])] {
            post(address, "Train", body).await;
        }
    });
    streams.await;
    attacked.until_empty().await;
}

/// What an HTTP/2 client says first, with empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The headers of a call, as HPACK without its tables, and the end of its stream at once.
fn begun_and_reset(n: u32) -> Vec<u8> {
    let id = (2 * n + 1).to_be_bytes();
    let path = format!("{SERVICE}/Train");
    let mut block = vec![0x83, 0x86, 0x04, path.len() as u8];
    block.extend(path.as_bytes());
    // The authority, and the content type by its place in the static table.
    block.extend([0x01, 1, b'x', 0x0f, 0x10, 16]);
    block.extend(b"application/grpc");
    let headers = [&[0, 0, block.len() as u8, 1, 4][..], &id, &block].concat();
    let reset = [&[0, 0, 4, 3, 0][..], &id, &[0, 0, 0, 8]].concat();
    [headers, reset].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_headers_and_resets_end_their_connection_only() {
    let attacked = Attacked::start(|_| {}).await;
    let address = attacked.address();
    let (refused, ended, answered) = attacked
        .beside(async move {
            let mut send = http2(address).await;
            let large = request(address, "Describe").header("x-large", "a".repeat(100_000));
            let refused = match send.send_request(large.body(()).unwrap(), true) {
                Ok((response, _)) => response.await.map_or(431, |r| r.status().as_u16()),
                Err(_) => 431,
            };
            // Streams that are begun and reset, as fast as they go.
            let mut tcp = TcpStream::connect(address).await.unwrap();
            let said = [PREFACE.to_vec(), (0..20_000).flat_map(begun_and_reset).collect()].concat();
            // It may be closed before all is said.
            let _ = tcp.write_all(&said).await;
            let mut answered = Vec::new();
            let read = tcp.read_to_end(&mut answered);
            // What was unread when it was closed may show as an error.
            let ended = tokio::time::timeout(Duration::from_secs(20), read).await.is_ok();
            (refused, ended, answered)
        })
        .await;
    assert_eq!(refused, 431, "a header of 100 kB is too much");
    assert!(ended, "the connection goes on");
    let said = String::from_utf8_lossy(&answered);
    assert!(said.contains("too_many_resets"), "{said:?}");
    attacked.until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_do_nothing_make_room_for_those_that_do() {
    let attacked = Attacked::start(|limits| limits.max_connections = 60).await;
    let address = attacked.address();
    // 300 here are as many again in the server, which is this process: files are bounded.
    let idle = attacked.beside(async move {
        let mut idle = Vec::new();
        for i in 0..300 {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            // Silent, half a greeting, or a whole one and nothing else.
            let said: &[u8] = match i % 3 {
                0 => b"",
                1 => b"PRI * HTTP",
                _ => PREFACE,
            };
            let _ = tcp.write_all(said).await;
            idle.push(tcp);
        }
        idle
    });
    let mut idle = idle.await;
    // The first ones had to go.
    let (mut first, mut rest) = (idle.remove(0), [0; 64]);
    let gone = async { while !matches!(first.read(&mut rest).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it was closed");
    let another = Client::connect(&attacked.server.endpoint()).await.unwrap();
    another.describe().await.unwrap();
    attacked.until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_opens_is_refused_with_a_time_to_come_back() {
    let attacked = Attacked::start(|limits| limits.max_live_sessions = 12).await;
    let endpoint = attacked.server.endpoint();
    let template = raw_request(&attacked.client).await;
    // One session trains already: its place is its own.
    let h = attacked.client.describe().await.unwrap().hidden_size;
    let own = open_request(&attacked.client).await.unwrap();
    let session = attacked.client.open(own).await.unwrap();
    let mut rpc = raw::rpc(&endpoint).await;
    let mut flood = JoinSet::new();
    for _ in 0..200 {
        let (mut rpc, template) = (rpc.clone(), template.clone());
        flood.spawn(async move { rpc.open_session(template).await });
    }
    train(&session, h, 0..3).await.unwrap();
    let mut opened = Vec::new();
    for answer in flood.join_all().await {
        match answer {
            Ok(answer) => opened.push(answer.into_inner().session_id),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(status.metadata().contains_key("grpc-retry-pushback-ms"), "{status:?}");
            }
        }
    }
    assert_eq!(opened.len(), 11, "one place was taken");
    assert_same_adapter(&session.export().await.unwrap(), &attacked.expected);
    session.close(true).await.unwrap();
    for session_id in opened {
        rpc.close_session(v1::CloseSessionRequest { session_id, forget: true }).await.unwrap();
    }
    attacked.until_empty().await;
}

/// Connects with windows so small that answers which nobody reads stay with the server.
async fn narrow(address: SocketAddr) -> Rpc {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let endpoint = endpoint.initial_stream_window_size(1024).initial_connection_window_size(65_535);
    Rpc::new(endpoint.connect().await.unwrap())
}

/// To open a session without the SDK.
async fn raw_request(client: &Client) -> v1::OpenSessionRequest {
    let request = open_request(client).await.unwrap();
    v1::OpenSessionRequest {
        fingerprint: request.fingerprint,
        split_point_1: request.split_point_1,
        split_point_2: request.split_point_2,
        lora: Some(v1::LoraConfig { r: 2, lora_alpha: 2.0, ..v1::LoraConfig::default() }),
        adamw: Some(v1::AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 }),
        wire_dtype: request.wire_dtype.to_proto() as i32,
        ..v1::OpenSessionRequest::default()
    }
}

async fn open_raw(client: &Client, rpc: &mut Rpc) -> String {
    let request = raw_request(client).await;
    rpc.open_session(request).await.unwrap().into_inner().session_id
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_hold_nobody_up_nor_the_end() {
    let attacked = Attacked::start(|_| {}).await;
    let mut rpc = narrow(attacked.address()).await;
    let id = open_raw(&attacked.client, &mut rpc).await;
    let h = attacked.client.describe().await.unwrap().hidden_size;
    let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
    // More than may be in flight, and no answer is ever taken.
    let first = stream.next;
    for sequence in first..first + 40 {
        let evaluate = raw::forward(input(sequence, &[50], h), sequence, v1::Mode::Eval);
        stream.send(frame(sequence, Body::Forward(evaluate))).await;
    }
    attacked.beside(async {}).await;
    let memory = attacked.client.describe().await.unwrap().memory;
    assert_eq!((memory.live_sessions, memory.tape_bytes), (1, 0));
    // Ends with all sessions saved, while the reader is still there.
    let Attacked { server, client, .. } = attacked;
    drop(client);
    server.drain().await;
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_cut_off_leave_nothing() {
    let attacked = Attacked::start(|_| {}).await;
    let address = attacked.address();
    let mut rpc = raw::rpc(&attacked.server.endpoint()).await;
    let id = open_raw(&attacked.client, &mut rpc).await;
    let cut = {
        let id = id.clone();
        attacked.beside(async move {
            for n in 0..30 {
                let mut send = http2(address).await;
                let opened = request(address, "Train").body(()).unwrap();
                let (_response, mut stream) = send.send_request(opened, false).unwrap();
                let hello = v1::Hello { session_id: id.clone(), ..v1::Hello::default() };
                let hello = prost::Message::encode_to_vec(&frame(0, Body::Hello(hello)));
                let half = prefixed(0, 40_000, &vec![1; 1000 * n]);
                let all = [prefixed(0, hello.len() as u32, &hello), half].concat();
                let _ = stream.send_data(all.into(), false);
                // Everything is dropped where it is.
            }
        })
    };
    cut.await;
    rpc.close_session(v1::CloseSessionRequest { session_id: id, forget: true }).await.unwrap();
    attacked.until_empty().await;
}
