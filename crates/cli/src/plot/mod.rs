mod canvas;
mod curves;
mod png;
mod terminal;

use anyhow::Context;
use clap::Args;
use curves::Run;
use offshoot_trainer::metrics::{End, RunLog};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use terminal::Terminal;

/// Draw the loss curves of runs, to the terminal and to a PNG file.
///
/// Training loss, smoothed and of each step, evaluations and learning rate, from the metrics.jsonl
/// of a run's output directory; also while the run is going on. Several runs share one plot.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct PlotArgs {
    /// Output directory of a run, or its metrics.jsonl.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The PNG file [default: loss.png in RUN; with several runs, loss.png here].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Draw to the terminal only.
    #[arg(long, conflicts_with = "output")]
    no_png: bool,
    /// Steps that the smoothed curve is a mean of; 1 for no smoothing [default: a twentieth of the
    /// longest run, at least 5].
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    smoothing: Option<u64>,
    /// Columns of the plot in the terminal [default: as wide as the terminal, else 100].
    #[arg(long, value_name = "COLUMNS", value_parser = clap::value_parser!(u16).range(40..=400))]
    width: Option<u16>,
}

const EXAMPLES: &str = "\
Examples:
  offshoot plot run
  offshoot plot run-r8 run-r16 --output ranks.png
  watch offshoot plot --no-png run";

/// Columns where nobody says how many there are.
const USUAL_WIDTH: u16 = 100;
/// Wider plots are no clearer.
const MOST_COLUMNS: u16 = 160;

/// Runs the subcommand.
pub fn run(args: PlotArgs) -> anyhow::Result<ExitCode> {
    let logs = args.runs.iter().map(|run| RunLog::read(run)).collect::<Result<Vec<_>, _>>()?;
    for log in &logs {
        warn_of_lines(log);
    }
    let span = args.smoothing.unwrap_or_else(|| curves::usual_span(&logs));
    let names = curves::names(&args.runs);
    let runs: Vec<Run> =
        names.into_iter().zip(logs).map(|(name, log)| Run::new(name, log, span)).collect();

    let terminal = Terminal { columns: columns(args.width), colours: colours() };
    say(&terminal.draw(&runs, span));
    if !args.no_png {
        let path = args.output.unwrap_or_else(|| usual_output(&args.runs));
        png::write(&path, &runs, span).with_context(|| {
            format!("cannot write {}; name another file by --output", path.display())
        })?;
        say(&format!("\n{}\n", path.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Nobody may be there to read all of it, as with `| head`.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn warn_of_lines(log: &RunLog) {
    if log.n_unreadable > 0 {
        let (n, path) = (log.n_unreadable, log.path.display());
        eprintln!("warning: {path}: {n} lines are no events and were passed over");
    }
}

fn usual_output(runs: &[PathBuf]) -> PathBuf {
    match runs {
        [run] if run.is_dir() => run.join("loss.png"),
        [file] => file.with_file_name("loss.png"),
        _ => "loss.png".into(),
    }
}

fn columns(asked: Option<u16>) -> usize {
    let found = || terminal_size::terminal_size().map(|(width, _)| width.0.min(MOST_COLUMNS));
    let on_terminal = std::io::stdout().is_terminal().then(found).flatten();
    usize::from(asked.or(on_terminal).unwrap_or(USUAL_WIDTH)).max(40)
}

/// As <https://no-color.org> asks for.
fn colours() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !refused
}

/// Model, steps and state of a run.
fn subtitle(log: &RunLog) -> String {
    let last = log.steps.last().map_or(0, |point| point.step);
    let last = last.max(log.evaluations.last().map_or(0, |point| point.step));
    let steps = match log.n_steps {
        Some(n_steps) => format!("{last} of {n_steps} steps"),
        None => format!("{last} steps"),
    };
    let state = match log.end {
        End::Open => "",
        End::Interrupted => ", stopped",
        End::Done => ", done",
    };
    let model = log.model.as_deref().map(|model| Path::new(model).file_name().unwrap_or_default());
    let model = model.map_or(String::new(), |name| format!("{}, ", name.to_string_lossy()));
    format!("{model}{steps}{state}")
}

#[cfg(test)]
mod tests;
