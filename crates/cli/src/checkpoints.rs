use anyhow::bail;
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use offshoot_trainer::checkpoint::{self, Saved};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// List the checkpoints of a run, or name its latest or best one.
///
/// RUN is the --output-dir of offshoot train. `latest` and `best` print a path, for --resume,
/// --init-adapter or offshoot export. The best one has the lowest evaluation loss.
#[derive(Args)]
#[command(
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct CheckpointsArgs {
    #[command(subcommand)]
    which: Option<Which>,
    #[command(flatten)]
    run: RunArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot checkpoints run
  offshoot checkpoints best run
  offshoot train ... --output-dir run-2 --init-adapter $(offshoot checkpoints best run)";

#[derive(Subcommand)]
enum Which {
    /// All of them, lowest step first
    List(RunArgs),
    /// The one with the highest step
    Latest(RunArgs),
    /// The one with the lowest evaluation loss
    Best(RunArgs),
}

#[derive(Args)]
struct RunArgs {
    /// The --output-dir of the run.
    #[arg(value_name = "RUN")]
    run: Option<PathBuf>,
    /// Print JSON: with step, eval_loss, is_best, saved_at, bytes, session_id, snapshot_id and path.
    #[arg(long)]
    json: bool,
}

/// A checkpoint as it is printed.
#[derive(Serialize)]
struct Row {
    step: u64,
    /// None: it was not evaluated at this step.
    eval_loss: Option<f64>,
    is_best: bool,
    /// In UTC.
    saved_at: Option<String>,
    bytes: u64,
    /// None: it was imported, and no server knows it.
    session_id: Option<String>,
    snapshot_id: Option<String>,
    path: PathBuf,
}

/// Runs the subcommand.
pub fn run(args: CheckpointsArgs) -> anyhow::Result<ExitCode> {
    // Whoever reads it may have seen enough.
    let _ = std::io::stdout().write_all(text(args)?.as_bytes());
    Ok(ExitCode::SUCCESS)
}

fn text(args: CheckpointsArgs) -> anyhow::Result<String> {
    let (wanted, of) = match &args.which {
        Some(Which::Latest(of)) => ("latest", of),
        Some(Which::Best(of)) => ("best", of),
        Some(Which::List(of)) => ("list", of),
        None => ("list", &args.run),
    };
    let Some(dir) = &of.run else {
        bail!("RUN is missing: name the --output-dir of a run, as in offshoot checkpoints run")
    };
    let mut rows = rows(dir)?;
    let path = |row: &Row| row.path.display().to_string() + "\n";
    match wanted {
        "list" if of.json => json(&rows),
        "list" => Ok(table(&rows)),
        "latest" => {
            let row = rows.pop().expect("there is one");
            if of.json { json(&row) } else { Ok(path(&row)) }
        }
        _ => match rows.iter().find(|row| row.is_best) {
            Some(row) if of.json => json(row),
            Some(row) => Ok(path(row)),
            None => bail!(
                "{}: none of its {} checkpoints has an evaluation loss, so none is the best; train with --eval-file, and with --adapter best or --save-interval a multiple of --eval-interval",
                dir.display(),
                rows.len()
            ),
        },
    }
}

/// At least one.
fn rows(dir: &Path) -> anyhow::Result<Vec<Row>> {
    let saved = checkpoint::list(dir)?;
    if saved.is_empty() {
        let hint = if !dir.exists() {
            "there is no such folder"
        } else if dir.join("training_state.json").exists() {
            "it is a checkpoint itself; name the folder that it is in"
        } else {
            "it holds no whole checkpoint_step_N; is it the --output-dir of a run, and has the run come to its first --save-interval?"
        };
        bail!("{}: {hint}", dir.display());
    }
    let best = checkpoint::best(&saved).map(|best| best.state.step);
    let row = |saved: Saved| -> anyhow::Result<Row> {
        Ok(Row {
            step: saved.state.step,
            eval_loss: saved.state.eval_loss,
            is_best: best == Some(saved.state.step),
            saved_at: saved.saved_at(),
            bytes: saved.n_bytes()?,
            session_id: saved.state.session_id,
            snapshot_id: saved.state.snapshot_id,
            path: saved.path,
        })
    };
    saved.into_iter().map(row).collect()
}

fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn table(rows: &[Row]) -> String {
    let none = || "-".to_string();
    let mut lines = vec![
        ["step", "eval loss", "", "saved (UTC)", "size", "session", "snapshot"].map(String::from),
    ];
    lines.extend(rows.iter().map(|row| {
        [
            row.step.to_string(),
            row.eval_loss.map_or_else(none, |loss| format!("{loss:.4}")),
            if row.is_best { "best".into() } else { String::new() },
            row.saved_at.as_deref().unwrap_or("-").replace('T', " ").replace('Z', ""),
            ByteSize(row.bytes).to_string(),
            row.session_id.clone().unwrap_or_else(none),
            row.snapshot_id.clone().unwrap_or_else(none),
        ]
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        for (column, (cell, width)) in line.iter().zip(widths).enumerate() {
            // Numbers end where those above and below end.
            let cell = if [0, 1, 4].contains(&column) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            };
            text.push_str(&cell);
            text.push_str("  ");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use offshoot_adapters::LoraSpec;
    use offshoot_trainer::ClientState;
    use offshoot_trainer::checkpoint::{Contents, RunSettings, TrainingState};

    fn print(words: &[&str]) -> anyhow::Result<String> {
        let words = ["offshoot", "checkpoints"].iter().chain(words).map(|word| word.into());
        let cli = Cli::read(words.collect())?;
        let Command::Checkpoints(args) = cli.command else { unreachable!("it was asked for") };
        text(args)
    }

    /// Steps 2, 4 and 6, of which the middle one is the best.
    fn run_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (step, eval_loss) in [(2, Some(3.0)), (4, Some(2.5)), (6, None)] {
            let lora = LoraSpec { target_modules: vec!["q_proj".into()], ..LoraSpec::default() };
            let settings = RunSettings { split_point_2: 1, lora, ..RunSettings::default() };
            let state = TrainingState {
                step,
                eval_loss,
                saved_at: Some("2026-11-22T20:00:00Z".into()),
                session_id: Some("s1".into()),
                snapshot_id: Some(format!("n{step}")),
                ..TrainingState::without_session(settings)
            };
            let contents = Contents {
                state: &state,
                n_layers: 2,
                fan_in_fan_out: false,
                client: &ClientState { bottom: None, top: None },
                tensors: [vec![], vec![], vec![]],
            };
            checkpoint::write(dir.path(), &contents).unwrap();
        }
        dir
    }

    #[test]
    fn a_list_says_what_each_is_and_which_is_the_best() {
        let dir = run_dir();
        let run = dir.path().to_str().unwrap();
        let text = print(&[run]).unwrap();
        println!("{text}");
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[2][..5], ["4", "2.5000", "best", "2026-11-22", "20:00:00"]);
        assert_eq!(lines[2][7..], ["s1", "n4"]);
        assert_eq!(lines[3][..2], ["6", "-"]);
        assert_eq!(text.matches("best").count(), 1);
        assert_eq!(print(&["list", run]).unwrap(), text);
        let rows: serde_json::Value =
            serde_json::from_str(&print(&[run, "--json"]).unwrap()).unwrap();
        assert_eq!((&rows[1]["step"], &rows[1]["is_best"]), (&4.into(), &true.into()));
        assert_eq!((&rows[2]["eval_loss"], &rows[2]["snapshot_id"]), (&().into(), &"n6".into()));
        assert!(rows[0]["bytes"].as_u64().unwrap() > 100);
    }

    #[test]
    fn latest_and_best_are_paths() {
        let dir = run_dir();
        let run = dir.path().to_str().unwrap();
        let latest = dir.path().join("checkpoint_step_6");
        assert_eq!(print(&["latest", run]).unwrap().trim(), latest.to_str().unwrap());
        let best = dir.path().join("checkpoint_step_4");
        assert_eq!(print(&["best", run]).unwrap().trim(), best.to_str().unwrap());
        let json = print(&["best", run, "--json"]).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["step"], 4);
    }

    #[test]
    fn what_is_no_run_says_so() {
        let dir = run_dir();
        let text = |words: &[&str]| print(words).unwrap_err().to_string();
        assert!(text(&["nowhere"]).contains("no such folder"));
        let one = dir.path().join("checkpoint_step_4");
        assert!(text(&["best", one.to_str().unwrap()]).contains("is a checkpoint itself"));
        let empty = tempfile::tempdir().unwrap();
        assert!(text(&[empty.path().to_str().unwrap()]).contains("no whole checkpoint_step_N"));
        std::fs::remove_dir_all(one).unwrap();
        std::fs::remove_dir_all(dir.path().join("checkpoint_step_2")).unwrap();
        assert!(text(&["best", dir.path().to_str().unwrap()]).contains("none is the best"));
    }
}
