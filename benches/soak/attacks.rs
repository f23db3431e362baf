//! What a hostile or broken client does, over and over, until its time is over.

use anyhow::Context;
use clap::ValueEnum;
use offshoot_benches::normal;
use offshoot_proto::v1::{self, client_frame::Body, server_frame, trunk_service_client};
use offshoot_proto::{HostTensor, WireDType};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

/// Environment variable with the attacker's token.
pub const TOKEN: &str = "OFFSHOOT_SOAK_TOKEN";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// NaN, infinities, shapes and lengths that do not add up, bad numbers in steps.
    BadFrames,
    /// No token, or a wrong one.
    Strangers,
    /// As many sessions as the server lets it, and requests for many more.
    Opens,
    /// Thousands of connections that say nothing, or nearly nothing.
    Idle,
    /// Connections that end within a frame.
    Halves,
    /// Frames are sent, answers are not read.
    SlowReaders,
    /// A few bytes of a frame now and then.
    SlowWriters,
    /// Sessions of others by guessing, in every call.
    Guesses,
    /// Messages far over the limit.
    Giants,
    /// Microbatches that are opened and left.
    Leavers,
}

type Rpc = trunk_service_client::TrunkServiceClient<InterceptedService<Channel, Bearer>>;

#[derive(Clone)]
struct Bearer(Option<AsciiMetadataValue>);

impl tonic::service::Interceptor for Bearer {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Where, as whom and how long; what happened.
#[derive(Clone)]
struct Attack {
    endpoint: String,
    bearer: Bearer,
    until: Instant,
    /// Which of the attack's tasks this is.
    task: usize,
    counts: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// Runs one kind and prints the counts as JSON.
pub fn run(kind: Kind, endpoint: &str, time: Duration) -> anyhow::Result<()> {
    let token = std::env::var(TOKEN).with_context(|| format!("{TOKEN} is not set"))?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let counts = runtime.block_on(async {
        let attack = Attack {
            endpoint: endpoint.into(),
            bearer: Bearer(Some(format!("Bearer {token}").parse()?)),
            until: Instant::now() + time,
            task: 0,
            counts: Arc::default(),
        };
        let mut all = JoinSet::new();
        for task in 0..kind.n_tasks() {
            let attack = Attack { task, ..attack.clone() };
            all.spawn(async move {
                let until = attack.until;
                let over = timeout_at(until, attack.clone().again_and_again(kind)).await;
                drop(over);
            });
        }
        while all.join_next().await.is_some() {}
        let counts = attack.counts.lock().expect("nobody panics with the lock").clone();
        anyhow::Ok(counts)
    })?;
    println!("{}", serde_json::to_string(&counts)?);
    // Whatever is left open ends with the process.
    std::process::exit(0);
}

impl Kind {
    fn n_tasks(self) -> usize {
        match self {
            Kind::BadFrames => 4,
            Kind::Strangers | Kind::Guesses => 8,
            Kind::Opens => 16,
            Kind::Idle => 1,
            Kind::Halves | Kind::Giants => 4,
            Kind::SlowReaders | Kind::Leavers => 4,
            Kind::SlowWriters => 64,
        }
    }
}

impl Attack {
    fn count(&self, what: &str) {
        *self
            .counts
            .lock()
            .expect("nobody panics with the lock")
            .entry(what.into())
            .or_default() += 1;
    }

    /// A refusal by its code, which is what the table needs.
    fn count_status<T>(&self, result: &Result<T, tonic::Status>) {
        match result {
            Ok(_) => self.count("answered"),
            Err(status) => self.count(&format!("refused {:?}", status.code())),
        }
    }

    async fn again_and_again(self, kind: Kind) {
        loop {
            let done = match kind {
                Kind::BadFrames => self.bad_frames().await,
                Kind::Strangers => self.strangers().await,
                Kind::Opens => self.opens().await,
                Kind::Idle => self.idle().await,
                Kind::Halves => {
                    self.through(Link::Cut { after: 3000 + 7919 * self.task }, true).await
                }
                Kind::SlowReaders => self.slow_reader().await,
                Kind::SlowWriters => self.through(Link::Slow, false).await,
                Kind::Guesses => self.guesses().await,
                Kind::Giants => self.giants().await,
                Kind::Leavers => self.leaver().await,
            };
            if done.is_err() {
                self.count("broken");
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn rpc(&self) -> anyhow::Result<Rpc> {
        self.rpc_at(&self.endpoint, self.bearer.clone()).await
    }

    async fn rpc_at(&self, endpoint: &str, bearer: Bearer) -> anyhow::Result<Rpc> {
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))?.connect().await?;
        let signed = InterceptedService::new(channel, bearer);
        Ok(Rpc::new(signed).max_decoding_message_size(64 << 20))
    }

    async fn open(&self, rpc: &mut Rpc) -> anyhow::Result<Opened> {
        let server = rpc.describe(v1::DescribeRequest {}).await?.into_inner();
        let opened = rpc.open_session(request(&server)).await;
        self.count_status(&opened);
        let id = match opened {
            Ok(opened) => opened.into_inner().session_id,
            // It has its share of them: one of those serves as well.
            Err(_) => {
                let all = rpc.list_sessions(v1::ListSessionsRequest {}).await?.into_inner();
                let n_known = all.sessions.len().max(1);
                let known = all.sessions.get(self.task % n_known).context("it has no session")?;
                known.session_id.clone()
            }
        };
        Ok(Opened { id, hidden_size: server.hidden_size as usize })
    }

    async fn bad_frames(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        let Opened { id, hidden_size: h } = self.open(&mut rpc).await?;
        let mut stream = Stream::attach(&mut rpc, &id).await?;
        let mut next = stream.next;
        for round in 0..200u64 {
            for body in bad_bodies(h, round) {
                stream.send(next, body).await?;
                match stream.answer().await? {
                    Some(server_frame::Body::Error(_)) => self.count("bad frames refused"),
                    Some(_) => {
                        self.count("BAD FRAMES APPLIED");
                        next += 1;
                    }
                    None => anyhow::bail!("the stream ended"),
                }
            }
        }
        rpc.close_session(v1::CloseSessionRequest { session_id: id, forget: true }).await?;
        Ok(())
    }

    async fn strangers(&self) -> anyhow::Result<()> {
        let wrong = match self.task % 3 {
            0 => None,
            1 => Some("Bearer ofs_none_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".parse()?),
            _ => Some("Basic bWFsbG9yeTptYWxsb3J5".parse()?),
        };
        let mut rpc = self.rpc_at(&self.endpoint, Bearer(wrong)).await?;
        for _ in 0..50 {
            self.count_status(&rpc.describe(v1::DescribeRequest {}).await);
            self.count_status(&rpc.list_sessions(v1::ListSessionsRequest {}).await);
            let open =
                v1::OpenSessionRequest { initial_adapter: junk(1 << 20), ..Default::default() };
            self.count_status(&rpc.open_session(open).await);
            let (out, frames) = mpsc::channel(1);
            let hello = v1::Hello { session_id: "0".repeat(32), ..Default::default() };
            out.send(frame(0, Body::Hello(hello))).await?;
            self.count_status(&rpc.train(ReceiverStream::new(frames)).await);
        }
        Ok(())
    }

    async fn opens(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        let server = rpc.describe(v1::DescribeRequest {}).await?.into_inner();
        for round in 0..100 {
            let mut open = request(&server);
            match round % 3 {
                0 => {}
                1 => open.initial_adapter = junk(1 << 20),
                _ => {
                    open.lora =
                        Some(v1::LoraConfig { r: u32::MAX, lora_alpha: 1.0, ..Default::default() })
                }
            }
            self.count_status(&rpc.open_session(open).await);
        }
        Ok(())
    }

    /// Until the end: they are held, and those that the server closes are made again.
    async fn idle(&self) -> anyhow::Result<()> {
        let mut open = Vec::new();
        loop {
            while open.len() < 3000 {
                let mut stream = TcpStream::connect(&self.endpoint).await?;
                if open.len() % 2 == 0 {
                    // HTTP/2's beginning, and nothing behind it.
                    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
                }
                self.count("connections");
                open.push(stream);
            }
            sleep(Duration::from_secs(1)).await;
            open.retain(|stream| !matches!(stream.try_read(&mut [0; 64]), Ok(0)));
        }
    }

    /// Through a link that harms what is said.
    async fn through(&self, link: Link, opens: bool) -> anyhow::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = listener.local_addr()?.to_string();
        let upstream = self.endpoint.clone();
        // Ends with this attempt.
        let mut carrying = JoinSet::new();
        carrying.spawn(async move {
            let (client, _) = listener.accept().await?;
            link.carry(client, TcpStream::connect(upstream).await?).await
        });
        let mut rpc = self.rpc_at(&endpoint, self.bearer.clone()).await?;
        self.count("connections");
        if !opens {
            let open =
                v1::OpenSessionRequest { initial_adapter: junk(1 << 16), ..Default::default() };
            self.count_status(&rpc.open_session(open).await);
            return Ok(());
        }
        let Opened { id, hidden_size } = self.open(&mut rpc).await?;
        let mut stream = Stream::attach(&mut rpc, &id).await?;
        for microbatch in 0.. {
            let forward = forward(hidden_size, 16, microbatch);
            stream.send(stream.next + microbatch, Body::Forward(forward)).await?;
            stream.answer().await?;
            self.count("frames");
        }
        Ok(())
    }

    async fn slow_reader(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        let Opened { id, hidden_size } = self.open(&mut rpc).await?;
        let stream = Stream::attach(&mut rpc, &id).await?;
        for frame in 0.. {
            let evaluation =
                v1::Forward { mode: v1::Mode::Eval as i32, ..forward(hidden_size, 16, 1) };
            let sent = stream.send(stream.next + frame, Body::Forward(evaluation));
            match tokio::time::timeout(Duration::from_secs(1), sent).await {
                Ok(sent) => sent?,
                // The server takes no more: as it should.
                Err(_) => break,
            }
            self.count("frames");
        }
        self.count("streams that are not read");
        sleep_until((Instant::now() + Duration::from_secs(20)).min(self.until)).await;
        drop(stream);
        Ok(())
    }

    async fn guesses(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        for _ in 0..100 {
            let session_id = format!("{:032x}", rand::random::<u128>());
            let id = || session_id.clone();
            let export = v1::ExportAdapterRequest { session_id: id(), include_gradients: true };
            self.count_status(&rpc.export_adapter(export).await);
            let restore = v1::RestoreRequest { session_id: id(), snapshot_id: String::new() };
            self.count_status(&rpc.restore(restore).await);
            let close = v1::CloseSessionRequest { session_id: id(), forget: true };
            self.count_status(&rpc.close_session(close).await);
            match Stream::attach(&mut rpc, &session_id).await {
                Ok(_) => self.count("ATTACHED TO A GUESS"),
                Err(_) => self.count("Hellos refused"),
            }
        }
        Ok(())
    }

    async fn giants(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        let open =
            v1::OpenSessionRequest { initial_adapter: junk(256 << 20), ..Default::default() };
        self.count_status(&rpc.open_session(open).await);
        let mut rpc = self.rpc().await?;
        let mut request = tonic::Request::new(v1::DescribeRequest {});
        request.metadata_mut().insert("x-filler", "x".repeat(8 << 20).parse()?);
        self.count_status(&rpc.describe(request).await);
        let mut rpc = self.rpc().await?;
        let Opened { id, hidden_size } = self.open(&mut rpc).await?;
        let mut stream = Stream::attach(&mut rpc, &id).await?;
        stream.send(stream.next, Body::Forward(forward(hidden_size, 16384, 1))).await?;
        let answer = stream.answer().await;
        self.count(if matches!(answer, Ok(Some(server_frame::Body::Error(_))) | Err(_)) {
            "giant frames refused"
        } else {
            "GIANT FRAMES APPLIED"
        });
        Ok(())
    }

    async fn leaver(&self) -> anyhow::Result<()> {
        let mut rpc = self.rpc().await?;
        let Opened { id, hidden_size } = self.open(&mut rpc).await?;
        let mut stream = Stream::attach(&mut rpc, &id).await?;
        stream.send(stream.next, Body::Forward(forward(hidden_size, 16, rand::random()))).await?;
        stream.answer().await?;
        self.count("microbatches left open");
        Ok(())
    }
}

struct Opened {
    id: String,
    hidden_size: usize,
}

fn request(server: &v1::DescribeResponse) -> v1::OpenSessionRequest {
    v1::OpenSessionRequest {
        name: "mallory".into(),
        fingerprint: server.fingerprint.clone(),
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: Some(v1::LoraConfig { r: 4, lora_alpha: 8.0, ..Default::default() }),
        adamw: Some(v1::AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }),
        seed: 1,
        wire_dtype: WireDType::F32.to_proto() as i32,
        initial_adapter: vec![],
    }
}

fn junk(n_bytes: usize) -> Vec<v1::NamedTensor> {
    let tensor = v1::Tensor {
        dtype: WireDType::F32.to_proto() as i32,
        shape: vec![1, (n_bytes / 4) as u32],
        data: vec![7; n_bytes].into(),
        ..Default::default()
    };
    vec![v1::NamedTensor { name: "junk".into(), tensor: Some(tensor) }]
}

fn frame(sequence: u64, body: Body) -> v1::ClientFrame {
    v1::ClientFrame { sequence, acknowledged: 0, body: Some(body) }
}

fn forward(hidden_size: usize, n_tokens: usize, microbatch: u64) -> v1::Forward {
    v1::Forward {
        microbatch,
        hidden: Some(normal(n_tokens, hidden_size, WireDType::F32, 3).into_proto()),
        seq_lens: vec![n_tokens as u32],
        position_ids: vec![],
        mode: v1::Mode::Train as i32,
        want_input_grad: true,
        dropout_key: 0,
    }
}

/// One of each kind of nonsense.
fn bad_bodies(h: usize, round: u64) -> Vec<Body> {
    let n = 16;
    let with = |bad: f32| {
        let mut values = vec![0.5; n * h];
        values[round as usize % (n * h)] = bad;
        HostTensor::from_f32(&values, vec![n, h], WireDType::F32).into_proto()
    };
    let good = || forward(h, n, round);
    let shaped = |shape: Vec<u32>| v1::Tensor { shape, ..with(0.5) };
    vec![
        Body::Forward(v1::Forward { hidden: Some(with(f32::NAN)), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(with(f32::INFINITY)), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![u32::MAX, u32::MAX])), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![h as u32, n as u32])), ..good() }),
        Body::Forward(v1::Forward { hidden: Some(shaped(vec![1; 64])), ..good() }),
        Body::Forward(v1::Forward { hidden: None, ..good() }),
        Body::Forward(v1::Forward { seq_lens: vec![u32::MAX, 1], ..good() }),
        Body::Forward(v1::Forward { seq_lens: vec![0; 10_000], ..good() }),
        Body::Forward(v1::Forward { position_ids: vec![1; 3], ..good() }),
        Body::Forward(v1::Forward { mode: 77, ..good() }),
        Body::Backward(v1::Backward { microbatch: u64::MAX, grad: Some(with(f32::NEG_INFINITY)) }),
        Body::Backward(v1::Backward { microbatch: u64::MAX, grad: Some(with(0.5)) }),
        Body::Step(v1::Step { learning_rate: f64::NAN, clip_factor: 1.0 }),
        Body::Step(v1::Step { learning_rate: 1e-3, clip_factor: f64::INFINITY }),
    ]
}

/// A stream of frames without the SDK.
struct Stream {
    next: u64,
    out: mpsc::Sender<v1::ClientFrame>,
    answers: tonic::Streaming<v1::ServerFrame>,
}

impl Stream {
    async fn attach(rpc: &mut Rpc, id: &str) -> anyhow::Result<Stream> {
        let (out, frames) = mpsc::channel(4);
        let hello = v1::Hello { session_id: id.into(), ..Default::default() };
        out.send(frame(0, Body::Hello(hello))).await?;
        let mut answers = rpc.train(ReceiverStream::new(frames)).await?.into_inner();
        match answers.message().await?.context("an answer to Hello")?.body {
            Some(server_frame::Body::Attached(attached)) => {
                Ok(Stream { next: attached.last_applied + 1, out, answers })
            }
            other => anyhow::bail!("Hello was answered with {other:?}"),
        }
    }

    async fn send(&self, sequence: u64, body: Body) -> anyhow::Result<()> {
        Ok(self.out.send(frame(sequence, body)).await?)
    }

    async fn answer(&mut self) -> anyhow::Result<Option<server_frame::Body>> {
        Ok(self.answers.message().await?.and_then(|frame| frame.body))
    }
}

#[derive(Clone, Copy)]
enum Link {
    /// Ends after so many bytes of the client.
    Cut { after: usize },
    /// Passes 512 bytes on ten times a second.
    Slow,
}

impl Link {
    async fn carry(self, client: TcpStream, server: TcpStream) -> std::io::Result<()> {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let up = async move {
            let mut buffer = [0; 512];
            let mut n_bytes = 0;
            loop {
                let read = from_client.read(&mut buffer).await?;
                n_bytes += read;
                let over = matches!(self, Link::Cut { after } if n_bytes >= after);
                if read == 0 || over {
                    return std::io::Result::Ok(());
                }
                if matches!(self, Link::Slow) {
                    sleep(Duration::from_millis(100)).await;
                }
                to_server.write_all(&buffer[..read]).await?;
            }
        };
        tokio::select! {
            ended = up => ended,
            ended = tokio::io::copy(&mut from_server, &mut to_client) => ended.map(drop),
        }
    }
}
