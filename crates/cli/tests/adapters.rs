//! Adapters in and out on the command line: what the commands write, print and refuse. That the
//! numbers are PEFT's is `tests/claims/peft_round_trip.rs`.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixture(name: &str) -> String {
    format!("{}/../../tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Runs the program in `dir`.
fn offshoot(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.current_dir(dir).args(arguments).env("OMP_NUM_THREADS", "1");
    command.output().unwrap()
}

#[track_caller]
fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn refused(output: &Output, expected: &[&str]) {
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    for part in expected {
        assert!(error.contains(part), "expected {part:?} in {error}");
    }
}

#[test]
fn an_adapter_is_exported_once() {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, model) = (fixture("gpt2/adapter"), fixture("gpt2"));
    let line = ["export", &adapter, "--output", "out", "--model-name", &model, "--dtype", "bf16"];
    let out = said(&offshoot(dir.path(), &line));
    assert!(out.contains("r 3, alpha 7, targets c_attn, c_fc, c_proj"), "{out}");
    let config = fs::read_to_string(dir.path().join("out/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["fan_in_fan_out"], true);
    assert_eq!(config["lora_alpha"], 7);
    assert_eq!(config["base_model_name_or_path"], "tests/fixtures/gpt2");
    let size = |path: PathBuf| fs::metadata(path).unwrap().len();
    let (theirs, ours) = (
        size(Path::new(&adapter).join("adapter_model.safetensors")),
        size(dir.path().join("out/adapter_model.safetensors")),
    );
    assert!(ours < theirs * 3 / 5, "bf16 takes {ours} of {theirs} bytes");
    let card = fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    assert!(card.contains("base_model: tests/fixtures/gpt2") && card.contains("rank 3"), "{card}");

    refused(&offshoot(dir.path(), &line), &["--output = out: it has something in it already"]);
    let model = fixture("llama");
    let line = ["export", &adapter, "--output", "other", "--model-name", &model];
    refused(
        &offshoot(dir.path(), &line),
        &[
            "does not fit the model",
            "no linear layer of a llama block",
            "names tests/fixtures/gpt2",
        ],
    );
    assert!(!dir.path().join("other").exists());
}

#[test]
fn base_adapter_and_merged_model_are_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    let (model, adapter) = (fixture("tiny_text"), fixture("round_trip/peft"));
    let texts = fixture("round_trip/texts.txt");
    let data = ["--eval-file", &texts, "--max-seq-length", "64", "--no-cache"];
    let eval = |more: &[&str]| {
        let line: Vec<&str> = ["eval"].iter().chain(more).chain(&data).copied().collect();
        offshoot(dir.path(), &line)
    };
    let table = said(&eval(&["--model-name", &model, "--adapter", &adapter]));
    assert!(table.contains("base") && table.contains("adapter"), "{table}");
    assert!(table.contains("4 samples, 139 tokens, 135 of them predicted; uncut"), "{table}");

    let parse = |output: &Output| -> Value { serde_json::from_str(&said(output)).unwrap() };
    let both = parse(&eval(&["--model-name", &model, "--adapter", &adapter, "--json"]));
    let merge = ["merge", "--model-name", &model, "--adapter", &adapter, "--output-dir", "merged"];
    let out = said(&offshoot(dir.path(), &[&merge[..], &["--max-shard-size", "30KB"]].concat()));
    assert!(out.contains("12 of them changed"), "{out}");
    assert!(dir.path().join("merged/model.safetensors.index.json").exists());
    assert!(dir.path().join("merged/tokenizer.json").exists());
    let merged = parse(&eval(&["--model-name", "merged", "--json"]));
    let loss = |of: &Value| of["loss"].as_f64().unwrap();
    assert!((loss(&merged["base"]) - loss(&both["adapter"])).abs() < 1e-4, "{merged} {both}");
    assert!((loss(&both["base"]) - loss(&both["adapter"])).abs() > 0.1, "{both}");
    assert_eq!(both["predicted_tokens"], 135);

    // The model that an adapter names need not be named.
    let mut settings: Value = serde_json::from_str(
        &fs::read_to_string(Path::new(&adapter).join("adapter_config.json")).unwrap(),
    )
    .unwrap();
    settings["base_model_name_or_path"] = model.clone().into();
    fs::create_dir(dir.path().join("named")).unwrap();
    fs::write(dir.path().join("named/adapter_config.json"), settings.to_string()).unwrap();
    let weights = "adapter_model.safetensors";
    fs::copy(Path::new(&adapter).join(weights), dir.path().join("named").join(weights)).unwrap();
    let named = parse(&eval(&["--adapter", "named", "--json"]));
    assert_eq!(named["adapter"], both["adapter"]);

    refused(&offshoot(dir.path(), &merge), &["--output-dir = merged: it has something in it"]);
    refused(
        &eval(&["--model-name", &model, "--adapter", "nowhere"]),
        &["nowhere: there is no such directory. Expected an adapter: a PEFT directory"],
    );
    let line = ["eval", "--model-name", &model];
    refused(&offshoot(dir.path(), &line), &["name what to evaluate on", "--eval-file"]);
}

#[test]
fn an_adapter_is_imported_where_there_is_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let (model, adapter) = (fixture("tiny_text"), fixture("round_trip/peft"));
    let cut = |second: &'static str| {
        let line = ["import", &adapter, "--model-name", &model, "--output-dir", "run"];
        let cut = ["--split-point-1", "0", "--split-point-2", second];
        offshoot(dir.path(), &[&line[..], &cut].concat())
    };
    refused(&cut("9"), &["split points 0 and 9 do not fit"]);
    let uncut = ["import", &adapter, "--model-name", &model, "--output-dir", "run"];
    refused(&offshoot(dir.path(), &uncut), &["where is the model cut?", "--server"]);
    let out = said(&cut("2"));
    assert!(out.contains("r 4, alpha 6; bottom [0, 0), trunk [0, 2), top [2, 4)"), "{out}");
    assert!(out.contains("--resume latest"), "{out}");
    let parts = dir.path().join("run/checkpoint_step_0");
    // Nothing of the bottom trains: the trunk begins at layer 0.
    assert!(!parts.join("bottom/lora_adapters").exists());
    assert!(parts.join("trunk/lora_adapters/adapter_model.safetensors").exists());
    assert!(parts.join("top/lora_adapters/adapter_model.safetensors").exists());
    refused(&cut("2"), &["it holds checkpoints of another run, up to step 0"]);

    // What came in goes out again.
    let export = ["export", "run", "--step", "0", "--output", "out", "--model-name", &model];
    said(&offshoot(dir.path(), &export));
    let tensors = |path: PathBuf| {
        let bytes = fs::read(path.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> =
            file.iter().map(|(name, view)| (name.to_string(), view.data().to_vec())).collect();
        all.sort();
        all
    };
    assert!(tensors(dir.path().join("out")) == tensors(adapter.clone().into()));
    let export = ["export", "run", "--step", "7", "--output", "seven"];
    refused(&offshoot(dir.path(), &export), &["no checkpoint of step 7; there are those of 0"]);
}
