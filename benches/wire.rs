//! What the wire costs: the time that a Forward and its answer spend outside the device, over
//! loopback, against the same bytes over a plain TCP socket in the same run, in turn.
//!
//! `cargo bench -p offshoot-benches --bench wire -- [MIB] [ROUNDS]` (16 MiB and 15 rounds if not given).
//!
//! Compute is not in it: a frame's report says what queue and device took, and what is left of the
//! round trip is the wire ([`FrameReport::wire`]): encoding, sockets, HTTP/2, decoding, the check and
//! digest of every byte. Making and rounding the tensors on the client is not in it either.

use anyhow::{Context, Result};
use offshoot_benches::{ModelSize, normal, random_model};
use offshoot_client::{
    ADAMW_DEFAULTS, Client, ForwardInput, FrameReport, LoraConfig, OpenSession, Session, WireDType,
};
use offshoot_server::{RunningServer, Server, ServerConfig};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Wide rows and next to no products.
const MODEL: ModelSize =
    ModelSize { hidden: 1024, mlp: 64, layers: 2, heads: 16, kv_heads: 1, vocab: 64 };
const SEQUENCE: u32 = 32;

fn main() -> Result<()> {
    // As `offshoot serve` and `offshoot train` do.
    offshoot_model::allocator::keep_freed_memory();
    // `cargo bench` adds an option of its own.
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let mib: usize = numbers.next().unwrap_or(16);
    let n_rounds = numbers.next().unwrap_or(15);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(mib << 20, n_rounds))
}

async fn run(n_bytes: usize, n_rounds: usize) -> Result<()> {
    let model = random_model(MODEL, 1)?;
    let store = tempfile::tempdir().context("a folder for the store")?;
    let mut config = ServerConfig::default();
    config.listen.port = 0;
    config.model.name = model.path().display().to_string();
    (config.model.split_point_1, config.model.split_point_2) = (0, 1);
    // So that no idle compute thread spins beside the network's.
    config.model.n_threads = Some(1);
    config.store.dir = store.path().into();
    config.limits.max_tokens_per_microbatch = n_bytes / MODEL.hidden;
    let server = Server::start(config).await?;
    let plain = Plain::start(n_bytes)?;
    println!(
        "{} MiB there and {0} MiB back over loopback, medians (and best) of {n_rounds} rounds\n",
        n_bytes >> 20
    );
    println!("| dtype | plain socket ms | MB/s | wire ms | MB/s | wire / plain |");
    println!("|---|---|---|---|---|---|");
    for dtype in WireDType::ALL {
        let row = measure(&server, &plain, dtype, n_bytes, n_rounds).await?;
        println!("{row}");
    }
    server.drain(Duration::from_secs(10)).await;
    Ok(())
}

/// One line of the table.
async fn measure(
    server: &RunningServer,
    plain: &Plain,
    dtype: WireDType,
    n_bytes: usize,
    n_rounds: usize,
) -> Result<String> {
    let session = open(server, dtype).await?;
    let n_rows = n_bytes / (MODEL.hidden * dtype.size()) / SEQUENCE as usize * SEQUENCE as usize;
    let hidden = normal(n_rows, MODEL.hidden, dtype, 2);
    let n_bytes = hidden.n_bytes();
    let input = ForwardInput {
        hidden,
        seq_lens: vec![SEQUENCE; n_rows / SEQUENCE as usize],
        position_ids: Vec::new(),
        want_input_grad: false,
        dropout_key: 0,
    };
    let (mut wire, mut socket) = (Vec::new(), Vec::new());
    // The first round warms both up.
    for round in 0..=n_rounds {
        let seconds = tokio::task::block_in_place(|| plain.round_trip(n_bytes))?;
        let report = forward(&session, &input).await?;
        if round > 0 {
            socket.push(seconds);
            wire.push(report.wire().as_secs_f64());
        }
    }
    session.close(true).await?;
    // Both directions.
    let speed = |seconds: f64| 2.0 * n_bytes as f64 / 1e6 / seconds;
    let ([wire, best_wire], [socket, best_socket]) =
        (median_and_best(wire), median_and_best(socket));
    Ok(format!(
        "| {} | {:.1} ({:.1}) | {:.0} | {:.1} ({:.1}) | {:.0} | {:.2} ({:.2}) |",
        dtype.name(),
        socket * 1e3,
        best_socket * 1e3,
        speed(socket),
        wire * 1e3,
        best_wire * 1e3,
        speed(wire),
        socket / wire,
        best_socket / best_wire,
    ))
}

async fn forward(session: &Session, input: &ForwardInput) -> Result<FrameReport> {
    Ok(session.send_evaluate(input.clone()).await?.with_report().await?.1)
}

async fn open(server: &RunningServer, wire_dtype: WireDType) -> Result<Session> {
    let client = Client::connect(&server.local_addr().to_string()).await?;
    let described = client.describe().await?;
    let session = OpenSession {
        name: "wire".into(),
        fingerprint: described.fingerprint,
        split_point_1: described.split_point_1,
        split_point_2: described.split_point_2,
        lora: LoraConfig { r: 1, lora_alpha: 1.0, ..Default::default() },
        adamw: ADAMW_DEFAULTS,
        seed: 0,
        wire_dtype,
        initial_adapter: Vec::new(),
    };
    Ok(client.open(session).await?)
}

fn median_and_best(mut seconds: Vec<f64>) -> [f64; 2] {
    seconds.sort_by(f64::total_cmp);
    [seconds[seconds.len() / 2], seconds[0]]
}

/// A socket whose other end sends back as many bytes as it got, once it has them all: as a server
/// must that computes with them.
struct Plain {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Plain {
    fn start(most_bytes: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("a port for the plain socket")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut other, _) = listener.accept()?;
        for end in [&stream, &other] {
            end.set_nodelay(true)?;
        }
        // Room for int8's scales.
        let bytes = vec![1; 2 * most_bytes];
        let mut received = bytes.clone();
        std::thread::spawn(move || -> std::io::Result<()> {
            loop {
                let mut length = [0; 8];
                other.read_exact(&mut length)?;
                let message = &mut received[..u64::from_le_bytes(length) as usize];
                other.read_exact(message)?;
                other.write_all(message)?;
            }
        });
        Ok(Plain { stream, bytes })
    }

    /// Seconds for so many bytes there and back.
    fn round_trip(&self, n_bytes: usize) -> Result<f64> {
        let mut received = self.bytes[..n_bytes].to_vec();
        let begun = Instant::now();
        let mut stream = &self.stream;
        stream.write_all(&(n_bytes as u64).to_le_bytes())?;
        stream.write_all(&self.bytes[..n_bytes])?;
        stream.read_exact(&mut received)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
