use anyhow::bail;
use clap::{Args, ValueEnum};
use offshoot_trainer::loss::{CrossEntropy, DpoOptions, LossOptions};

#[derive(Args)]
#[command(next_help_heading = "Loss")]
pub struct LossArgs {
    /// What is minimised.
    #[arg(long, value_enum, default_value_t = Kind::CrossEntropy)]
    loss: Kind,
    /// Share of each target that goes to all tokens alike, such as 0.1; evaluation is without it
    /// [default: 0].
    #[arg(long, value_name = "E")]
    label_smoothing: Option<f64>,
    /// How dear it is to go far from the model as the run began; small ones let it go further
    /// [default: 0.1].
    #[arg(long, value_name = "BETA")]
    dpo_beta: Option<f64>,
    /// Share of the pairs whose chosen and rejected answer are taken to be swapped [default: 0].
    #[arg(long, value_name = "E")]
    dpo_label_smoothing: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum Kind {
    /// Of each predicted token: to learn a text, or answers.
    CrossEntropy,
    /// Direct preference optimisation, from records with prompt, chosen and rejected answer.
    Dpo,
}

impl LossArgs {
    /// What the trainer takes. An option of the other loss is an error.
    pub fn into_options(self) -> anyhow::Result<LossOptions> {
        let LossArgs { loss, label_smoothing, dpo_beta, dpo_label_smoothing } = self;
        match loss {
            Kind::CrossEntropy => {
                if dpo_beta.is_some() || dpo_label_smoothing.is_some() {
                    bail!(
                        "--dpo-beta and --dpo-label-smoothing go with --loss dpo; name it, or leave them out"
                    );
                }
                let label_smoothing = label_smoothing.unwrap_or_default();
                Ok(LossOptions::CrossEntropy(CrossEntropy { label_smoothing }))
            }
            Kind::Dpo => {
                if label_smoothing.is_some() {
                    bail!(
                        "--label-smoothing is of the cross-entropy; with --loss dpo it is --dpo-label-smoothing"
                    );
                }
                let default = DpoOptions::default();
                Ok(LossOptions::Dpo(DpoOptions {
                    beta: dpo_beta.unwrap_or(default.beta),
                    label_smoothing: dpo_label_smoothing.unwrap_or_default(),
                }))
            }
        }
    }
}
