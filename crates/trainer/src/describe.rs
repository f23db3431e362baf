//! What people read of a run at its beginning and at its end.

use crate::report::StartEvent;
use crate::setup::Prepared;
use crate::train::Run;
use std::path::{Path, PathBuf};

/// Share of a run's steps spent waiting that is worth a hint.
const MUCH_WAITING: f64 = 0.2;

impl Run {
    /// Microbatches that the next step may have on their way at once.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.now().min(self.most_in_flight())
    }

    /// As many as the server lets a session have.
    fn most_in_flight(&self) -> usize {
        let limits = self.session.limits();
        limits.max_open_microbatches.min(limits.max_frames_in_flight).max(1) as usize
    }

    /// The server was too full for one of several microbatches.
    pub fn tell_of_waiting(&self) {
        self.report.line(&format!(
            "the server had no room for another microbatch of this step and made it wait; {} in flight from here on, and more again when there is room",
            self.in_flight.now()
        ));
    }

    /// What is going to be trained, on what.
    pub fn describe(&self) {
        let Prepared { server, settings, data, eval, split, schedule, .. } = &self.prepared;
        let lora = &settings.lora;
        self.report.line(&format!(
            "model {} ({}), bottom [0, {}), trunk [{}, {}) at {}, top [{}, {})",
            settings.model_name,
            server.model_type,
            settings.split_point_1,
            settings.split_point_1,
            settings.split_point_2,
            self.options.model.server,
            settings.split_point_2,
            server.n_layers,
        ));
        self.report.line(&format!(
            "LoRA r {}, alpha {}, dropout {} on {}: {} values here, {} in the trunk",
            lora.r,
            lora.lora_alpha,
            lora.lora_dropout,
            lora.target_modules.join(", "),
            split.n_parameters(),
            self.session.adapter_parameters(),
        ));
        self.report.line(&format!(
            "{} samples of {} tokens, {} passed over; {} for evaluation; {} steps, {} of warm-up",
            data.len(),
            data.n_tokens(),
            data.stats.n_skipped,
            eval.as_ref().map_or(0, |data| data.len()),
            settings.n_steps,
            schedule.n_warmup,
        ));
        let (asked, allowed) = (self.in_flight.asked(), self.most_in_flight());
        if allowed < asked {
            let limits = self.session.limits();
            self.report.line(&format!(
                "--microbatches-in-flight is {asked}; the server lets a session have {allowed} (its max_open_microbatches is {}, its max_frames_in_flight {})",
                limits.max_open_microbatches, limits.max_frames_in_flight,
            ));
        }
    }

    /// The same for programs; `step` steps were taken before.
    pub fn start_event(&self, step: u64) -> StartEvent {
        let Prepared { settings, data, eval, .. } = &self.prepared;
        StartEvent {
            step,
            n_steps: settings.n_steps,
            model: settings.model_name.clone(),
            split_point_1: settings.split_point_1,
            split_point_2: settings.split_point_2,
            lora_rank: settings.lora.r,
            samples: data.len() as u64,
            eval_samples: eval.as_ref().map_or(0, |data| data.len()) as u64,
            session: self.session.id().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn tell_of_early_stop(&self) {
        let evaluation = &self.options.evaluation;
        let (Some(patience), true) = (evaluation.patience, self.stops_early()) else { return };
        if self.step == self.prepared.settings.n_steps {
            return;
        }
        let least = match evaluation.threshold {
            0.0 => String::new(),
            threshold => format!(" of at least {threshold}"),
        };
        self.report.line(&format!(
            "stopped early at step {} of {}: {patience} evaluations in a row brought no improvement{least}; to go on, --resume latest with a higher --early-stopping-patience, or without it",
            self.step, self.prepared.settings.n_steps,
        ));
    }

    /// Where the results are and where the time went.
    pub fn conclude(&self, adapter: Option<&(PathBuf, u64)>, checkpoint: &Path) {
        self.tell_of_early_stop();
        match adapter {
            Some((dir, step)) => self.report.line(&format!(
                "done: step {}; the adapter for the whole model, of step {step}, is in {}; PEFT loads it with PeftModel.from_pretrained(model, {:?})",
                self.step,
                dir.display(),
                dir.display().to_string(),
            )),
            None => self.report.line(&format!(
                "stopped at step {} of {}; go on with the same command and --resume latest (checkpoint {})",
                self.step,
                self.prepared.settings.n_steps,
                checkpoint.display()
            )),
        }
        let (training, waited) =
            (self.spent.training.as_secs_f64(), self.spent.waited.as_secs_f64());
        if training == 0.0 {
            return;
        }
        let share = waited / training;
        self.report.line(&format!(
            "{training:.1} s of training steps, {waited:.1} s of them ({:.0}%) waiting for the server, with up to {} of {} microbatches of a step in flight",
            100.0 * share,
            self.n_in_flight().min(self.spent.microbatches),
            self.spent.microbatches,
        ));
        if share > MUCH_WAITING && self.spent.microbatches == 1 && self.options.steps.most_samples() != Some(1)
        {
            self.report.line(
                "a step of one microbatch has nothing to do meanwhile: half the --batch-size with twice the --gradient-accumulation-steps takes the same samples into a step and waits less",
            );
        }
    }
}
