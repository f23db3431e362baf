//! `offshoot snapshots`: what a session of a running server can be set back to.

use crate::operate::named::{id_of, session, short, snapshot};
use crate::operate::{self, Column, PlaceArgs, age, bytes, confirm};
use clap::{Args, Subcommand};
use offshoot_client::SessionId;
use offshoot_client::operations::SnapshotView;
use serde_json::json;
use std::process::ExitCode;

/// List a session's snapshots on a running server, or delete one.
///
/// SESSION is a session's id or as much of its beginning as no other has. A checkpoint of offshoot train
/// names the snapshot that it goes with (offshoot checkpoints RUN): without it that checkpoint's part of
/// the trunk is gone.
#[derive(Args)]
pub struct SnapshotsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Show all snapshots of a session, newest first
    List(ListArgs),
    /// Delete one; the one that the session goes on from is refused
    Delete(DeleteArgs),
}

#[derive(Args)]
struct ListArgs {
    /// Of the session.
    session: String,
    /// Print JSON: the SnapshotView messages of offshoot/v1/operations.proto.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
struct DeleteArgs {
    /// Of the session.
    session: String,
    /// Of the snapshot, such as 5-step400.
    snapshot: String,
    /// Do not ask. Without a terminal nothing is deleted without this.
    #[arg(long, short)]
    yes: bool,
    /// Print JSON: session_id, snapshot_id and what was done.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Runs the subcommand.
pub fn run(args: SnapshotsArgs) -> anyhow::Result<ExitCode> {
    operate::run(async {
        match args.what {
            What::List(args) => list(args).await,
            What::Delete(args) => delete(args).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let client = args.place.connect().await?;
    let overview = client.overview(u64::MAX).await?;
    let id = SessionId::from(id_of(session(&overview, &args.session)?));
    let snapshots = client.list_snapshots(&id).await?;
    match args.json {
        true => operate::print_json(&snapshots)?,
        false => operate::print(&table(overview.now_millis, &snapshots)),
    }
    Ok(())
}

async fn delete(args: DeleteArgs) -> anyhow::Result<()> {
    let client = args.place.connect().await?;
    let overview = client.overview(u64::MAX).await?;
    let view = session(&overview, &args.session)?;
    let id = SessionId::from(id_of(view));
    let all = client.list_snapshots(&id).await?;
    let name = snapshot(&all, &args.snapshot)?;
    let question = format!(
        "Delete snapshot {name} of {}? A checkpoint that names it loses its part of the trunk.",
        short(view)
    );
    confirm(&question, args.yes)?;
    client.delete_snapshot(&id, name).await?;
    match args.json {
        true => {
            let done = "deleted";
            operate::print_json(
                &json!({ "session_id": id.as_str(), "snapshot_id": name, "done": done }),
            )
        }
        false => {
            operate::print(&format!("deleted {name} of {}\n", short(view)));
            Ok(())
        }
    }
}

/// Snapshots as people read them.
pub fn table(now_millis: u64, snapshots: &[SnapshotView]) -> String {
    const COLUMNS: [Column; 6] = [
        Column::text("snapshot"),
        Column::number("step"),
        Column::number("size"),
        Column::number("age"),
        Column::text("reason"),
        Column::text(""),
    ];
    let row = |view: &SnapshotView| {
        let info = view.info.clone().unwrap_or_default();
        vec![
            info.snapshot_id,
            info.step.to_string(),
            bytes(info.bytes),
            age(now_millis, view.taken_millis),
            view.reason.clone(),
            if view.is_head { "the session goes on from here".into() } else { String::new() },
        ]
    };
    operate::table(&COLUMNS, &snapshots.iter().map(row).collect::<Vec<_>>())
}
