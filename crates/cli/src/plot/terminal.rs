use super::canvas::{Canvas, Pen, coloured};
use super::curves::{self, Run};
use super::subtitle;
use std::fmt::Write;
use std::ops::Range;

/// Character rows of the loss plot.
const ROWS: usize = 16;
/// Of runs one after the other; blue, orange, green, red, purple, brown.
const COLOURS: [u8; 6] = [33, 208, 34, 160, 134, 94];
/// Single steps of a run that is alone.
const RAW: u8 = 245;
/// Evaluations of a run that is alone.
const EVALUATION: u8 = 208;
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A terminal, or a file in its place.
pub struct Terminal {
    pub columns: usize,
    pub colours: bool,
}

/// Where the plot's area begins and how wide it is.
struct Frame {
    left: usize,
    columns: usize,
    steps: Range<f64>,
    loss: Range<f64>,
}

impl Terminal {
    /// Title, loss plot, learning rates, legend and a line of numbers for each run.
    pub fn draw(&self, runs: &[Run], span: u64) -> String {
        let (steps, loss) = (curves::step_range(runs), curves::loss_range(runs));
        let ticks = curves::ticks(&loss, ROWS / 3, 0.0);
        let labels: Vec<_> = ticks.iter().map(|&tick| curves::loss_label(tick, &ticks)).collect();
        let left = labels.iter().map(String::len).max().unwrap_or(0).max(5) + 1;
        let columns = self.columns.saturating_sub(left + 2).max(20);
        let frame = Frame { left, columns, steps, loss };

        let mut out = String::new();
        for run in runs {
            writeln!(out, "{}: {}", run.name, subtitle(&run.log)).expect("a string takes it");
        }
        writeln!(out, "\n{}", curves::loss_title(runs)).expect("a string takes it");
        let canvas = self.canvas(runs, &frame);
        let rows = canvas.rows();
        for row in 0..rows {
            let here = ticks.iter().position(|&tick| frame.row_of(tick, rows) == row);
            let (label, axis) = match here {
                Some(tick) => (labels[tick].as_str(), '┤'),
                None => ("", '│'),
            };
            writeln!(out, "{label:>left$} {axis}{}", canvas.row(row)).expect("a string takes it");
        }
        out += &frame.step_axis();
        for (i, run) in runs.iter().enumerate() {
            out += &self.rate_row(runs, i, run, &frame);
        }
        out + &self.legend(runs, span) + &numbers(runs, span)
    }

    fn canvas(&self, runs: &[Run], frame: &Frame) -> Canvas {
        let mut canvas = Canvas::new(frame.columns, ROWS);
        for (i, run) in runs.iter().enumerate() {
            if let ([run], true) = (runs, self.colours) {
                canvas.line(frame.scaled(&run.raw), self.pen(None, RAW));
            }
            canvas.line(frame.scaled(&run.smooth), self.training(runs, i));
        }
        for (i, run) in runs.iter().enumerate() {
            canvas.marks(frame.scaled(&run.evaluations), self.evaluation(runs, i));
        }
        canvas
    }

    /// A letter for each of several runs where there are no colours to tell them apart.
    fn training(&self, runs: &[Run], i: usize) -> Pen {
        let letter = (b'a' + (i % 26) as u8) as char;
        let alone = runs.len() == 1 || self.colours;
        self.pen((!alone).then_some(letter), COLOURS[i % COLOURS.len()])
    }

    fn evaluation(&self, runs: &[Run], i: usize) -> Pen {
        match (runs.len(), self.training(runs, i).mark) {
            (1, _) => self.pen(Some('●'), EVALUATION),
            (_, Some(letter)) => self.pen(Some(letter.to_ascii_uppercase()), 0),
            (_, None) => self.pen(Some('●'), COLOURS[i % COLOURS.len()]),
        }
    }

    fn pen(&self, mark: Option<char>, colour: u8) -> Pen {
        Pen { mark, colour: self.colours.then_some(colour) }
    }

    /// The learning rate below the steps that it belongs to.
    fn rate_row(&self, runs: &[Run], i: usize, run: &Run, frame: &Frame) -> String {
        let range = curves::rate_range(runs);
        let Some(&(first, _)) = run.learning_rate.first() else { return String::new() };
        let last = run.learning_rate.last().map_or(first, |&(step, _)| step);
        let width = (frame.steps.end - frame.steps.start) / frame.columns as f64;
        let block = |column: usize| {
            let step = frame.steps.start + (column as f64 + 0.5) * width;
            if step < first - width || step > last + width {
                return ' ';
            }
            let after = run.learning_rate.partition_point(|&(s, _)| s < step);
            let rate = run.learning_rate[after.min(run.learning_rate.len() - 1)].1;
            let level = (rate / range.end * BLOCKS.len() as f64) as usize;
            BLOCKS[level.min(BLOCKS.len() - 1)]
        };
        let blocks: String = (0..frame.columns).map(block).collect();
        let blocks = coloured(blocks.trim_end(), self.training(runs, i).colour);
        let mark = self.training(runs, i).mark.map_or(String::new(), |mark| format!(" {mark}"));
        let left = frame.left;
        let label = format!("lr{mark}");
        format!("{label:>left$}  {blocks}\n")
    }

    fn legend(&self, runs: &[Run], span: u64) -> String {
        let mean = match span {
            1 => "training".to_string(),
            span => format!("training, mean of some {span} steps"),
        };
        if let [_] = runs {
            let line = coloured("⠤⠤", self.training(runs, 0).colour);
            let point = coloured("●", self.evaluation(runs, 0).colour);
            let raw = match self.colours && span > 1 {
                true => format!("   {} each step", coloured("⠤⠤", Some(RAW))),
                false => String::new(),
            };
            return format!("\n{line} {mean}{raw}   {point} evaluation\n");
        }
        let entry = |(i, run): (usize, &Run)| {
            let (line, point) = (self.training(runs, i), self.evaluation(runs, i));
            let line = line.mark.map_or("⠤⠤".into(), |mark| coloured(&mark.to_string(), None));
            let line = coloured(&line, self.training(runs, i).colour);
            let point = coloured(&point.mark.unwrap_or('●').to_string(), point.colour);
            format!("{line} {point} {}", run.name)
        };
        let entries: Vec<_> = runs.iter().enumerate().map(entry).collect();
        format!("\n{}\nlines: {mean}; marks: evaluations\n", entries.join("   "))
    }
}

impl Frame {
    fn scaled<'a>(&self, points: &'a [(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + 'a {
        let (steps, loss) = (self.steps.clone(), self.loss.clone());
        let part =
            |value: f64, range: &Range<f64>| (value - range.start) / (range.end - range.start);
        points.iter().map(move |&(x, y)| (part(x, &steps), part(y, &loss)))
    }

    fn row_of(&self, loss: f64, rows: usize) -> usize {
        let part = (loss - self.loss.start) / (self.loss.end - self.loss.start);
        ((1.0 - part) * (rows * 4 - 1) as f64 / 4.0) as usize
    }

    /// The axis with its ticks, and their numbers below it.
    fn step_axis(&self) -> String {
        let (left, columns) = (self.left, self.columns);
        let mut axis = vec!['─'; columns];
        let mut numbers = String::new();
        for tick in curves::ticks(&self.steps, columns / 12, 1.0) {
            let part = (tick - self.steps.start) / (self.steps.end - self.steps.start);
            let column = (part * (columns - 1) as f64).round() as usize;
            let label = format!("{tick:.0}");
            let from = column.saturating_sub(label.len() / 2);
            if from >= numbers.len() + usize::from(!numbers.is_empty())
                && from + label.len() <= columns
            {
                axis[column] = '┬';
                numbers = format!("{numbers:from$}{label}");
            }
        }
        let axis: String = axis.into_iter().collect();
        format!("{:left$} └{axis}\n{:left$}  {numbers}  step\n", "", "")
    }
}

/// From where to where, and how fast.
fn numbers(runs: &[Run], span: u64) -> String {
    let width = runs.iter().map(|run| run.name.chars().count()).max().unwrap_or(0);
    let mut out = String::from("\n");
    for run in runs {
        let mut parts = Vec::new();
        if let [(_, first), .., (_, last)] = ends(&run.raw, span)[..] {
            parts.push(format!("training {first:.4} -> {last:.4}"));
        }
        if let (Some(&(_, first)), Some(best)) = (run.evaluations.first(), run.log.best()) {
            let last = run.evaluations.last().map(|&(_, loss)| loss).unwrap_or(first);
            parts.push(match run.evaluations.len() {
                1 => format!("evaluation {first:.4} at step {}", best.step),
                _ => format!(
                    "evaluation {first:.4} -> {last:.4}, best {:.4} at step {}",
                    best.loss, best.step
                ),
            });
        }
        if let Some(most) = run.learning_rate.iter().map(|&(_, rate)| rate).reduce(f64::max) {
            parts.push(format!("lr up to {}", curves::rate_label(most)));
        }
        let rates: Vec<f64> = run.log.steps.iter().map(|p| p.tokens_per_second).collect();
        if let Some(median) = median(rates) {
            parts.push(format!("{median:.0} tokens/s"));
        }
        writeln!(out, "{:width$}  {}", run.name, parts.join("   ")).expect("a string takes it");
    }
    out
}

/// Means of the first and the last `span` values, at most of half of them.
fn ends(points: &[(f64, f64)], span: u64) -> Vec<(f64, f64)> {
    let n = (span as usize).min(points.len().div_ceil(2));
    if n == 0 {
        return Vec::new();
    }
    let mean = |part: &[(f64, f64)]| part.iter().map(|(_, y)| y).sum::<f64>() / n as f64;
    vec![(0.0, mean(&points[..n])), (1.0, mean(&points[points.len() - n..]))]
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
