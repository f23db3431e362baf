//! What was done and what came of it, as JSON and as tables.

use crate::fault::{Hit, Kind};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// A fault that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Struck {
    pub kind: Kind,
    /// Steps that the trainer had reported.
    pub step: u64,
    /// Since the run began.
    pub seconds: f64,
    #[serde(flatten)]
    pub hit: Hit,
    /// Until the next step was reported.
    pub recovery_seconds: f64,
}

/// A disturbed run.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    pub number: u64,
    pub setting: &'static str,
    pub n_steps: u64,
    pub seconds: f64,
    pub faults: Vec<Struck>,
    pub replayed_steps: u64,
    pub lost_steps: u64,
    pub doubled_steps: u64,
    pub rollbacks: u64,
    pub reconnections: u64,
    /// Trainers that ended with an error and were started again with `--resume latest`.
    pub gave_up: u64,
    /// What they said.
    pub errors: Vec<String>,
    /// Of the files that were compared, all equal.
    pub compared_bytes: usize,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub seed: u64,
    pub program: String,
    pub seconds: f64,
    pub runs: Vec<Run>,
}

impl Report {
    /// Faults that interrupted something.
    pub fn n_hits(&self) -> usize {
        self.faults().filter(|fault| fault.hit.hit).count()
    }

    fn faults(&self) -> impl Iterator<Item = &Struck> {
        self.runs.iter().flat_map(|run| &run.faults)
    }

    fn sum(&self, of: impl Fn(&Run) -> u64) -> u64 {
        self.runs.iter().map(of).sum()
    }

    /// For people.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, to: &mut String) -> std::fmt::Result {
        let runs = self.runs.len();
        writeln!(to, "seed {}, {runs} disturbed runs, {:.0} s\n", self.seed, self.seconds)?;
        writeln!(to, "| | |\n|---|---|")?;
        writeln!(to, "| faults | {} |", self.faults().count())?;
        writeln!(to, "| of them, that interrupted something | {} |", self.n_hits())?;
        writeln!(to, "| steps asked for | {} |", self.sum(|run| run.n_steps))?;
        writeln!(to, "| steps replayed | {} |", self.sum(|run| run.replayed_steps))?;
        writeln!(to, "| steps lost | {} |", self.sum(|run| run.lost_steps))?;
        writeln!(to, "| steps doubled | {} |", self.sum(|run| run.doubled_steps))?;
        writeln!(to, "| rollbacks by the trainer itself | {} |", self.sum(|run| run.rollbacks))?;
        writeln!(to, "| reconnections | {} |", self.sum(|run| run.reconnections))?;
        writeln!(
            to,
            "| trainers that gave up and were resumed by hand | {} |",
            self.sum(|run| run.gave_up)
        )?;
        writeln!(
            to,
            "| runs whose adapter, optimizers and losses equal the undisturbed run's | {runs} of {runs} |"
        )?;
        self.write_kinds(to)?;
        self.write_runs(to)
    }

    fn write_kinds(&self, to: &mut String) -> std::fmt::Result {
        writeln!(
            to,
            "\n| fault | happened | interrupted | median s to the next step | where it hit |"
        )?;
        writeln!(to, "|---|---|---|---|---|")?;
        let mut kinds: BTreeMap<Kind, Vec<&Struck>> = BTreeMap::new();
        self.faults().for_each(|fault| kinds.entry(fault.kind).or_default().push(fault));
        for (kind, faults) in kinds {
            let n_hits = faults.iter().filter(|fault| fault.hit.hit).count();
            let mut recovery: Vec<f64> =
                faults.iter().map(|fault| fault.recovery_seconds).collect();
            recovery.sort_by(f64::total_cmp);
            let mut places: BTreeMap<&str, usize> = BTreeMap::new();
            let known = faults.iter().filter_map(|fault| fault.hit.place);
            known.for_each(|place| *places.entry(place).or_default() += 1);
            let places: Vec<String> = places.iter().map(|(p, n)| format!("{p}: {n}")).collect();
            writeln!(
                to,
                "| {} | {} | {n_hits} | {:.2} | {} |",
                kind.what(),
                faults.len(),
                recovery[recovery.len() / 2],
                places.join(", ")
            )?;
        }
        Ok(())
    }

    fn write_runs(&self, to: &mut String) -> std::fmt::Result {
        writeln!(
            to,
            "\n| setting | runs | faults | steps replayed | rollbacks | reconnections | bytes compared |"
        )?;
        writeln!(to, "|---|---|---|---|---|---|---|")?;
        let mut settings: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
        self.runs.iter().for_each(|run| settings.entry(run.setting).or_default().push(run));
        for (setting, runs) in settings {
            let sum = |of: fn(&Run) -> u64| runs.iter().map(|run| of(run)).sum::<u64>();
            let faults: usize = runs.iter().map(|run| run.faults.len()).sum();
            let bytes: usize = runs.iter().map(|run| run.compared_bytes).sum();
            writeln!(
                to,
                "| {setting} | {} | {faults} | {} | {} | {} | {bytes} |",
                runs.len(),
                sum(|run| run.replayed_steps),
                sum(|run| run.rollbacks),
                sum(|run| run.reconnections),
            )?;
        }
        Ok(())
    }
}
