//! Both teams' progress: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Team;
use super::metrics::Event;

pub struct Progress {
    rows: Vec<(&'static str, ProgressBar)>,
    _bars: Option<MultiProgress>,
}

impl Progress {
    /// Lines are for people who wait, not a record: metrics.jsonl has every step.
    const LINE_EVERY: u64 = 5;

    pub fn new(teams: &'static [Team], n_steps: u32) -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        let style = ProgressStyle::with_template("{prefix:8} [{bar:30}] {pos:>3}/{len} {msg}")
            .expect("a template that indicatif accepts")
            .progress_chars("=> ");
        let rows = teams.iter().map(|team| {
            let bar = match &bars {
                Some(bars) => bars.add(ProgressBar::new(n_steps.into())),
                None => ProgressBar::hidden(),
            };
            bar.set_length(n_steps.into());
            bar.set_style(style.clone());
            bar.set_prefix(team.name);
            bar.set_message("starting");
            (team.name, bar)
        });
        Self { rows: rows.collect(), _bars: bars }
    }

    pub fn show(&self, team: usize, event: &Event) {
        let (name, bar) = &self.rows[team];
        let message = match event {
            Event::Step { step, loss, tokens_per_second, .. } => {
                bar.set_position(*step);
                format!("loss {loss:.3}  {tokens_per_second:.0} tokens/s")
            }
            Event::Eval { loss, .. } => format!("evaluation loss {loss:.3}"),
            Event::Sample { .. } | Event::Other => return,
        };
        if bar.is_hidden() {
            match event {
                Event::Step { step, .. } if *step != 1 && step % Self::LINE_EVERY != 0 => {}
                Event::Step { step, .. } | Event::Eval { step, .. } => {
                    let of = bar.length().unwrap_or(0);
                    eprintln!("{name:8} step {step:>3}/{of}  {message}");
                }
                Event::Sample { .. } | Event::Other => {}
            }
        }
        bar.set_message(message);
    }

    pub fn finish(&self) {
        for (_, bar) in &self.rows {
            bar.finish();
        }
    }
}
