use super::event::{Event, StepEvent};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::io::Write;
use std::time::{Duration, Instant};

/// Lines for people on stdout, with a bar below them if stderr is a terminal.
pub(super) struct Console {
    bar: Option<ProgressBar>,
    quiet: bool,
    log_interval: u64,
    n_steps: u64,
    /// Since the last line.
    interval: Interval,
    pace: Option<Pace>,
}

/// What a line is the mean of.
#[derive(Default)]
struct Interval {
    /// Of steps only: evaluations and checkpoints do not slow training down.
    seconds: f64,
    wait_seconds: f64,
    n_steps: u64,
    loss: f64,
    tokens: u64,
    extra: BTreeMap<String, f64>,
}

/// Since when which steps were taken, evaluations and checkpoints included.
struct Pace {
    since: Instant,
    step: u64,
}

impl Console {
    pub fn new(step: u64, n_steps: u64, log_interval: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:24} {pos}/{len} [{elapsed} < {eta}] {msg}";
            let style = ProgressStyle::with_template(style).expect("a fixed template");
            ProgressBar::new(n_steps).with_style(style).with_position(step)
        });
        let interval = Interval::default();
        Console { bar, quiet: false, log_interval, n_steps, interval, pace: None }
    }

    /// One that prints nothing.
    pub fn silenced(self) -> Self {
        Console { bar: None, quiet: true, ..self }
    }

    pub fn rewind(&mut self, step: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
        self.interval = Interval::default();
        self.pace = None;
    }

    pub fn line(&self, text: &str) {
        if self.quiet {
            return;
        }
        // A reader that went away, such as `head`, must not end a run.
        let print = || {
            let _ = writeln!(std::io::stdout(), "{text}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Start(_) => {}
            Event::Step(step) => self.step(step),
            Event::Eval(eval) => {
                let best = match eval.best_step {
                    step if step == eval.step => "the best so far".to_string(),
                    step => format!("best {:.4} at step {step}", eval.best),
                };
                self.line(&format!(
                    "eval {}  epoch {:>5.2}  loss {:>7.4}  {best}{}",
                    self.place(eval.step),
                    eval.epoch,
                    eval.loss,
                    extras(&eval.extra, 1.0),
                ));
            }
            Event::Sample { step, prompt, text } => {
                self.line(&format!("text {}  {prompt:?} -> {text:?}", self.place(*step)));
            }
            Event::Checkpoint { step, name } => {
                self.line(&format!("save {}  {name}", self.place(*step)));
            }
            Event::Done(_) => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
            }
        }
    }

    /// Step and steps, as wide for every step of a run.
    fn place(&self, step: u64) -> String {
        let width = self.n_steps.to_string().len();
        format!("{step:>width$}/{}", self.n_steps)
    }

    fn step(&mut self, event: &StepEvent) {
        let seconds = 1.0 / event.steps_per_second;
        let pace = self.pace.get_or_insert_with(|| Pace::before(event.step, seconds));
        let left = pace.left(event.step, self.n_steps);
        self.interval.add(event, seconds);
        if let Some(bar) = &self.bar {
            bar.set_position(event.step);
            bar.set_message(format!("loss {:.4}", event.loss));
        }
        let due = event.step.is_multiple_of(self.log_interval) || event.step == self.n_steps;
        if due || event.step == 1 {
            let mut line = self.interval.line(event, &self.place(event.step));
            // The bar tells it, where there is one, and lines of a terminal should be short.
            if self.bar.is_none() {
                line += &format!("  left {:>6}", duration(left));
            }
            self.line(&line);
            self.interval = Interval::default();
        }
    }
}

impl Interval {
    fn add(&mut self, event: &StepEvent, seconds: f64) {
        self.seconds += seconds;
        self.wait_seconds += event.wait_seconds;
        self.n_steps += 1;
        self.loss += event.loss;
        self.tokens += event.tokens;
        for (name, value) in &event.extra {
            *self.extra.entry(name.clone()).or_default() += value;
        }
    }

    fn line(&self, event: &StepEvent, place: &str) -> String {
        let n_steps = self.n_steps as f64;
        format!(
            "step {place}  epoch {:>5.2}  loss {:>7.4}  lr {:.2e}  grad norm {:>6.3}  {:>5.2} steps/s  \
             {:>5.0} tokens/s  {:>3.0}% waiting{}",
            event.epoch,
            self.loss / n_steps,
            event.learning_rate,
            event.grad_norm,
            n_steps / self.seconds,
            self.tokens as f64 / self.seconds,
            100.0 * self.wait_seconds / self.seconds,
            extras(&self.extra, n_steps),
        )
    }
}

fn extras(values: &BTreeMap<String, f64>, n: f64) -> String {
    // The group that TensorBoard files a name under makes a line too long.
    let short = |name: &'_ str| name.rsplit('/').next().unwrap_or_default().to_string();
    values.iter().map(|(name, sum)| format!("  {} {:.3}", short(name), sum / n)).collect()
}

impl Pace {
    /// Of a step that has just been taken and took so long.
    fn before(step: u64, seconds: f64) -> Self {
        let now = Instant::now();
        let since = now.checked_sub(seconds_of(seconds)).unwrap_or(now);
        Pace { since, step: step - 1 }
    }

    fn left(&self, step: u64, n_steps: u64) -> Duration {
        let each = self.since.elapsed().as_secs_f64() / (step - self.step) as f64;
        seconds_of(each * n_steps.saturating_sub(step) as f64)
    }
}

/// A clock that gave no sensible number gives none.
fn seconds_of(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// Such as `45s`, `12m05s`, `3h07m` or `2d03h`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = (duration.as_secs_f64()).round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short_and_say_their_units() {
        let said = [0.4, 59.6, 725.0, 3599.7, 11_220.0, 183_600.0];
        let said = said.map(|seconds| duration(Duration::from_secs_f64(seconds)));
        assert_eq!(said, ["0s", "1m00s", "12m05s", "1h00m", "3h07m", "2d03h"]);
    }

    #[test]
    fn the_lines_of_a_run_are_aligned() {
        let step = |step: u64, loss: f64, learning_rate: f64| StepEvent {
            step,
            loss,
            learning_rate,
            epoch: 0.06 * step as f64,
            grad_norm: 0.688,
            steps_per_second: 0.5,
            wait_seconds: 0.5,
            tokens: 214,
            ..StepEvent::default()
        };
        let console = Console::new(0, 1000, 10);
        let line = |event: StepEvent| {
            let mut interval = Interval::default();
            interval.add(&event, 2.0);
            interval.add(&event, 2.0);
            interval.line(&event, &console.place(event.step))
        };
        let first = line(step(1, 12.5, 4e-4));
        assert_eq!(
            first,
            "step    1/1000  epoch  0.06  loss 12.5000  lr 4.00e-4  grad norm  0.688   0.50 \
             steps/s    107 tokens/s   25% waiting"
        );
        assert_eq!(line(step(990, 0.5, 1e-6)).len(), first.len());
    }

    #[test]
    fn what_is_left_counts_the_steps_since_the_last_beginning() {
        let pace = Pace { since: Instant::now() - Duration::from_secs(10), step: 100 };
        let left = pace.left(105, 110).as_secs_f64();
        assert!((10.0..10.5).contains(&left), "{left}");
        assert_eq!(pace.left(110, 110), Duration::ZERO);
    }
}
