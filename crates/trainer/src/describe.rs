//! What people read of a run at its beginning and at its end.

use crate::report::StartEvent;
use crate::setup::Prepared;
use crate::train::Run;
use std::path::Path;

/// Share of a run's steps spent waiting that is worth a hint.
const MUCH_WAITING: f64 = 0.2;

impl Run {
    /// Microbatches that the next step may have on their way at once.
    pub fn in_flight(&self) -> usize {
        let limits = self.session.limits();
        let most = limits.max_open_microbatches.min(limits.max_frames_in_flight).max(1);
        self.in_flight.min(most as usize)
    }

    /// The server was too full for one of several microbatches.
    pub fn lower_in_flight(&mut self, to: usize) {
        self.in_flight = to;
        self.report.line(&format!(
            "the server had no room for another microbatch of this step and made it wait; {to} in flight from here on"
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
            data.samples.len(),
            data.n_tokens(),
            data.n_skipped,
            eval.as_ref().map_or(0, |data| data.samples.len()),
            settings.n_steps,
            schedule.n_warmup,
        ));
        let (asked, allowed) = (self.in_flight, self.in_flight());
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
            samples: data.samples.len() as u64,
            eval_samples: eval.as_ref().map_or(0, |data| data.samples.len()) as u64,
            session: self.session.id().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Where the results are and where the time went.
    pub fn conclude(&self, adapter: Option<&Path>, checkpoint: &Path) {
        match adapter {
            Some(dir) => self.report.line(&format!(
                "done: step {}; the adapter for the whole model is in {}; PEFT loads it with PeftModel.from_pretrained(model, {:?})",
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
            self.in_flight().min(self.spent.microbatches),
            self.spent.microbatches,
        ));
        if share > MUCH_WAITING && self.spent.microbatches == 1 && self.options.steps.batch_size > 1
        {
            self.report.line(
                "a step of one microbatch has nothing to do meanwhile: half the --batch-size with twice the --gradient-accumulation-steps takes the same samples into a step and waits less",
            );
        }
    }
}
