use super::Run;
use crate::report::duration;
use std::path::{Path, PathBuf};

/// Share of a run's steps spent waiting that is worth a hint.
const MUCH_WAITING: f64 = 0.2;
/// Steps whose mean is called the loss at the beginning, and at the end: one says little.
const LOSS_WINDOW: usize = 10;

impl Run {
    /// Where the results are, where the time went, and what to do next.
    pub(super) fn conclude(&self, adapter: Option<&(PathBuf, u64)>, checkpoint: &Path) {
        self.tell_of_early_stop();
        self.tell_of_losses();
        self.tell_of_time();
        let run = self.options.output.dir.display();
        let n_steps = self.prepared.settings.n_steps;
        let Some((dir, step)) = adapter else {
            self.report.line(&format!(
                "stopped at step {} of {n_steps} with {}\ngo on with the same command and --resume latest; look at the curves with offshoot plot {run}",
                self.step,
                checkpoint.display(),
            ));
            return;
        };
        let dir = dir.display();
        let model = &self.prepared.settings.model_name;
        // It knows the cross-entropy only, not preferences.
        let eval = match self.options.loss.wants_pairs() {
            true => String::new(),
            false => {
                format!("  offshoot eval --model-name {model} --adapter {dir} --eval-file FILE\n")
            }
        };
        self.report.line(&format!(
            "done at step {} of {n_steps}; the adapter for the whole model, of step {step}, is in {dir}\n  \
             offshoot generate --adapter {dir} --prompt \"...\"\n\
             {eval}  offshoot plot {run}\n  \
             PeftModel.from_pretrained(model, {:?})  # in Python",
            self.step,
            dir.to_string(),
        ));
    }

    fn tell_of_losses(&self) {
        let n = LOSS_WINDOW.min(self.losses.len().div_ceil(2));
        if n == 0 {
            return;
        }
        let mean = |part: &[(u64, f64)]| part.iter().map(|(_, loss)| loss).sum::<f64>() / n as f64;
        let (first, last) = (mean(&self.losses[..n]), mean(&self.losses[self.losses.len() - n..]));
        let of = if n == 1 { "step".to_string() } else { format!("{n} steps") };
        let best = self.best.map_or(String::new(), |best| match best.step {
            0 => format!(
                "; on the evaluation data no step was better than the model as it was (loss {:.4})",
                best.loss
            ),
            step => format!("; lowest evaluation loss {:.4}, at step {step}", best.loss),
        });
        self.report.line(&format!(
            "training loss {first:.4} in the first {of}, {last:.4} in the last{best}"
        ));
    }

    fn tell_of_time(&self) {
        let (training, waited) =
            (self.spent.training.as_secs_f64(), self.spent.waited.as_secs_f64());
        if training == 0.0 {
            return;
        }
        let share = waited / training;
        self.report.line(&format!(
            "{} in all, {} of it training steps: {:.0} tokens/s, {:.0}% waiting for the server with up to {} of {} microbatches of a step in flight",
            duration(self.spent.began.elapsed()),
            duration(self.spent.training),
            self.spent.tokens as f64 / training,
            100.0 * share,
            self.n_in_flight().min(self.spent.microbatches),
            self.spent.microbatches,
        ));
        let may_be_halved = self.options.steps.most_samples() != Some(1);
        if share > MUCH_WAITING && self.spent.microbatches == 1 && may_be_halved {
            let (size, same) = match self.options.steps.max_tokens_per_batch {
                Some(_) => ("--max-tokens-per-batch", "about the same samples"),
                None => ("--batch-size", "the same samples"),
            };
            self.report.line(&format!(
                "a step of one microbatch has nothing to do meanwhile: half the {size} with twice the --gradient-accumulation-steps takes {same} into a step and waits less",
            ));
        }
    }
}
