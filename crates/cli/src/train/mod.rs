pub mod column_args;
pub mod compute_args;
mod data_args;
mod lora_args;
mod loss_args;
pub mod model_args;
mod output_args;
pub mod samples_args;
mod training_args;

use crate::noise_args::{GradientNoiseArgs, HiddenNoiseArgs};
use crate::run_config::{ConfigArgs, Resolved};
use crate::telemetry::TelemetryArgs;
use anyhow::Context;
use clap::Args;
use compute_args::ComputeArgs;
use data_args::DataArgs;
use lora_args::LoraArgs;
use loss_args::LossArgs;
use model_args::ModelArgs;
use offshoot_trainer::noise::PrivacyOptions;
use offshoot_trainer::{CancelToken, TrainError, TrainOptions, dry_run, resolve_lora, train};
use output_args::OutputArgs;
use std::process::ExitCode;
use training_args::TrainingArgs;

/// Train a LoRA adapter through a trunk server.
///
/// The text, the first and last layers and the loss stay here; the server computes the layers
/// between. OUTPUT_DIR gets checkpoints, metrics.jsonl, and at the end adapter/, a PEFT adapter for
/// the whole model. Ctrl-C saves a checkpoint; --resume latest goes on from it exactly.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    loss: LossArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    hidden_noise: HiddenNoiseArgs,
    #[command(flatten)]
    gradient_noise: GradientNoiseArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    #[command(flatten)]
    config: ConfigArgs,
    /// All of these as they came together.
    #[arg(skip)]
    pub resolved: Option<Resolved>,
}

const EXAMPLES: &str = "\
Examples:
  offshoot train --model-name Qwen/Qwen2-0.5B --train-file texts.jsonl --output-dir run
  offshoot train --model-name ./gpt2 --server-host trunk.local --train-file corpus/ \\
      --eval-file held-out.txt --lora-rank 16 --lora-alpha 32 --max-steps 2000
  offshoot train ... --resume latest
  offshoot train --config run/config.toml --output-dir run-2 --learning-rate 2e-4

A file for --config:
  [model]
  model_name = \"Qwen/Qwen2-0.5B\"
  [data]
  train_file = [\"texts.jsonl\"]
  [training]
  learning_rate = 2e-4
  num_epochs = 1";

/// Runs the subcommand. Exit status 130 if it was stopped by Ctrl-C.
pub fn run(mut args: TrainArgs) -> anyhow::Result<ExitCode> {
    let resolved = args.resolved.take();
    let (print_config, is_dry) = (args.config.print_config, args.config.dry_run);
    let mut options = args.into_options()?;
    resolve_lora(&mut options)?;
    if let Some(mut resolved) = resolved {
        lora_args::fill(&mut resolved, &options.lora);
        options.output.config = Some(resolved.to_string());
    }
    if print_config {
        print!("{}", options.output.config.unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    let cancel = CancelToken::default();
    // The trainer computes on this thread; the connection lives on the runtime's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    runtime.spawn(stop_on_ctrl_c(cancel.clone()));
    if is_dry {
        println!("{}", runtime.block_on(dry_run(&options))?.join("\n"));
        return Ok(ExitCode::SUCCESS);
    }
    let summary = match runtime.block_on(train(options, cancel)) {
        Err(error @ (TrainError::StoppedAtStart | TrainError::StoppedOffline { .. })) => {
            eprintln!("{error}");
            return Ok(ExitCode::from(130));
        }
        ended => ended?,
    };
    Ok(if summary.interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS })
}

async fn stop_on_ctrl_c(cancel: CancelToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    let mut asked = false;
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        if asked {
            // What is saved stays whole: checkpoints are renamed into place.
            std::process::exit(130);
        }
        asked = true;
        cancel.cancel();
        eprintln!(
            "stopping, with a checkpoint after this step unless the server is away; once more ends at once"
        );
    }
}

impl TrainArgs {
    /// What the trainer takes.
    pub fn into_options(self) -> anyhow::Result<TrainOptions> {
        let TrainArgs { model, data, lora, training, loss, output, compute, .. } = self;
        let privacy = PrivacyOptions {
            hidden: self.hidden_noise.into(),
            gradients: self.gradient_noise.into(),
            noise_key: None,
        };
        let (sources, data) = data.into_options();
        Ok(TrainOptions {
            model: model.into_options(&output.output_dir)?,
            sources,
            data,
            lora: lora.into_options(),
            steps: training.steps(),
            optimizer: training.optimizer(),
            loss: loss.into_options()?,
            evaluation: output.evaluation(),
            samples: output.samples(training.seed),
            output: output.into_options(),
            compute: compute.into_options()?,
            privacy,
            seed: training.seed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;
    use tch::Kind;

    fn parse(line: &str) -> anyhow::Result<TrainOptions> {
        let cli = Cli::try_parse_from(format!("offshoot train {line}").split_whitespace())?;
        let Command::Train(args) = cli.command else { unreachable!("train was asked for") };
        args.into_options()
    }

    #[test]
    fn defaults_are_those_of_the_library_and_of_the_predecessor() {
        let mut options = parse("--model-name m --train-file t").unwrap();
        let server = "localhost:50051";
        let mut expected = TrainOptions::new("m", server, "t".into(), "./checkpoints".into());
        expected.model.session_name = "checkpoints".into();
        resolve_lora(&mut options).unwrap();
        resolve_lora(&mut expected).unwrap();
        expected.data.cache_dir = offshoot_trainer::data::default_cache_dir();
        assert_eq!(format!("{options:?}"), format!("{expected:?}"));
    }

    #[test]
    fn the_predecessors_command_line_parses() {
        let options = parse(
            "--model-type qwen2 --model-name Qwen/Qwen2-0.5B --split-point-1 0 --split-point-2 14 \
             --server-host localhost --server-port 50052 --lora-rank 8 --lora-alpha 16 \
             --lora-dropout 0.1 --batch-size 4 --learning-rate 1e-4 --num-epochs 3 \
             --max-seq-length 512 --gradient-accumulation-steps 1 --max-grad-norm 1.0 \
             --warmup-steps 100 --dataset-name wikitext --dataset-config wikitext-2-raw-v1 \
             --max-train-samples 10000 --output-dir ./checkpoints --save-interval 500 \
             --log-interval 10 --eval-interval 100 --device cpu --mixed-precision",
        )
        .unwrap();
        assert_eq!(options.model.server, "localhost:50052");
        assert_eq!((options.model.split_point_1, options.model.split_point_2), (Some(0), Some(14)));
        assert_eq!(options.sources.max_train_samples, Some(10000));
        assert_eq!(options.compute.kind, Kind::BFloat16);
        assert_eq!(options.sources.dataset_name.as_deref(), Some("wikitext"));
        assert_eq!(options.sources.dataset_config.as_deref(), Some("wikitext-2-raw-v1"));
        options.sources.validate().unwrap();
    }

    #[test]
    fn columns_splits_and_parts_are_told_to_the_trainer() {
        let line = "--model-name m --dataset-name d --train-split a --eval-split b \
             --max-eval-samples 7 --prompt-column q --completion-column r";
        let sources = parse(line).unwrap().sources;
        assert_eq!((sources.train_split.as_str(), sources.eval_split.as_deref()), ("a", Some("b")));
        assert_eq!((sources.max_train_samples, sources.max_eval_samples), (None, Some(7)));
        assert_eq!(sources.columns.prompt.as_deref(), Some("q"));
        assert_eq!(sources.columns.completion.as_deref(), Some("r"));
        let line = "--model-name m --train-file t --eval-fraction 0.05 --text-column x";
        let sources = parse(line).unwrap().sources;
        assert_eq!(sources.eval_fraction, 0.05);
        assert_eq!(sources.columns.text.as_deref(), Some("x"));
        let error = parse("--model-name m").unwrap().validate().unwrap_err().to_string();
        assert!(error.contains("name what to train on"), "{error}");
    }

    #[test]
    fn a_negative_number_meets_the_range_and_lr_is_short_for_the_learning_rate() {
        let options = parse("--model-name m --train-file t --learning-rate -1").unwrap();
        let error = options.validate().unwrap_err().to_string();
        assert_eq!(error, "--learning-rate = -1: expected a positive number such as 1e-4");
        let options = parse("--model-name m --train-file t --lr 1e-3").unwrap();
        assert_eq!(options.optimizer.learning_rate, 1e-3);
    }

    #[test]
    fn servers_and_targets_are_lists_and_addresses() {
        let line = "--model-name m --train-file a --train-file b --target-modules q_proj,v_proj";
        let options = parse(&format!("{line} --server http://h:7")).unwrap();
        assert_eq!(options.model.server, "http://h:7");
        assert_eq!(options.lora.target_modules, ["q_proj", "v_proj"]);
        assert_eq!(options.sources.train_files.len(), 2);
        assert_eq!(
            parse(&format!("{line} --server-host ::1")).unwrap().model.server,
            "[::1]:50051"
        );
        assert!(parse(&format!("{line} --server http://h:7 --server-host h")).is_err());
    }
}
