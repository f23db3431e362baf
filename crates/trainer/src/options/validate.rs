use super::{
    AdapterChoice, EvaluationOptions, LoraOptions, OptimizerOptions, OutputOptions, SampleTexts,
    StepOptions, TrainOptions, Warmup,
};
use crate::TrainError;
use crate::schedule::Scheduler;

impl TrainOptions {
    /// The first option that no run can have.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.sources.validate()?;
        self.validate_without_sources(self.sources.may_evaluate())
    }

    /// The same for a run on sources of its own; `evaluates`: some are to evaluate on.
    pub(crate) fn validate_without_sources(&self, evaluates: bool) -> Result<(), TrainError> {
        self.steps.validate()?;
        self.optimizer.validate()?;
        self.loss.validate()?;
        self.privacy.validate()?;
        self.evaluation.validate()?;
        self.output.validate()?;
        if !evaluates {
            self.refuse_without_evaluation()?;
        }
        self.samples.validate()?;
        if self.data.max_seq_length < 2 {
            let problem = "expected at least 2: one token to predict another from";
            return wrong("max-seq-length", self.data.max_seq_length, problem);
        }
        Ok(self.lora.over(&LoraOptions::usual()).validate()?)
    }

    /// The first option that means nothing where nothing is evaluated.
    pub(crate) fn refuse_without_evaluation(&self) -> Result<(), TrainError> {
        let problem = "it needs evaluation data: name them with --eval-file, or hold a part of the training data out with --eval-fraction";
        if let Some(patience) = self.evaluation.patience {
            return wrong("early-stopping-patience", patience, problem);
        }
        if self.output.adapter == AdapterChoice::Best {
            return wrong("adapter", "best", problem);
        }
        Ok(())
    }
}

impl SampleTexts {
    /// By the names that these settings have in training.
    fn validate(&self) -> Result<(), TrainError> {
        at_least_one("sample-tokens", self.options.max_new_tokens as u64)?;
        let temperature = self.options.sampling.temperature;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let problem = "expected a number such as 0.8, or 0 for always the likeliest token";
            return wrong("sample-temperature", temperature, problem);
        }
        self.options.validate()
    }
}

impl StepOptions {
    fn validate(&self) -> Result<(), TrainError> {
        at_least_one("batch-size", self.batch_size.unwrap_or(1) as u64)?;
        at_least_one("max-tokens-per-batch", self.max_tokens_per_batch.unwrap_or(1) as u64)?;
        at_least_one("gradient-accumulation-steps", self.gradient_accumulation_steps as u64)?;
        at_least_one("microbatches-in-flight", self.microbatches_in_flight as u64)?;
        at_least_one("num-epochs", self.num_epochs)?;
        at_least_one("max-steps", self.max_steps.unwrap_or(1))
    }
}

impl OptimizerOptions {
    fn validate(&self) -> Result<(), TrainError> {
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            let problem = "expected a positive number such as 1e-4";
            return wrong("learning-rate", self.learning_rate, problem);
        }
        if !(0.0..=self.learning_rate).contains(&self.min_learning_rate) {
            let problem = "expected a number from 0 to --learning-rate";
            return wrong("min-learning-rate", self.min_learning_rate, problem);
        }
        if self.min_learning_rate > 0.0 && self.scheduler == Scheduler::Constant {
            let problem = "a constant learning rate has no lower end; leave it out, or choose --lr-scheduler linear or cosine";
            return wrong("min-learning-rate", self.min_learning_rate, problem);
        }
        if let Warmup::Ratio(ratio) = self.warmup
            && !(0.0..=1.0).contains(&ratio)
        {
            return wrong("warmup-ratio", ratio, "expected a share of the run's steps from 0 to 1");
        }
        if !(self.max_grad_norm.is_finite() && self.max_grad_norm >= 0.0) {
            let problem = "expected a positive number, or 0 for no clipping";
            return wrong("max-grad-norm", self.max_grad_norm, problem);
        }
        Ok(self.adamw.validate()?)
    }
}

impl EvaluationOptions {
    fn validate(&self) -> Result<(), TrainError> {
        at_least_one("eval-interval", self.interval)?;
        at_least_one("early-stopping-patience", self.patience.unwrap_or(1) as u64)?;
        if !(self.threshold.is_finite() && self.threshold >= 0.0) {
            let problem = "expected a difference of losses such as 0.01, or 0";
            return wrong("early-stopping-threshold", self.threshold, problem);
        }
        Ok(())
    }
}

impl OutputOptions {
    fn validate(&self) -> Result<(), TrainError> {
        at_least_one("save-interval", self.save_interval)?;
        at_least_one("log-interval", self.log_interval)?;
        at_least_one("keep-last", self.keep_last as u64)
    }
}

fn wrong(
    option: &'static str,
    value: impl std::fmt::Display,
    problem: &str,
) -> Result<(), TrainError> {
    Err(TrainError::Option { option, value: value.to_string(), problem: problem.into() })
}

fn at_least_one(option: &'static str, value: u64) -> Result<(), TrainError> {
    if value == 0 { wrong(option, value, "expected at least 1") } else { Ok(()) }
}
