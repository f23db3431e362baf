//! `offshoot bench`: a server under synthetic sessions, over the real protocol.

mod args;
mod link;
mod memory;
mod numbers;
mod report;
mod session;

pub use args::BenchArgs;

use crate::own_server::OwnServer;
use crate::{accelerator, serve_config};
use anyhow::{Context, ensure};
use args::{Mode, Variety};
use link::{Link, Proxy};
use memory::MemoryWatch;
use offshoot_client::{
    ADAMW_DEFAULTS, Client, ClientOptions, LoraConfig, OpenSession, ServerDescription, Session,
};
use offshoot_server::ServerConfig;
use report::Report;
use serde_json::json;
use session::{Driver, Measured, Plan, Shape};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

/// Idle sessions that share a connection: a server bounds the streams of one.
const IDLE_PER_CONNECTION: usize = 64;

pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    args.check()?;
    // Loads CUDA if the server of this process is to use it.
    accelerator::device(&args.server.device)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let report = runtime.block_on(measure(&args))?;
    print!("{}", report.text());
    if let Some(path) = &args.measure.json {
        std::fs::write(path, format!("{:#}\n", report.json()))
            .with_context(|| format!("cannot write --json {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(args: &BenchArgs) -> anyhow::Result<Report<'_>> {
    let (own, endpoint) = match &args.server.server {
        Some(url) => (None, url.clone()),
        None => {
            let own = OwnServer::start(server_config(args)?).await?;
            let endpoint = own.address().to_string();
            (Some(own), endpoint)
        }
    };
    let bench = Bench::new(args, endpoint).await?;
    let measured = bench.measure().await;
    if let Some(own) = own {
        own.stop().await;
    }
    let (sessions, memory) = measured?;
    Ok(Report { args, server: bench.server, sessions, memory })
}

fn server_config(args: &BenchArgs) -> anyhow::Result<ServerConfig> {
    let server = &args.server;
    let mut model = json!({
        "name": server.model,
        "split_point_1": server.split_point_1,
        "split_point_2": server.split_point_2,
        "device": server.device,
        "dtype": server.dtype,
    });
    if let Some(n) = server.threads {
        model["n_threads"] = json!(n);
    }
    let config = serve_config::settings(server.config.as_deref(), json!({ "model": model }))?;
    config.validate()?;
    Ok(config)
}

/// A server and the way to it.
struct Bench<'a> {
    args: &'a BenchArgs,
    /// Past the slow link, for what is not measured.
    direct: Client,
    server: ServerDescription,
    /// What sessions connect to, and how.
    endpoint: String,
    way: ClientOptions,
    /// The slow link is up as long as this is.
    _proxy: Option<Proxy>,
}

impl<'a> Bench<'a> {
    async fn new(args: &'a BenchArgs, endpoint: String) -> anyhow::Result<Bench<'a>> {
        let way = match args.server.server {
            Some(_) => args.connection.options(ClientOptions::default())?,
            // The one in this process has no tenants and no TLS.
            None => ClientOptions::default(),
        };
        let direct = Client::connect_with(&endpoint, way.clone()).await?;
        let server = direct.describe().await?;
        let limits = &server.limits;
        for (option, found, limit) in [
            ("--in-flight", args.load.in_flight, limits.max_open_microbatches),
            ("--in-flight", args.load.in_flight, limits.max_frames_in_flight),
            ("--rank", args.adapter.rank as usize, limits.max_rank),
        ] {
            ensure!(found <= limit as usize, "{option} is {found}, the server allows {limit}");
        }
        let limit = limits.max_tokens_per_microbatch;
        for size in args.sizes() {
            let found = size.n_tokens();
            ensure!(found <= limit.into(), "{size} are {found} tokens, the server allows {limit}");
        }
        let link = Link {
            latency: Duration::from_secs_f64(args.wire.latency_ms / 1e3),
            bytes_per_second: args.wire.bandwidth_mbit.map(|mbit| mbit * 1e6 / 8.0),
        };
        let proxy = match link {
            Link { latency: Duration::ZERO, bytes_per_second: None } => None,
            _ => {
                let has_tls = args.connection.has_tls();
                ensure!(!has_tls, "--server {endpoint}: a slow link carries no TLS");
                Some(Proxy::start(resolve(&endpoint).await?, link).await?)
            }
        };
        let endpoint = proxy.as_ref().map_or(endpoint, |proxy| proxy.address().to_string());
        Ok(Bench { args, direct, server, endpoint, way, _proxy: proxy })
    }

    /// One entry for each busy session, and the server's bytes meanwhile.
    async fn measure(&self) -> anyhow::Result<(Vec<Measured>, memory::MemorySeen)> {
        let _idle = self.open_idle().await?;
        let sizes = self.args.sizes();
        // And the watcher of memory.
        let start = Arc::new(Barrier::new(sizes.len() + 1));
        let mut drivers = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            // Every session is another team: it has a connection of its own.
            let client = Client::connect_with(&self.endpoint, self.way.clone()).await?;
            let session = self.open(&client, i).await?;
            drivers.push(Driver::new(session, self.plan(), *size, self.shape()));
        }
        let watch = MemoryWatch::start(self.direct.clone(), start.clone()).await?;
        let mut busy = JoinSet::new();
        for (i, driver) in drivers.into_iter().enumerate() {
            let start = start.clone();
            busy.spawn(async move { (i, driver.run(start).await) });
        }
        let mut measured: Vec<Measured> = sizes.iter().map(|_| Measured::default()).collect();
        while let Some(joined) = busy.join_next().await {
            let (i, result) = joined.context("a session's task")?;
            measured[i] = result.with_context(|| format!("session {i}"))?;
        }
        Ok((measured, watch.end().await?))
    }

    /// Sessions that took one step. Dropped, they end.
    async fn open_idle(&self) -> anyhow::Result<Vec<Driver>> {
        let n = self.args.load.idle_sessions;
        let mut idle = Vec::with_capacity(n);
        let mut client = self.direct.clone();
        let size = self.args.sizes()[0];
        // Registered as a training session is, whatever is measured.
        let plan = Plan { mode: Mode::Train, in_flight: 1, accumulate: 1, ..self.plan() };
        for i in 0..n {
            if i % IDLE_PER_CONNECTION == 0 {
                client = Client::connect_with(&self.endpoint, self.way.clone()).await?;
            }
            let session = self.open(&client, self.args.sizes().len() + i).await?;
            let mut driver = Driver::new(session, plan, size, self.shape());
            driver.step_once().await.with_context(|| format!("idle session {i}"))?;
            idle.push(driver);
        }
        Ok(idle)
    }

    async fn open(&self, client: &Client, i: usize) -> anyhow::Result<Session> {
        let server = &self.server;
        let request = OpenSession {
            name: format!("bench {i}"),
            fingerprint: server.fingerprint.clone(),
            split_point_1: server.split_point_1,
            split_point_2: server.split_point_2,
            lora: lora(self.args, server, i),
            adamw: ADAMW_DEFAULTS,
            seed: i as u64,
            wire_dtype: self.args.wire.wire_dtype,
            initial_adapter: vec![],
        };
        client.open(request).await.with_context(|| format!("session {i}"))
    }

    fn plan(&self) -> Plan {
        let load = &self.args.load;
        Plan {
            mode: load.mode,
            in_flight: load.in_flight,
            accumulate: self.args.accumulate(),
            warm_up: self.args.measure.warm_up,
            end: self.args.end(),
        }
    }

    fn shape(&self) -> Shape {
        let want_input_grad = self.server.split_point_1 > 0;
        Shape { hidden_size: self.server.hidden_size, want_input_grad }
    }
}

/// The adapter of session `i`.
fn lora(args: &BenchArgs, server: &ServerDescription, i: usize) -> LoraConfig {
    let (rank, max_rank) = (args.adapter.rank, server.limits.max_rank);
    let alike = LoraConfig { r: rank, lora_alpha: 2.0 * f64::from(rank), ..Default::default() };
    if args.adapter.adapters == Variety::Alike {
        return alike;
    }
    let r = [rank, (rank / 2).max(1), (2 * rank).min(max_rank)][i % 3];
    let lora_alpha = f64::from(r) * [2.0, 1.0, 0.5, 4.0][i % 4];
    // Beside the ranks' turns: all nine pairs occur.
    let target_modules = match i / 3 % 3 {
        0 => Vec::new(),
        part => {
            let is_mlp = |module: &&String| module.contains("mlp") == (part == 2);
            server.lora_modules.iter().filter(is_mlp).cloned().collect()
        }
    };
    LoraConfig { r, lora_alpha, target_modules, ..alike }
}

async fn resolve(endpoint: &str) -> anyhow::Result<std::net::SocketAddr> {
    let host = endpoint.trim_start_matches("http://").trim_end_matches('/');
    ensure!(!host.contains("://"), "--server {endpoint}: a slow link carries http:// only");
    let mut found = tokio::net::lookup_host(host).await;
    found
        .as_mut()
        .ok()
        .and_then(Iterator::next)
        .with_context(|| format!("--server {endpoint}: no such host and port"))
}
