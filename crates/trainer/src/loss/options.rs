use super::{CrossEntropy, Dpo, DpoOptions, Loss};
use crate::TrainError;
use crate::data::DataSet;
use std::fmt;
use std::sync::Arc;

/// Which loss a run has.
#[derive(Clone)]
pub enum LossOptions {
    /// Of every predicted token.
    CrossEntropy(CrossEntropy),
    /// Of preference pairs.
    Dpo(DpoOptions),
    /// One's own.
    Custom(Arc<dyn Loss>),
}

impl Default for LossOptions {
    fn default() -> Self {
        LossOptions::CrossEntropy(CrossEntropy::default())
    }
}

/// As a checkpoint notes it: a run that goes on with another loss is not the run that it was.
impl fmt::Display for LossOptions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            LossOptions::CrossEntropy(CrossEntropy { label_smoothing }) => {
                write!(f, "cross-entropy, label smoothing {label_smoothing}")
            }
            LossOptions::Dpo(DpoOptions { beta, label_smoothing }) => {
                write!(f, "dpo, beta {beta}, label smoothing {label_smoothing}")
            }
            LossOptions::Custom(loss) => write!(f, "{}", loss.name()),
        }
    }
}

impl fmt::Debug for LossOptions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl LossOptions {
    /// Whether the data are to be pairs of a chosen and a rejected answer.
    pub fn wants_pairs(&self) -> bool {
        matches!(self, LossOptions::Dpo(_))
    }

    /// Whether the data, those to train on and those to evaluate on, are what the loss is made for.
    pub(crate) fn check_data(&self, data: [Option<&DataSet>; 2]) -> Result<(), TrainError> {
        for (data, which) in data.into_iter().zip(["training", "evaluation"]) {
            let is_pairs = data.is_some_and(|data| data.unit == 2);
            let problem = match self {
                LossOptions::Dpo(_) if data.is_some() && !is_pairs => {
                    "have no chosen and rejected answers: expected records with prompt, chosen and rejected"
                }
                LossOptions::CrossEntropy(_) if is_pairs => {
                    "are preferences: name --loss dpo to learn from pairs, or give texts, prompts with completions or conversations"
                }
                _ => continue,
            };
            return Err(TrainError::Option {
                option: "loss",
                value: if self.wants_pairs() { "dpo" } else { "cross-entropy" }.into(),
                problem: format!("the {which} data {problem}"),
            });
        }
        Ok(())
    }

    /// The first option that no run can have.
    pub(crate) fn validate(&self) -> Result<(), TrainError> {
        let wrong = |option, value: f64, problem: &str| {
            Err(TrainError::Option { option, value: value.to_string(), problem: problem.into() })
        };
        match self {
            LossOptions::CrossEntropy(CrossEntropy { label_smoothing: e }) => {
                if !(0.0..1.0).contains(e) {
                    return wrong("label-smoothing", *e, "expected 0 (none) or more, and below 1");
                }
            }
            LossOptions::Dpo(DpoOptions { beta, label_smoothing: e }) => {
                if !(beta.is_finite() && *beta > 0.0) {
                    return wrong("dpo-beta", *beta, "expected a positive number such as 0.1");
                }
                if !(0.0..0.5).contains(e) {
                    let problem = "expected the share of pairs whose labels are swapped: 0 or more, and below 0.5";
                    return wrong("dpo-label-smoothing", *e, problem);
                }
            }
            LossOptions::Custom(_) => {}
        }
        Ok(())
    }
}

/// The losses of a run.
pub(crate) struct Losses {
    pub train: Arc<dyn Loss>,
    pub eval: Arc<dyn Loss>,
    /// The same two, if they are still to learn what the model gave before training.
    pub dpo: Option<[Arc<Dpo>; 2]>,
}

impl Losses {
    pub fn new(options: &LossOptions) -> Self {
        let one = |loss: Arc<dyn Loss>| Losses { train: loss.clone(), eval: loss, dpo: None };
        match options {
            LossOptions::CrossEntropy(loss) => one(Arc::new(*loss)),
            LossOptions::Custom(loss) => one(loss.clone()),
            LossOptions::Dpo(options) => {
                let [train, eval] = [*options; 2].map(|options| Arc::new(Dpo::new(options)));
                Losses { train: train.clone(), eval: eval.clone(), dpo: Some([train, eval]) }
            }
        }
    }
}
