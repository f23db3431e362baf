//! What was measured, as JSON and as tables.

use serde::Serialize;
use std::fmt::Write;

/// One roll.
#[derive(Debug, Clone, Serialize)]
pub struct Roll {
    /// From SIGTERM to the end of the old process.
    pub ended_seconds: f64,
    /// From SIGTERM until the new one serves.
    pub ready_seconds: f64,
    /// Of each client: the longest time between two answers, from SIGTERM to its first answer of the
    /// new server.
    pub pause_seconds: Vec<f64>,
}

/// All rolls of one way.
#[derive(Debug, Serialize)]
pub struct Series {
    pub way: &'static str,
    pub clients: usize,
    /// Of each client.
    pub steps: u64,
    pub lost_steps: u64,
    pub doubled_steps: u64,
    pub replayed_steps: u64,
    pub times_back: u64,
    /// Adapters and every number of each step are those of a run without rolls.
    pub bit_equal: bool,
    /// Between two answers, away from rolls.
    pub usual_gap_seconds: f64,
    pub rolls: Vec<Roll>,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub trunk: String,
    pub seed: u64,
    pub program: String,
    pub seconds: f64,
    pub series: Vec<Series>,
}

/// The value that this part of all values are not above.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

impl Series {
    fn pauses(&self) -> Vec<f64> {
        self.rolls.iter().flat_map(|roll| &roll.pause_seconds).copied().collect()
    }

    fn median(&self, of: impl Fn(&Roll) -> f64) -> f64 {
        quantile(&self.rolls.iter().map(of).collect::<Vec<_>>(), 0.5)
    }
}

impl Report {
    /// For people.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, to: &mut String) -> std::fmt::Result {
        writeln!(to, "{}, seed {}, {:.0} s\n", self.trunk, self.seed, self.seconds)?;
        let head: Vec<&str> = self.series.iter().map(|series| series.way).collect();
        writeln!(to, "| | {} |", head.join(" | "))?;
        writeln!(to, "|---|{}", "---|".repeat(head.len()))?;
        let mut row = |what: &str, of: &dyn Fn(&Series) -> String| {
            let cells: Vec<String> = self.series.iter().map(of).collect();
            writeln!(to, "| {what} | {} |", cells.join(" | "))
        };
        let pause = |part: f64| move |s: &Series| format!("{:.2}", quantile(&s.pauses(), part));
        row("rolls", &|s| s.rolls.len().to_string())?;
        row("clients that train", &|s| s.clients.to_string())?;
        row("steps of each", &|s| s.steps.to_string())?;
        row("steps lost", &|s| s.lost_steps.to_string())?;
        row("steps doubled", &|s| s.doubled_steps.to_string())?;
        row("steps taken again", &|s| s.replayed_steps.to_string())?;
        row("times a client went back", &|s| s.times_back.to_string())?;
        row("adapters and all numbers bit-equal to a run without rolls", &|s| {
            if s.bit_equal { "yes" } else { "NO" }.to_string()
        })?;
        row("usual time between two answers, median s", &|s| {
            format!("{:.3}", s.usual_gap_seconds)
        })?;
        row("pause of a client, p50 s", &pause(0.5))?;
        row("pause of a client, p95 s", &pause(0.95))?;
        row("pause of a client, max s", &pause(1.0))?;
        row("SIGTERM to the old one's end, median s", &|s| {
            format!("{:.2}", s.median(|roll| roll.ended_seconds))
        })?;
        row("SIGTERM to the new one serves, median s", &|s| {
            format!("{:.2}", s.median(|roll| roll.ready_seconds))
        })
    }
}
