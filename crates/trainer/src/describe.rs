//! What people read of a run at its beginning, and of what changes on its way.

use crate::report::StartEvent;
use crate::setup::Prepared;
use crate::train::Run;

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
        let Prepared { server, settings, data, eval, split, schedule, plan, .. } = &self.prepared;
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
            "{}{}; {} samples for evaluation",
            data.stats,
            if data.cached { " (tokens from the cache)" } else { "" },
            eval.as_ref().map_or(0, |data| data.len()),
        ));
        self.report.line(&format!(
            "{} steps, {} of warm-up{}",
            settings.n_steps,
            schedule.n_warmup,
            plan.fill().map_or(String::new(), |fill| {
                format!("; microbatches are {:.0}% full", 100.0 * fill)
            }),
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
        let Prepared { settings, data, eval, losses, .. } = &self.prepared;
        StartEvent {
            step,
            n_steps: settings.n_steps,
            model: settings.model_name.clone(),
            split_point_1: settings.split_point_1,
            split_point_2: settings.split_point_2,
            loss: losses.train.name().into(),
            lora_rank: settings.lora.r,
            samples: data.len() as u64,
            eval_samples: eval.as_ref().map_or(0, |data| data.len()) as u64,
            session: self.session.id().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Why it ended before its last step, if it did by itself.
    pub fn tell_of_early_stop(&self) {
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
}
