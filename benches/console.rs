//! What the console costs a server with many sessions: the page's bytes, and time and bytes of one
//! update, over loopback, with a few of the sessions training meanwhile.
//!
//! A time here is from the request to the last byte of its answer, the connection's beginning
//! included: an upper bound of the server's own time.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use offshoot_benches::share_cores;
use offshoot_client::{Client, OpenSession, Session};
use offshoot_server::Server;
use offshoot_tests::http::{Reply, ask};
use offshoot_tests::run::{open_request, train};
use offshoot_tests::server_config;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 1000)]
    sessions: usize,
    /// Of them, so many train.
    #[arg(long, default_value_t = 4)]
    training: usize,
    /// Of each kind.
    #[arg(long, default_value_t = 200)]
    updates: usize,
    /// cargo says that it is a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

const BUDGET: Duration = Duration::from_millis(50);
const PAGE_BYTES: usize = 300_000;
/// Everything that a browser loads before its first update.
const PAGE: [&str; 14] = [
    "",
    "page/console.css",
    "page/icon.svg",
    "page/theme.js",
    "page/main.js",
    "page/api.js",
    "page/cards.js",
    "page/chart.js",
    "page/detail.js",
    "page/dom.js",
    "page/format.js",
    "page/refusals.js",
    "page/sessions.js",
    "page/shell.js",
];
const GZIP: &str = "accept-encoding: gzip";

fn main() -> Result<()> {
    share_cores()?;
    let args = Args::parse();
    Runtime::new()?.block_on(run(&args))
}

async fn run(args: &Args) -> Result<()> {
    let store = tempfile::tempdir()?;
    let mut config = server_config(store.path());
    config.http.port = Some(0);
    let server = Server::start(config).await?;
    let http = server.http_addr().context("it was given a port")?;
    let client = Client::connect(&server.local_addr().to_string()).await?;
    let hidden_size = client.describe().await?.hidden_size;
    let mut sessions = Vec::new();
    for i in 0..args.sessions {
        let wanted = open_request(&client).await?;
        sessions.push(
            client.open(OpenSession { name: format!("team-{}-run-{i}", i % 20), ..wanted }).await?,
        );
    }
    println!("tiny llama, {} sessions, {} of them train\n", args.sessions, args.training);
    page(http).await?;
    let training: Vec<_> = sessions
        .drain(..args.training.min(args.sessions))
        .map(|session| tokio::spawn(keep_training(session, hidden_size)))
        .collect();
    println!("| update | bytes | median ms | p99 ms | most ms |\n|---|---|---|---|---|");
    // The first one of a page has the whole hour, those after it what is new.
    let first = updates(http, "first, the whole hour", &[], 0, args.updates).await?;
    updates(http, "first, gzip", &[GZIP], 0, args.updates).await?;
    let since = first.json()["now_millis"].as_u64().context("the server has a clock")?;
    updates(http, "next", &[], since, args.updates).await?;
    updates(http, "next, gzip", &[GZIP], since, args.updates).await?;
    let shown = first.json()["sessions"].as_array().map_or(0, Vec::len);
    ensure!(shown == args.sessions, "the overview has {shown} sessions");
    training.iter().for_each(|task| task.abort());
    drop(sessions);
    server.stop_now().await;
    Ok(())
}

async fn keep_training(session: Session, hidden_size: usize) {
    for step in 0.. {
        if train(&session, hidden_size, step..step + 1).await.is_err() {
            return;
        }
    }
}

async fn page(http: SocketAddr) -> Result<()> {
    println!("| page | bytes |\n|---|---|");
    for (what, headers) in [("as it is", &[][..]), ("gzip", &[GZIP])] {
        let mut bytes = 0;
        for path in PAGE {
            let reply = ask(http, "GET", &format!("/{path}"), headers).await;
            ensure!(reply.status == 200, "/{path}: {}", reply.status);
            bytes += reply.body.len();
        }
        println!("| {what} | {bytes} |");
        ensure!(bytes < PAGE_BYTES, "the page has {bytes} bytes, more than {PAGE_BYTES}");
    }
    println!();
    Ok(())
}

/// The last answer. Fails where the median is over the budget.
async fn updates(
    http: SocketAddr,
    what: &str,
    headers: &[&str],
    since: u64,
    n_updates: usize,
) -> Result<Reply> {
    let path = format!("/api/overview?since={since}");
    let mut last = ask(http, "GET", &path, headers).await;
    let mut times = Vec::new();
    for _ in 0..n_updates {
        let begun = Instant::now();
        last = ask(http, "GET", &path, headers).await;
        times.push(begun.elapsed());
        ensure!(last.status == 200, "{}", last.text());
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "| {what} | {} | {:.1} | {:.1} | {:.1} |",
        last.body.len(),
        ms(at(0.5)),
        ms(at(0.99)),
        ms(at(1.0))
    );
    ensure!(at(0.5) < BUDGET, "{what}: the median is over {BUDGET:?}");
    Ok(last)
}
