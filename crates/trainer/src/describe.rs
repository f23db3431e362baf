//! What people read of a run at its beginning, and of what changes on its way.

use crate::noise::{Perturbation, PrivacyOptions};
use crate::options::TrainOptions;
use crate::origin::Origin;
use crate::report::StartEvent;
use crate::schedule::Warmup;
use crate::setup::Prepared;
use crate::train::Run;
use offshoot_adapters::LoraSpec;
use offshoot_model::ModelConfig;
use std::ops::Range;

/// What is going to be trained, on what, and what of it the server could read.
pub(crate) fn lines(options: &TrainOptions, prepared: &Prepared) -> Vec<String> {
    let Prepared { server, settings, config, data, eval, split, schedule, plan, origin, .. } =
        prepared;
    let (s1, s2, n_layers) = (settings.split_point_1, settings.split_point_2, server.n_layers);
    let mut lines = vec![format!(
        "model {} ({}), bottom [0, {s1}), trunk [{s1}, {s2}) at {}, top [{s2}, {n_layers})",
        settings.model_name, server.model_type, options.model.server,
    )];
    let lora = &settings.lora;
    let begins_with = match origin {
        Origin::Adapter { adapter, .. } => format!("; it begins with {}", adapter.origin.display()),
        Origin::Seed | Origin::Checkpoint(_) => String::new(),
    };
    lines.push(format!(
        "LoRA r {}, alpha {}, dropout {} on {}: {} values here, {} in the trunk{begins_with}",
        lora.r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.target_modules.join(", "),
        split.n_parameters(),
        n_values(lora, config, s1..s2),
    ));
    lines.push(format!(
        "{}{}; {}",
        data.stats,
        if data.cached { " (tokens from the cache)" } else { "" },
        match eval.as_ref().map(|data| data.len()) {
            None => "no evaluation".to_string(),
            Some(1) => "1 sample for evaluation".into(),
            Some(n) => format!("{n} samples for evaluation"),
        },
    ));
    let cut = match options.optimizer.warmup {
        Warmup::Steps(asked) if asked > schedule.n_warmup => {
            format!(" (at most a tenth of the run; --warmup-steps is {asked})")
        }
        _ => String::new(),
    };
    lines.push(format!(
        "{} steps, {} of warm-up{cut}{}",
        settings.n_steps,
        schedule.n_warmup,
        plan.fill()
            .map_or(String::new(), |fill| format!("; microbatches are {:.0}% full", 100.0 * fill)),
    ));
    let (n_devices, n_microbatches) =
        (split.n_devices(), options.steps.gradient_accumulation_steps);
    if n_devices > n_microbatches {
        lines.push(format!(
            "note: {n_devices} devices and {n_microbatches} microbatches in a step: each microbatch is on one device, so some have nothing to do; raise --gradient-accumulation-steps to {n_devices} or a multiple of it",
        ));
    }
    lines.extend(perturbations(&options.privacy));
    if s1 == 0 {
        lines.push("note: the first split point is 0: what leaves this machine are token embeddings, from which the server can read the text; see docs/privacy.md".into());
    }
    if s2 == n_layers as usize {
        lines.push("note: no layer follows the trunk: from the gradient that leaves this machine the server can read every label; see docs/privacy.md".into());
    }
    lines
}

/// What is done to what is sent, if anything.
fn perturbations(privacy: &PrivacyOptions) -> Option<String> {
    let said = |what: &str, of: &Perturbation| match (of.clip_norm, of.noise) {
        (None, _) => format!("{what} as they are"),
        (Some(norm), 0.0) => format!("{what} clipped to norm {norm}"),
        (Some(norm), noise) => {
            format!("{what} clipped to norm {norm} with noise {noise} times as long")
        }
    };
    let PrivacyOptions { hidden, gradients, .. } = privacy;
    (!hidden.is_none() || !gradients.is_none()).then(|| {
        format!(
            "sent are {} and {}; offshoot leak with the same options measures what can still be read",
            said("hidden states", hidden),
            said("gradients", gradients),
        )
    })
}

/// A and B of a range of layers.
pub(crate) fn n_values(lora: &LoraSpec, config: &ModelConfig, layers: Range<usize>) -> i64 {
    let sites = config.sites(layers, &lora.target_modules).unwrap_or_default();
    sites.iter().map(|site| lora.r as i64 * (site.d_in + site.d_out)).sum()
}

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
        for line in lines(&self.options, &self.prepared) {
            self.report.line(&line);
        }
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
