use super::*;
use crate::{Cli, Command as Subcommand};
use offshoot_trainer::TrainOptions;
use std::fs;
use tempfile::TempDir;

/// Options as they come together, and as a file for `--config`.
fn read(line: &str) -> anyhow::Result<(TrainOptions, String)> {
    let args = line.split_whitespace().map(OsString::from);
    let program = ["offshoot", "train"].map(OsString::from);
    let cli = Cli::read(program.into_iter().chain(args).collect())?;
    let Subcommand::Train(mut args) = cli.command else { unreachable!("train was asked for") };
    let text = args.resolved.take().expect("it was set").to_string();
    Ok((args.into_options()?, text))
}

fn options(line: &str) -> String {
    format!("{:#?}", read(line).unwrap_or_else(|error| panic!("{line}: {error:#}")).0)
}

struct File {
    dir: TempDir,
}

impl File {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("run.toml"), text).unwrap();
        File { dir }
    }

    /// The options of `--config` with this file and these words.
    fn with(&self, line: &str) -> String {
        format!("--config {} {line}", self.dir.path().join("run.toml").display())
    }
}

fn problems(text: &str) -> String {
    format!("{:#}", read(&File::new(text).with("")).unwrap_err())
}

#[test]
fn a_run_can_be_repeated_from_what_it_stored() {
    let lines = [
        "--model-name m --train-file t",
        "--model-name m --train-file a --train-file b --warmup-ratio 0.25 --lr-scheduler linear \
         --server http://h:7 --target-modules q_proj,v_proj --use-rslora --mixed-precision \
         --sample-prompt x --max-steps 7 --learning-rate 3e-7 --seed 18446744073709551615 \
         --eval-file e --early-stopping-patience 3 --early-stopping-threshold 0.01 --adapter last \
         --session-name n --split-point-1 1 --keep-last 9 --wire-dtype int8 --no-tensorboard \
         --init-adapter old/adapter",
        "--model-name m --train-file t --server-host ::1 --server-port 9 --dtype bf16 \
         --warmup-steps 3 --min-learning-rate 1e-6",
    ];
    for line in lines {
        let (asked, text) = read(line).unwrap();
        println!("{text}");
        let file = File::new(&text);
        assert_eq!(options(&file.with("")), format!("{asked:#?}"));
        assert_eq!(read(&file.with("")).unwrap().1, text);
    }
}

#[test]
fn every_option_is_stored() {
    let (_, text) = read("--model-name m --train-file t").unwrap();
    let command = Known::of(Cli::command(), "train");
    let names = command.options().filter(|arg| !arg.is_hide_set());
    let names: Vec<&str> = names
        .filter(|arg| !NOT_STORED.contains(&arg.get_id().as_str()))
        .filter_map(Arg::get_long)
        .collect();
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        let name = name.replace('-', "_");
        let here = |line: &&str| {
            line.split(" = ").next().is_some_and(|key| key.trim_start_matches("# ") == name)
        };
        assert_eq!(text.lines().filter(here).count(), 1, "{name}");
    }
    // What says only what is to be done now would be done again.
    let (_, text) = read("--model-name m --train-file t --resume latest").unwrap();
    assert!(!text.contains("resume") && !text.contains("print_config"), "{text}");
}

#[test]
fn the_command_line_wins_and_the_rest_is_the_files() {
    let file = File::new(
        "model_name = \"m\"\n[data]\ntrain-file = [\"a\", \"b\"]\n[training]\nbatch_size = 9\nwarmup_steps = 5\nlora_alpha = 3\nuse_rslora = true\n[deep.er]\nserver_host = \"there\"\n",
    );
    let line = "--model-name m --train-file a --train-file b --batch-size 9 --warmup-steps 5 \
                --lora-alpha 3 --use-rslora --server-host there";
    assert_eq!(options(&file.with("")), options(line));
    // A list is replaced, not made longer; an option gives way to one that excludes it.
    let line = "--model-name m --train-file c --batch-size 2 --warmup-ratio 0.5 --lora-alpha 3 \
                --use-rslora --server http://x:1";
    let given = "--train-file c --batch-size 2 --warmup-ratio 0.5 --server http://x:1";
    assert_eq!(options(&file.with(given)), options(line));
}

#[test]
fn all_mistakes_are_told_at_once_with_file_and_key() {
    let text = problems(
        "model_nam = \"m\"\nbatch_size = \"many\"\nlora_rank = 1.5\nuse_rslora = 1\n[x]\nlr_scheduler = \"cubic\"\nbatch-size = 4\ntrain_file = 3\nconfig = \"other.toml\"\nresume = [\"latest\"]\nqqq = 1\nlearning_rate = -0.5e\n",
    );
    assert!(text.contains("is not TOML") && text.contains("line 12"), "{text}");
    let text = problems(
        "model_nam = \"m\"\nbatch_size = \"many\"\nlora_rank = 1.5\nuse_rslora = 1\nseed = -1\n[x]\nlr_scheduler = \"cubic\"\nbatch-size = 4\ntrain_file = 3\nconfig = \"other.toml\"\nresume = [\"latest\"]\nqqq = 1\n",
    );
    println!("{text}");
    for expected in [
        "run.toml: 11 mistakes\n  ",
        "model_nam is not an option; did you mean model_name?",
        "batch_size = \"many\": expected a whole number",
        "lora_rank = 1.5: expected a whole number",
        "use_rslora = 1: expected true or false",
        "seed = -1: invalid value",
        "x.lr_scheduler = \"cubic\": invalid value",
        "constant, linear, cosine",
        "x.batch-size stands there twice, also as batch_size",
        "x.train_file = 3: expected text in quotes, or a list",
        "x.config has no meaning in a file",
        "x.resume = [\"latest\"]: expected text in quotes",
        "x.qqq is not an option; offshoot train --help lists all options",
    ] {
        assert!(text.contains(expected), "{expected}");
    }
    let text = format!("{:#}", read("--config nowhere.toml").unwrap_err());
    assert!(text.contains("--config nowhere.toml: cannot be read"), "{text}");
}

#[test]
fn what_is_missing_in_both_is_missed_as_ever() {
    let error = read(&File::new("batch_size = 3").with("--train-file t")).unwrap_err();
    let error = error.downcast::<clap::Error>().unwrap();
    assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
    assert!(error.to_string().contains("--model-name"), "{error}");
    // Two that exclude each other, both in the file.
    let file = File::new("model_name = \"m\"\nserver = \"http://h:1\"\nserver_port = 4\n");
    let error = read(&file.with("--train-file t")).unwrap_err().downcast::<clap::Error>().unwrap();
    assert_eq!(error.kind(), ErrorKind::ArgumentConflict);
}
