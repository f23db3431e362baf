use clap::Args;
use offshoot_trainer::noise::{Perturbation, PrivacyOptions};

/// What is done to hidden states before they are sent.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Privacy")]
pub struct HiddenNoiseArgs {
    /// Scale each row of hidden states (one for each token) that is longer than this L2 norm down to
    /// it before it is sent. `offshoot leak` prints the norms that rows have; their median is a good
    /// beginning [default: no limit].
    #[arg(long, value_name = "NORM", allow_negative_numbers = true)]
    hidden_clip_norm: Option<f64>,
    /// Add Gaussian noise to hidden states before they are sent, about so many times as long as
    /// --hidden-clip-norm: its standard deviation is this times the clip norm over the square root of
    /// the hidden size, for each value. 0.1 to 0.5 are values to try; `offshoot leak` says what they
    /// buy, an evaluation what they cost. In training, evaluation and generation alike.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    hidden_noise: f64,
}

/// What is done to gradients before they are sent.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Privacy")]
pub struct GradientNoiseArgs {
    /// The same for each row of the gradient that goes back into the trunk, in units of one token's
    /// loss: a row is compared as if its step had one predicted token (--loss dpo: one pair)
    /// [default: no limit].
    #[arg(long, value_name = "NORM", allow_negative_numbers = true)]
    gradient_clip_norm: Option<f64>,
    /// The same noise on that gradient, in units of --gradient-clip-norm.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    gradient_noise: f64,
}

impl From<HiddenNoiseArgs> for Perturbation {
    fn from(args: HiddenNoiseArgs) -> Self {
        Perturbation { clip_norm: args.hidden_clip_norm, noise: args.hidden_noise }
    }
}

impl From<GradientNoiseArgs> for Perturbation {
    fn from(args: GradientNoiseArgs) -> Self {
        Perturbation { clip_norm: args.gradient_clip_norm, noise: args.gradient_noise }
    }
}

/// What is done to rows, if anything is.
pub fn in_words(of: Perturbation) -> String {
    let norm = of.clip_norm.unwrap_or(f64::INFINITY);
    match of.noise {
        0.0 => format!("clipped to norm {norm}"),
        noise => format!("clipped to norm {norm}, with noise {noise} times as long"),
    }
}

impl HiddenNoiseArgs {
    /// For a command that may or may not have a `server`, and sends no gradients.
    pub fn into_options(self, server: Option<&str>) -> anyhow::Result<PrivacyOptions> {
        let options = PrivacyOptions { hidden: self.into(), ..PrivacyOptions::default() };
        options.validate()?;
        anyhow::ensure!(
            server.is_some() || options.hidden.is_none(),
            "--hidden-clip-norm and --hidden-noise change what is sent to a server, and without --server nothing leaves this machine; leave them out, or name a server"
        );
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        hidden: HiddenNoiseArgs,
    }

    #[test]
    fn noise_without_a_server_or_a_unit_is_refused() {
        let options = |line: &str, server| {
            let line = Line::try_parse_from(format!("x {line}").split_whitespace()).unwrap();
            line.hidden.into_options(server)
        };
        let said = |line: &str, server| options(line, server).unwrap_err().to_string();
        assert!(options("", None).unwrap().hidden.is_none());
        let both = "--hidden-clip-norm 20 --hidden-noise 0.5";
        let hidden = options(both, Some("trunk:7")).unwrap().hidden;
        assert_eq!(hidden, Perturbation { clip_norm: Some(20.0), noise: 0.5 });
        assert!(said(both, None).contains("nothing leaves this machine"));
        assert!(said("--hidden-noise 1", Some("trunk:7")).contains("--hidden-clip-norm, which is"));
        assert!(said("--hidden-noise -1", Some("trunk:7")).starts_with("--hidden-noise = -1: "));
    }
}
