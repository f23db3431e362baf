//! `offshoot verify` as a process: what it prints and its exit status.

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family)
}

fn verify(family: &str, more: &[&str], reference: Option<&Path>) -> Output {
    let dir = fixture(family);
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.arg("verify").arg("--model").arg(&dir).args(more).env("OMP_NUM_THREADS", "1");
    if let Some(reference) = reference {
        command.arg("--adapter").arg(dir.join("adapter"));
        command.arg("--case").arg(dir.join("case.json")).arg("--reference").arg(reference);
    }
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn every_family_passes_with_its_reference() {
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let reference = fixture(family).join("reference.safetensors");
        let output = verify(family, &[], Some(&reference));
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        assert!(text.contains("lora_B.weight") && text.contains("passed: "), "{text}");
    }
}

#[test]
fn draws_its_own_case_and_adapter() {
    let output = verify("qwen3", &["--split-point-1", "1", "--split-point-2", "2"], None);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("trunk layers 1..2 of 4"), "{text}");
}

#[test]
fn a_wrong_reference_fails() {
    let path = fixture("llama").join("reference.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "grad.base_model.model.model.layers.2.mlp.up_proj.lora_A.default.weight";
    let view = file.tensor(name).unwrap();
    let mut changed = view.data().to_vec();
    // The lowest byte of an exponent's half: the first value becomes another one.
    changed[3] ^= 1;
    let tensors = file.iter().map(|(key, tensor)| {
        let data = if key == name { &changed[..] } else { tensor.data() };
        (key, TensorView::new(tensor.dtype(), tensor.shape().to_vec(), data).unwrap())
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("reference.safetensors");
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();

    let output = verify("llama", &[], Some(&path));
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let failed: Vec<&str> = text.lines().filter(|line| line.ends_with("FAILS")).collect();
    assert_eq!(failed.len(), 1, "{text}");
    assert!(failed[0].contains("layers.2.mlp.up_proj.lora_A"), "{text}");
    assert!(text.contains("failed: 1 of "), "{text}");
}

#[test]
fn bad_input_is_explained() {
    let text_of = |more: &[&str]| {
        let output = verify("llama", more, None);
        assert_eq!(output.status.code(), Some(1));
        text(&output)
    };
    let text = text_of(&["--split-point-1", "3", "--split-point-2", "2"]);
    assert!(text.contains("split points 3 and 2 do not fit"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let case = dir.path().join("case.json");
    for (json, expected) in [
        ("{\"input_ids\": [1, 2]}", "list of lists of token ids"),
        ("{\"input_ids\": [[1, 97]]}", "the vocabulary has 0 to 96"),
        ("{\"input_ids\": [[1], [2]]}", "nothing is predicted"),
        ("{\"input_ids\": [[1, 2], []]}", "sequence 1 has 0 tokens"),
        ("{", "not JSON"),
    ] {
        std::fs::write(&case, json).unwrap();
        let text = text_of(&["--case", case.to_str().unwrap()]);
        assert!(text.contains(expected), "{json}: {text}");
    }
}
