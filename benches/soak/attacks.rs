//! What a hostile or broken client does, over and over, until its time is over.

mod link;
mod messages;

use anyhow::Context;
use clap::ValueEnum;
use link::{Link, Stream};
use messages::{bad_bodies, forward, frame, junk, request};
use offshoot_proto::v1::{self, client_frame::Body, server_frame, trunk_service_client};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
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
