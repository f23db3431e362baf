//! `offshoot top`: a running server in a terminal.

pub mod rows;
mod screen;
mod summary;

use crate::operate::{self, PlaceArgs};
use clap::Args;
use offshoot_client::Client;
use offshoot_client::operations::Overview;
use rows::{Sort, rows, text_table};
use screen::Screen;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

/// Characters of the line of throughput where there is no terminal.
const BARS: usize = 60;
/// Samples that are shown: an hour of them.
const MOST_SAMPLES: usize = 720;

/// Watch a running server: its sessions, their speed, and the device.
///
/// Refreshes until q is pressed; s sorts by the next column, r the other way round, arrows scroll. Without
/// a terminal it prints once. A tenant's token shows that tenant's sessions, an operator's all and the
/// whole server.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TopArgs {
    /// By what the sessions are sorted.
    #[arg(long, value_enum, default_value_t = Sort::State)]
    sort: Sort,
    /// Time between two looks.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = interval)]
    interval: Duration,
    /// Print once and end, also on a terminal.
    #[arg(long)]
    once: bool,
    /// Print once, as JSON: the OverviewResponse of offshoot/v1/operations.proto.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot top --server trunk.local:50051 --token-file ops.token
  offshoot top --sort tokens --interval 1s
  offshoot top --json | jq .samples[-1].tokens_per_second";

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match interval {
        short if short < Duration::from_millis(100) => Err("at least 100ms".into()),
        fine => Ok(fine),
    }
}

/// Runs the command.
pub fn run(args: TopArgs) -> anyhow::Result<ExitCode> {
    operate::run(async {
        let client = args.place.connect().await?;
        let address = args.place.address();
        let overview = client.overview(0).await?;
        if args.json {
            return operate::print_json(&overview);
        }
        if args.once || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
            operate::print(&text(&overview, &address, args.sort));
            return Ok(());
        }
        let screen = Screen { address, overview, sort: args.sort, ..Screen::default() };
        screen::watch(screen, &client, args.interval).await
    })?;
    Ok(ExitCode::SUCCESS)
}

fn text(overview: &Overview, address: &str, sort: Sort) -> String {
    let mut lines = summary::lines(overview, address);
    let values = summary::throughput(&overview.samples, BARS);
    if values.len() > 1 {
        lines.push(format!("tokens/s of the last hour: {}", summary::bars(&values)));
    }
    lines.extend(summary::refused(overview));
    let mut text = lines.join("\n") + "\n";
    if !overview.sessions.is_empty() {
        text.push('\n');
        text.push_str(&text_table(&rows(overview, sort, false)));
    }
    text
}

/// What is there now, with the samples of before: those are not sent again.
async fn look_again(client: &Client, before: &Overview) -> anyhow::Result<Overview> {
    let since = before.samples.last().map_or(0, |sample| sample.at_millis);
    let mut overview = client.overview(since).await?;
    let newer = std::mem::take(&mut overview.samples);
    // Of a server that started again only the newer ones are its own; the hour is the user's.
    overview.samples = before.samples.iter().copied().chain(newer).collect();
    let surplus = overview.samples.len().saturating_sub(MOST_SAMPLES);
    overview.samples.drain(..surplus);
    Ok(overview)
}
