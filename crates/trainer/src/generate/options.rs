use crate::TrainError;

/// How text is drawn, and when it is enough.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens that are drawn.
    pub max_new_tokens: usize,
    /// No end token is drawn before so many others.
    pub min_new_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// The text ends before the first of these in it.
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_new_tokens: 50,
            min_new_tokens: 0,
            sampling: Sampling::default(),
            stop: Vec::new(),
        }
    }
}

/// How a token is chosen from the scores of all, with the meaning and the order of Transformers'
/// `generate`: repetition penalty, temperature, top-k, top-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Scores are divided by it; 0: always the likeliest token, whatever top-k and top-p are.
    pub temperature: f64,
    /// Only so many of the likeliest tokens stay; 0: all.
    pub top_k: usize,
    /// Only the fewest likeliest tokens stay that together have this probability; 1: all.
    pub top_p: f64,
    /// Scores of tokens that the text has already, prompt included, are divided by it if positive
    /// and multiplied if negative; 1: as they are.
    pub repetition_penalty: f64,
    /// The same seed, model, prompt and settings give the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.8, top_k: 50, top_p: 0.95, repetition_penalty: 1.0, seed: 42 }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, ..Sampling::default() }
    }
}

impl GenerateOptions {
    /// The first setting that has no meaning, by the name of its option.
    pub fn validate(&self) -> Result<(), TrainError> {
        let Sampling { temperature, top_p, repetition_penalty, .. } = self.sampling;
        let wrong = |option, value: String, problem: &str| {
            Err(TrainError::Option { option, value, problem: problem.into() })
        };
        if !(temperature.is_finite() && temperature >= 0.0) {
            let problem = "expected a number such as 0.8, or 0 for always the likeliest token";
            return wrong("temperature", temperature.to_string(), problem);
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let problem = "expected a probability above 0, such as 0.95, or 1 for all tokens";
            return wrong("top-p", top_p.to_string(), problem);
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            let problem = "expected a number such as 1.1, or 1 for no penalty";
            return wrong("repetition-penalty", repetition_penalty.to_string(), problem);
        }
        if self.max_new_tokens == 0 {
            return wrong("max-tokens", "0".into(), "expected at least 1");
        }
        if self.min_new_tokens > self.max_new_tokens {
            let problem =
                format!("expected at most --max-tokens, which is {}", self.max_new_tokens);
            return wrong("min-tokens", self.min_new_tokens.to_string(), &problem);
        }
        if self.stop.iter().any(String::is_empty) {
            let problem = "an empty text is in every text; leave the option out to stop nowhere";
            return wrong("stop", "\"\"".into(), problem);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_without_a_meaning_are_refused_by_name() {
        let with = |change: fn(&mut GenerateOptions)| {
            let mut options = GenerateOptions::default();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        assert!(GenerateOptions::default().validate().is_ok());
        assert!(with(|o| o.sampling.temperature = -1.0).starts_with("--temperature = -1: "));
        assert!(with(|o| o.sampling.temperature = f64::NAN).starts_with("--temperature = NaN: "));
        assert!(with(|o| o.sampling.top_p = 0.0).starts_with("--top-p = 0: "));
        assert!(with(|o| o.sampling.top_p = 1.1).starts_with("--top-p = 1.1: "));
        assert!(with(|o| o.sampling.repetition_penalty = 0.0).contains("--repetition-penalty = 0"));
        assert!(with(|o| o.max_new_tokens = 0).contains("--max-tokens = 0"));
        assert!(with(|o| o.min_new_tokens = 51).contains("which is 50"));
        assert!(with(|o| o.stop = vec![String::new()]).contains("--stop"));
    }
}
