use anyhow::bail;
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use offshoot_server::{StoreContent, backup_store, check_store};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Check and back up a server's store, also while the server runs.
///
/// `backup` copies the sessions with all their snapshots as they are at one moment into a new folder.
/// A server that is started with that folder as its --store-dir goes on from there. Both commands change
/// nothing in the store, ask no server, and compare every file with its hash; what is damaged is named,
/// and the exit code is 1.
#[derive(Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub struct StoreArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLES: &str = "\
Examples:
  offshoot store backup /var/lib/offshoot/store /backups/offshoot-2026-11-23
  offshoot store check /backups/offshoot-2026-11-23";

#[derive(Subcommand)]
enum What {
    /// Copy a store into a new folder
    Backup {
        /// The --store-dir of the server.
        #[arg(value_name = "STORE")]
        store: PathBuf,
        /// A folder that is not there yet.
        #[arg(value_name = "TO")]
        to: PathBuf,
    },
    /// Read all of a store and compare it with its checksums
    Check {
        /// The --store-dir of a server, or a backup.
        #[arg(value_name = "STORE")]
        store: PathBuf,
    },
}

/// Runs the subcommand.
pub fn run(args: StoreArgs) -> anyhow::Result<ExitCode> {
    let (content, where_it_is) = match &args.what {
        What::Backup { store, to } => (backup_store(store, to)?, to),
        What::Check { store } => (check_store(store)?, store),
    };
    let StoreContent { n_sessions, n_snapshots, bytes, damaged } = content;
    let bytes = ByteSize(bytes);
    // Whoever reads it may have seen enough.
    let _ = writeln!(
        std::io::stdout(),
        "{}: {n_sessions} sessions, {n_snapshots} snapshots, {bytes}, {} damaged",
        where_it_is.display(),
        damaged.len()
    );
    if !damaged.is_empty() {
        bail!("{} damaged:\n  {}", damaged.len(), damaged.join("\n  "));
    }
    Ok(ExitCode::SUCCESS)
}
