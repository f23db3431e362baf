//! What a training writes down: one JSON object a line in `metrics.jsonl`.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::Team;
use super::report::TeamReport;

/// One line that matters here.
#[derive(Clone, Debug)]
pub enum Event {
    Step { step: u64, loss: f64, tokens: f64, tokens_per_second: f64 },
    Eval { step: u64, loss: f64 },
    Sample { text: String },
    Other,
}

/// The growing file of one team.
pub struct Metrics {
    path: PathBuf,
    read_bytes: u64,
    events: Vec<Event>,
}

impl Metrics {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), read_bytes: 0, events: Vec::new() }
    }

    /// Whether something went through the model: a run's first line only says what it is going to do.
    pub fn has_started(&self) -> bool {
        self.events.iter().any(|event| !matches!(event, Event::Other))
    }

    /// The events that came since the last call. A line that is not whole yet waits.
    pub fn read_new(&mut self) -> Result<Vec<Event>> {
        let mut file = match File::open(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            file => file?,
        };
        file.seek(SeekFrom::Start(self.read_bytes))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        self.read_bytes += whole as u64;
        let new = std::str::from_utf8(&bytes[..whole])?.lines().map(parse);
        let new: Vec<_> = new.collect::<Result<_>>()?;
        self.events.extend_from_slice(&new);
        Ok(new)
    }

    /// The whole run in a few numbers.
    pub fn summary(mut self, team: &'static Team, adapter: String) -> Result<TeamReport> {
        // What came between the last look and the end of the process.
        self.read_new()?;
        let mut losses = Vec::new();
        let (mut n_tokens, mut seconds) = (0.0, 0.0);
        let mut evals = Vec::new();
        let mut samples = Vec::new();
        for event in self.events {
            match event {
                Event::Step { loss, tokens, tokens_per_second, .. } => {
                    losses.push(loss);
                    n_tokens += tokens;
                    seconds += tokens / tokens_per_second;
                }
                Event::Eval { loss, .. } => evals.push(loss),
                Event::Sample { text } => samples.push(text),
                Event::Other => {}
            }
        }
        let missing = |what| format!("team {} wrote no {what} to metrics.jsonl", team.name);
        Ok(TeamReport {
            team,
            train_loss: mean_ends(&losses).with_context(|| missing("training step"))?,
            eval_loss: ends(&evals).with_context(|| missing("evaluation"))?,
            sample: ends(&samples).with_context(|| missing("sample"))?,
            tokens_per_second: n_tokens / seconds,
            adapter,
        })
    }
}

/// Steps whose mean is called the first, or the last, training loss: one batch says little.
pub const LOSS_WINDOW: usize = 10;

fn mean_ends(losses: &[f64]) -> Option<[f64; 2]> {
    // Of a short run, one half is the beginning and the other the end.
    let n = LOSS_WINDOW.min(losses.len().div_ceil(2));
    let mean = |part: &[f64]| part.iter().sum::<f64>() / n as f64;
    (n > 0).then(|| [mean(&losses[..n]), mean(&losses[losses.len() - n..])])
}

/// First and last.
fn ends<T: Clone>(values: &[T]) -> Option<[T; 2]> {
    Some([values.first()?.clone(), values.last()?.clone()])
}

fn parse(line: &str) -> Result<Event> {
    let value: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
    let number = |key: &str| {
        value[key].as_f64().with_context(|| format!("no number `{key}` in this line: {line}"))
    };
    Ok(match value["event"].as_str() {
        Some("step") => Event::Step {
            step: number("step")? as u64,
            loss: number("loss")?,
            tokens: number("tokens")?,
            tokens_per_second: number("tokens_per_second")?,
        },
        Some("eval") => Event::Eval { step: number("step")? as u64, loss: number("loss")? },
        Some("sample") => {
            let text = value["text"].as_str();
            let text = text.with_context(|| format!("no `text` in this line: {line}"))?;
            Event::Sample { text: text.to_owned() }
        }
        _ => Event::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::{Event, Metrics};
    use std::io::Write;

    #[test]
    fn a_growing_file_is_read_line_by_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut metrics = Metrics::new(file.path());
        assert!(metrics.read_new().unwrap().is_empty());
        write!(file, "{{\"event\":\"eval\",\"step\":0,\"loss\":3.5}}\n{{\"event\":\"st").unwrap();
        assert!(matches!(metrics.read_new().unwrap()[..], [Event::Eval { step: 0, .. }]));
        writeln!(file, "ep\",\"step\":1,\"loss\":3.25,\"tokens\":8,\"tokens_per_second\":9}}")
            .unwrap();
        let new = metrics.read_new().unwrap();
        assert!(matches!(new[..], [Event::Step { step: 1, loss: 3.25, .. }]), "{new:?}");
        assert!(metrics.read_new().unwrap().is_empty());
    }
}
