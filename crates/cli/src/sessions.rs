//! `offshoot sessions`: what there is on a running server, and what may be done to it.

use crate::operate::named::{id_of, session, short};
use crate::operate::{self, PlaceArgs, age, bytes, confirm, count, seconds, share};
use crate::top::rows::{Row, Sort, rows, text_table};
use anyhow::bail;
use clap::{Args, Subcommand};
use offshoot_client::operations::{Overview, SessionView, SnapshotView};
use offshoot_client::{Client, SessionId};
use serde_json::{Value, json};
use std::fmt::Write;
use std::process::ExitCode;

/// List the sessions of a running server, and evict, pin or delete them.
///
/// A tenant's token shows and manages that tenant's sessions, an operator's all. ID is a session's id or
/// as much of its beginning as no other has.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct SessionsArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLES: &str = "\
Examples:
  offshoot sessions list --server trunk.local:50051 --sort age
  offshoot sessions show 3f2a
  offshoot sessions evict 3f2a 9c
  offshoot sessions delete 3f2a --yes
  offshoot sessions list --json | jq -r '.[] | select(.info.state == \"parked\") | .info.session_id'";

#[derive(Subcommand)]
enum What {
    /// Show all sessions, live and parked
    List(ListArgs),
    /// Show one session with what it has used and its snapshots
    Show(ShowArgs),
    /// Take sessions off the device; their next frames bring them back, and nobody else notices
    Evict(ManyArgs),
    /// Keep live sessions on the device however idle they are, until they are unpinned or parked
    Pin(ManyArgs),
    /// Let pinned sessions come and go again
    Unpin(ManyArgs),
    /// End sessions and delete them with all their snapshots
    Delete(DeleteArgs),
}

#[derive(Args)]
struct ListArgs {
    /// Only this tenant's.
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// By what they are sorted.
    #[arg(long, value_enum, default_value_t = Sort::State)]
    sort: Sort,
    /// Print JSON: the SessionView messages of offshoot/v1/operations.proto.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
struct ShowArgs {
    /// Of the session.
    id: String,
    /// Print JSON: a SessionView of offshoot/v1/operations.proto, and its snapshots as SnapshotView.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
struct ManyArgs {
    /// Of one or more sessions.
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
    /// Print JSON: for each session its session_id and what was done.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
struct DeleteArgs {
    #[command(flatten)]
    many: ManyArgs,
    /// Do not ask. Without a terminal nothing is deleted without this.
    #[arg(long, short)]
    yes: bool,
}

/// Runs the subcommand.
pub fn run(args: SessionsArgs) -> anyhow::Result<ExitCode> {
    operate::run(async {
        match args.what {
            What::List(args) => list(args).await,
            What::Show(args) => show(args).await,
            What::Evict(args) => each(args, Deed::Evict).await,
            What::Pin(args) => each(args, Deed::Pin).await,
            What::Unpin(args) => each(args, Deed::Unpin).await,
            What::Delete(DeleteArgs { many, yes }) => each(many, Deed::Delete { yes }).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Without samples, which nobody looks at here.
async fn look(client: &Client) -> anyhow::Result<Overview> {
    Ok(client.overview(u64::MAX).await?)
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let client = args.place.connect().await?;
    let mut overview = look(&client).await?;
    if let Some(tenant) = &args.tenant {
        overview.sessions.retain(|view| view.tenant == *tenant);
    }
    let sorted = rows(&overview, args.sort, false);
    if args.json {
        let views: Vec<&SessionView> = sorted.iter().map(|row| row.view).collect();
        return operate::print_json(&views);
    }
    operate::print(&listed(&overview, &sorted));
    Ok(())
}

fn listed(overview: &Overview, sorted: &[Row<'_>]) -> String {
    if sorted.is_empty() {
        return "There is no session.\n".into();
    }
    let mut text = text_table(sorted);
    if overview.sessions_left_out > 0 {
        let n = overview.sessions_left_out;
        text.push_str(&format!("and {n} parked ones that the server did not send\n"));
    }
    text
}

async fn show(args: ShowArgs) -> anyhow::Result<()> {
    let client = args.place.connect().await?;
    let overview = look(&client).await?;
    let view = session(&overview, &args.id)?;
    let snapshots = client.list_snapshots(&SessionId::from(id_of(view))).await?;
    if args.json {
        let mut shown = serde_json::to_value(view)?;
        shown["snapshots"] = serde_json::to_value(&snapshots)?;
        return operate::print_json(&shown);
    }
    operate::print(&shown(&overview, view, &snapshots));
    Ok(())
}

fn shown(overview: &Overview, view: &SessionView, snapshots: &[SnapshotView]) -> String {
    let now = overview.now_millis;
    let (info, metering) =
        (view.info.clone().unwrap_or_default(), view.metering.unwrap_or_default());
    let lora = info.lora.clone().unwrap_or_default();
    let row = Row::of(overview, view);
    let loss = view.shared_loss.map_or_else(|| "not shared".into(), |loss| format!("{loss:.4}"));
    let pinned = if view.pinned { ", pinned to the device" } else { "" };
    let lines = [
        ("session", info.session_id.clone()),
        ("name", info.name.clone()),
        ("tenant", view.tenant.clone()),
        ("state", format!("{}, on {}{pinned}", row.state(), row.place())),
        ("opened", ago(now, view.opened_millis)),
        ("last frame", ago(now, view.last_frame_millis)),
        ("step", format!("{}, durable {}", info.step, view.durable_step)),
        ("loss", loss),
        (
            "adapter",
            format!(
                "rank {}, alpha {}, {}",
                lora.r,
                lora.lora_alpha,
                lora.target_modules.join(" ")
            ),
        ),
        (
            "device bytes",
            format!(
                "adapter {}, open microbatches {}, caches {}",
                bytes(info.adapter_bytes),
                bytes(info.tape_bytes),
                bytes(info.cache_bytes)
            ),
        ),
        (
            "now",
            format!(
                "{} tokens/s, {} of the device, waits {}",
                count(view.tokens_per_second),
                share(view.device_share),
                seconds(view.queue_seconds)
            ),
        ),
        (
            "used",
            format!(
                "{} tokens, {} steps, {:.1} device seconds, {} in, {} out, peak {}",
                metering.tokens,
                metering.steps,
                metering.device_seconds,
                bytes(metering.bytes_in),
                bytes(metering.bytes_out),
                bytes(metering.peak_bytes)
            ),
        ),
    ];
    let mut text = String::new();
    for (name, value) in lines.into_iter().filter(|(_, value)| !value.is_empty()) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<13} {value}");
    }
    text.push('\n');
    text.push_str(&crate::snapshots::table(now, snapshots));
    text
}

fn ago(now: u64, then: u64) -> String {
    match then {
        0 => String::new(),
        then => {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(then);
            format!("{} ago, {}", age(now, then), humantime::format_rfc3339_seconds(time))
        }
    }
}

#[derive(Clone, Copy)]
enum Deed {
    Evict,
    Pin,
    Unpin,
    Delete { yes: bool },
}

impl Deed {
    fn done(self) -> &'static str {
        match self {
            Deed::Evict => "evicted",
            Deed::Pin => "pinned",
            Deed::Unpin => "unpinned",
            Deed::Delete { .. } => "deleted",
        }
    }

    async fn run(self, client: &Client, id: &SessionId) -> anyhow::Result<()> {
        match self {
            Deed::Evict => client.evict_session(id).await?,
            Deed::Pin => client.pin_session(id, true).await?,
            Deed::Unpin => client.pin_session(id, false).await?,
            Deed::Delete { .. } => client.delete_session(id).await?,
        }
        Ok(())
    }
}

async fn each(args: ManyArgs, deed: Deed) -> anyhow::Result<()> {
    let client = args.place.connect().await?;
    let overview = look(&client).await?;
    // All are known before anything is done to one of them.
    let meant: Vec<&SessionView> =
        args.ids.iter().map(|text| session(&overview, text)).collect::<Result<_, _>>()?;
    if let Deed::Delete { yes } = deed {
        confirm(&question(&meant), yes)?;
    }
    let mut done: Vec<Value> = Vec::new();
    let mut failed = None;
    for view in meant {
        if let Err(error) = deed.run(&client, &SessionId::from(id_of(view))).await {
            failed = Some(error);
            break;
        }
        match args.json {
            true => done.push(json!({ "session_id": id_of(view), "done": deed.done() })),
            false => operate::print(&format!("{} {}\n", deed.done(), short(view))),
        }
    }
    if args.json {
        operate::print_json(&done)?;
    }
    match failed {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}

fn question(meant: &[&SessionView]) -> String {
    let of = |view: &SessionView| {
        let step = view.info.as_ref().map_or(0, |info| info.step);
        let tenant = if view.tenant.is_empty() { "" } else { " of " };
        format!("{}{tenant}{} at step {step}", short(view), view.tenant)
    };
    let all: Vec<String> = meant.iter().map(|view| of(view)).collect();
    format!(
        "Delete {} with all snapshots? What was learned on the server's layers is lost.",
        all.join(", ")
    )
}
