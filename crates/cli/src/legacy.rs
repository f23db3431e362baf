//! Options of SplitLearn's scripts that have no meaning here. They are understood, so that old
//! command lines run, and each says where its purpose went.

use clap::Args;

/// Options of the old trunk server.
#[derive(Args, Debug, Default)]
pub struct LegacyServe {
    #[arg(long, hide = true, value_name = "N")]
    max_workers: Option<String>,
    #[arg(long, hide = true)]
    use_lora: bool,
    #[arg(long, hide = true)]
    enable_training: bool,
    #[arg(long, hide = true, value_name = "N")]
    lora_rank: Option<String>,
    #[arg(long, hide = true, value_name = "X")]
    lora_alpha: Option<String>,
    #[arg(long, hide = true, value_name = "X")]
    learning_rate: Option<String>,
    #[arg(long, hide = true, value_name = "N")]
    cache_size: Option<String>,
    #[arg(long, hide = true, value_name = "SECONDS")]
    cache_ttl: Option<String>,
}

impl LegacyServe {
    /// One sentence for each such option that was given.
    pub fn notes(&self) -> Vec<&'static str> {
        let all = [
            (
                self.max_workers.is_some(),
                "--max-workers has no effect: connections need no threads of their own",
            ),
            (self.use_lora, "--use-lora has no effect: every session has its own LoRA adapter"),
            (
                self.enable_training,
                "--enable-training has no effect: sessions train and evaluate as they ask",
            ),
            (
                self.lora_rank.is_some(),
                "--lora-rank has no effect here: each client chooses its own (offshoot train --lora-rank); the server's limit is limits.max_rank",
            ),
            (
                self.lora_alpha.is_some(),
                "--lora-alpha has no effect here: each client chooses its own (offshoot train --lora-alpha)",
            ),
            (
                self.learning_rate.is_some(),
                "--learning-rate has no effect here: each client chooses its own (offshoot train --learning-rate)",
            ),
            (
                self.cache_size.is_some(),
                "--cache-size has no effect: activations are held until their backward; limits.max_open_microbatches bounds them",
            ),
            (
                self.cache_ttl.is_some(),
                "--cache-ttl has no effect: what a vanished client leaves is freed after --lease-seconds",
            ),
        ];
        all.into_iter().filter(|(given, _)| *given).map(|(_, note)| note).collect()
    }
}
