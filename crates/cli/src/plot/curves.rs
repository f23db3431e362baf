//! What both plots show: curves with the ranges of their axes.

use offshoot_trainer::metrics::RunLog;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Share of an axis that stays free at either end.
const MARGIN: f64 = 0.04;
/// Single steps above this quantile of all do not stretch the loss axis.
const STRETCH_QUANTILE: f64 = 0.98;
/// Steps that the smoothed curve of a short run reaches over.
const LEAST_SPAN: u64 = 5;

/// A run as it is drawn: x is the step in all curves.
pub struct Run {
    pub name: String,
    pub log: RunLog,
    /// Training loss of each step.
    pub raw: Vec<(f64, f64)>,
    /// The same, smoothed.
    pub smooth: Vec<(f64, f64)>,
    pub evaluations: Vec<(f64, f64)>,
    pub learning_rate: Vec<(f64, f64)>,
}

impl Run {
    /// `span`: steps that the smoothed curve reaches over.
    pub fn new(name: String, log: RunLog, span: u64) -> Self {
        let at = |step: u64| step as f64;
        let raw: Vec<_> = log.steps.iter().map(|p| (at(p.step), p.loss)).collect();
        let rates = log.steps.iter().filter(|p| p.learning_rate.is_finite());
        Run {
            name,
            smooth: smoothed(&raw, span),
            raw,
            evaluations: log.evaluations.iter().map(|p| (at(p.step), p.loss)).collect(),
            learning_rate: rates.map(|p| (at(p.step), p.learning_rate)).collect(),
            log,
        }
    }
}

/// Exponential mean whose weights reach over some `span` values; the first values are the mean of
/// those that there are, not drawn towards 0.
fn smoothed(points: &[(f64, f64)], span: u64) -> Vec<(f64, f64)> {
    let keep = 1.0 - 2.0 / (span.max(1) as f64 + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |&(x, y): &(f64, f64)| {
        sum = sum * keep + y;
        weight = weight * keep + 1.0;
        (x, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// A twentieth of the longest run, but at least as many as make a mean.
pub fn usual_span(logs: &[RunLog]) -> u64 {
    let n_steps = logs.iter().map(|log| log.steps.len()).max().unwrap_or(0);
    (n_steps as u64 / 20).max(LEAST_SPAN)
}

/// From the first step to the last one that a run has.
pub fn step_range(runs: &[Run]) -> Range<f64> {
    let all = runs.iter().flat_map(|run| run.raw.iter().chain(&run.evaluations));
    let (low, high) = extent(all.map(|&(x, _)| x)).unwrap_or((0.0, 1.0));
    let free = if high > low { (high - low) * MARGIN / 4.0 } else { 0.5 };
    low - free..high + free
}

/// Loss of all curves. A few single steps far above do not count.
pub fn loss_range(runs: &[Run]) -> Range<f64> {
    let curves = runs.iter().flat_map(|run| run.smooth.iter().chain(&run.evaluations));
    let (low, high) = extent(curves.map(|&(_, y)| y)).unwrap_or((0.0, 1.0));
    let mut raw: Vec<f64> = runs.iter().flat_map(|run| run.raw.iter().map(|&(_, y)| y)).collect();
    raw.sort_by(f64::total_cmp);
    let at = (raw.len().saturating_sub(1) as f64 * STRETCH_QUANTILE).ceil() as usize;
    let low = raw.first().map_or(low, |&first| first.min(low));
    let high = raw.get(at).map_or(high, |&most| most.max(high));
    with_margin(low, high)
}

/// What the loss axis counts.
pub fn loss_title(runs: &[Run]) -> String {
    // Files of older versions know no other.
    let name = |run: &Run| run.log.loss.clone().unwrap_or_else(|| "cross-entropy".into());
    let mut names: Vec<_> = runs.iter().map(name).collect();
    names.dedup();
    match &names[..] {
        [one] if one == "cross-entropy" => "loss (nats per token)".into(),
        [one] => format!("loss ({one})"),
        _ => "loss".into(),
    }
}

/// Learning rates, from 0.
pub fn rate_range(runs: &[Run]) -> Range<f64> {
    let rates = runs.iter().flat_map(|run| run.learning_rate.iter().map(|&(_, y)| y));
    let (_, high) = extent(rates).unwrap_or((0.0, 1.0));
    if high > 0.0 { 0.0..high * (1.0 + 2.0 * MARGIN) } else { 0.0..1.0 }
}

fn with_margin(low: f64, high: f64) -> Range<f64> {
    let free = match high - low {
        span if span > 0.0 => span * MARGIN,
        _ => low.abs().max(1.0) * MARGIN,
    };
    low - free..high + free
}

fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |extent, value| match extent {
        None => Some((value, value)),
        Some((low, high)) => Some((value.min(low), value.max(high))),
    })
}

/// Names by which the runs can be told apart: the last parts of their paths, as few as it takes.
pub fn names(runs: &[PathBuf]) -> Vec<String> {
    let parts: Vec<Vec<String>> = runs.iter().map(|run| path_parts(run)).collect();
    let longest = parts.iter().map(Vec::len).max().unwrap_or(1);
    let last = |parts: &Vec<String>, n: usize| parts[parts.len().saturating_sub(n)..].join("/");
    (1..=longest)
        .map(|n| parts.iter().map(|parts| last(parts, n)).collect::<Vec<_>>())
        .find(|names| (1..names.len()).all(|i| !names[..i].contains(&names[i])))
        // The same run twice.
        .unwrap_or_else(|| runs.iter().map(|run| run.display().to_string()).collect())
}

/// Of a run's directory, also if its file was named.
fn path_parts(run: &Path) -> Vec<String> {
    let dir = match run.is_file() {
        true => run.parent().unwrap_or(run),
        false => run,
    };
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    let parts = whole.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    let parts: Vec<String> = parts.filter(|part| part != "/").collect();
    if parts.is_empty() { vec!["/".into()] } else { parts }
}

/// Round numbers, some `n` of them, within `range`: 1, 2 or 5 times a power of ten apart, and not
/// less than `least` apart.
pub fn ticks(range: &Range<f64>, n: usize, least: f64) -> Vec<f64> {
    let rough = (range.end - range.start) / n.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|times| times * power);
    let step =
        steps.into_iter().find(|step| *step >= 0.999 * rough).unwrap_or(10.0 * power).max(least);
    let first = (range.start / step).ceil() as i64;
    // A count bounds what rounding at the end could add.
    (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= range.end).take(4 * n).collect()
}

/// A loss, with as many places as its ticks are apart.
pub fn loss_label(value: f64, ticks: &[f64]) -> String {
    let apart = ticks.windows(2).map(|pair| pair[1] - pair[0]).next().unwrap_or(0.1);
    let places = (-apart.log10()).ceil().clamp(0.0, 6.0) as usize;
    format!("{value:.places$}")
}

/// A learning rate such as `1e-4` or `1.5e-4`.
pub fn rate_label(value: f64) -> String {
    if value == 0.0 { "0".into() } else { rounded(value) }
}

/// Two digits are enough for ticks, and for first and last values.
fn rounded(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    format!("{digits}e{power}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_is_a_mean_that_reaches_over_its_span() {
        let points: Vec<_> = (0..40).map(|i| (i as f64, if i < 20 { 4.0 } else { 2.0 })).collect();
        assert_eq!(smoothed(&points, 1), points);
        let smooth = smoothed(&points, 5);
        assert_eq!(smooth[0], (0.0, 4.0));
        assert!((smooth[19].1 - 4.0).abs() < 1e-12);
        // Half-way after about half the span, there after some spans.
        assert!(smooth[21].1 < 3.0 && smooth[20].1 > 3.0, "{:?}", &smooth[19..23]);
        assert!((smooth[39].1 - 2.0).abs() < 1e-2, "{:?}", smooth[39]);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(&(0.9..4.1), 4, 0.0), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(ticks(&(1.0..40.0), 8, 1.0), [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0]);
        // Steps are whole numbers.
        assert_eq!(ticks(&(0.0..3.0), 10, 1.0), [0.0, 1.0, 2.0, 3.0]);
        let fine = ticks(&(1.975..2.055), 4, 0.0);
        assert_eq!(fine.len(), 4, "{fine:?}");
        assert_eq!(loss_label(fine[1], &fine), "2.00");
        assert_eq!([2e-3, 1.5e-4, 0.0].map(rate_label), ["2e-3", "1.5e-4", "0"]);
    }

    #[test]
    fn names_tell_runs_apart() {
        let of = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["/a/run/"]), ["run"]);
        assert_eq!(of(&["/a/x/run", "/a/y/run"]), ["x/run", "y/run"]);
        assert_eq!(of(&["/a/x/run", "/a/run"]), ["x/run", "a/run"]);
    }

    #[test]
    fn one_wild_step_does_not_flatten_the_curve() {
        let mut log = RunLog::default();
        for step in 1..=200 {
            let loss = if step == 50 { 900.0 } else { 2.0 };
            let point = offshoot_trainer::metrics::StepPoint {
                step,
                loss,
                learning_rate: 1e-4,
                tokens_per_second: 1.0,
            };
            log.steps.push(point);
        }
        let run = Run::new("run".into(), log, 50);
        let range = loss_range(&[run]);
        assert!(range.end < 100.0 && range.start < 2.0, "{range:?}");
    }
}
