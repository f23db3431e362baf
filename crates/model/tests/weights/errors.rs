//! Each wrong input: the typed error, and a message that says what to do.

use crate::*;
use offshoot_model::weights::{Checkpoint, WeightsError};

fn open_error(path: &Path) -> WeightsError {
    let error = Checkpoint::open(path).unwrap_err();
    println!("{error}");
    error
}

/// A directory with a good configuration and model.safetensors of these bytes.
fn open_error_of(safetensors: &[u8]) -> WeightsError {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), safetensors).unwrap();
    open_error(dir.path())
}

fn open_error_of_gguf(bytes: &[u8]) -> WeightsError {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.gguf"), bytes).unwrap();
    open_error(&dir.path().join("model.gguf"))
}

#[test]
fn missing_tensor_names_file_and_closest() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &tiny_config(), &prefixed("model.", &tiny_tensors()));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let error = checkpoint
        .tensor("model.layers.1.self_attn.qproj.weight", Kind::Float, Device::Cpu)
        .unwrap_err();
    let file = dir.path().join("model.safetensors");
    assert_eq!(
        error.to_string(),
        format!(
            "no tensor model.layers.1.self_attn.qproj.weight in {}; the closest name there is \
             model.layers.1.self_attn.q_proj.weight",
            file.display()
        )
    );

    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path(), &tiny_config(), &tiny_tensors(), 2);
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .tensor("model.norm.bias", Kind::Float, Device::Cpu)
        .unwrap_err();
    let WeightsError::MissingTensor { name, searched, closest } = error else { panic!("{error}") };
    assert_eq!((name.as_str(), closest.as_deref()), ("model.norm.bias", Some("norm.weight")));
    assert_eq!(searched, format!("2 files of {}", dir.path().display()));
}

#[test]
fn truncated_safetensors_says_both_lengths() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &tiny_config(), &tiny_tensors());
    let whole = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap());
    for cut in [whole.len() - 1, whole.len() / 2, header as usize, 100, 8, 5, 0] {
        let error = open_error_of(&whole[..cut]);
        let WeightsError::Truncated { needed, actual, .. } = error else {
            panic!("{cut}: {error}")
        };
        let expected = match cut {
            0..8 => 8,
            _ if (cut as u64) < header => header,
            _ => whole.len() as u64,
        };
        assert_eq!((needed, actual), (expected, cut as u64));
        assert!(error.to_string().ends_with("the download was cut off? fetch it again"));
    }
}

#[test]
fn broken_safetensors_is_no_safetensors_file() {
    for (bytes, reason) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0"[..], "git lfs pull"),
        (b"<html>not found</html>", "its header would have"),
        (b"\x02\0\0\0\0\0\0\0[]", "invalid JSON"),
        (b"\x02\0\0\0\0\0\0\0{}surplus", "7 bytes more"),
    ] {
        let error = open_error_of(bytes);
        assert!(matches!(error, WeightsError::BadFile { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    let header = br#"{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let error = checkpoint.tensor("w", Kind::Float, Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("w is stored as F8_E4M3"), "{error}");
}

#[test]
fn not_a_model_says_what_was_expected() {
    let with = |files: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::write(dir.path().join(file), "{}").unwrap();
        }
        open_error(dir.path()).to_string()
    };
    for (files, found) in [
        (&[][..], "an empty directory"),
        (&["notes.txt"], "notes.txt"),
        (&["config.json"], "config.json"),
        (&["config.json", "pytorch_model.bin"], "safe_serialization=True"),
        (&["adapter_config.json", "adapter_model.safetensors"], "give its base model"),
        (&["a.gguf", "b.gguf"], "give the path of one"),
    ] {
        let error = with(files);
        assert!(error.contains("expected config.json with model.safetensors or"), "{error}");
        assert!(error.contains(found), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    std::fs::write(&file, "").unwrap();
    assert!(open_error(&file).to_string().contains("give the directory that holds it"));
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(matches!(open_error(dir.path()), WeightsError::BadFile { format: "JSON", .. }));
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    assert!(matches!(open_error(dir.path()), WeightsError::BadFile { format: "JSON", .. }));
    assert!(matches!(open_error(Path::new("/nonexistent/model")), WeightsError::Io { .. }));
}

#[test]
fn broken_index_names_the_shard() {
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path(), &tiny_config(), &tiny_tensors(), 2);
    let second = "model-00002-of-00002.safetensors";
    let saved = std::fs::read(dir.path().join(second)).unwrap();
    std::fs::remove_file(dir.path().join(second)).unwrap();
    let error = open_error(dir.path());
    assert!(matches!(error, WeightsError::BadIndex { .. }), "{error}");
    assert!(
        error.to_string().contains(&format!("the shard {second} that it names does not exist"))
    );

    std::fs::write(dir.path().join(second), saved).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    for (text, reason) in [
        (json!({}), "no object weight_map"),
        (json!({ "weight_map": {} }), "is empty"),
        (json!({ "weight_map": { "x": 3 } }), "is no plain file name"),
        (json!({ "weight_map": { "x": "../secret" } }), "is no plain file name"),
        (json!({ "weight_map": { "x": second } }), "holds x, which is not there"),
    ] {
        std::fs::write(&index, text.to_string()).unwrap();
        let error = open_error(dir.path());
        assert!(matches!(error, WeightsError::BadIndex { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

/// Lengths that fit one by one and overflow together.
#[test]
fn a_header_of_more_bytes_than_there_are_numbers_is_cut_off() {
    let (size, mut tensors) = ((1u64 << 61) - 1, Vec::new());
    for i in 0..8 {
        let (start, end) = (i * size, (i + 1) * size);
        tensors.push(format!(
            r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#
        ));
    }
    let header = format!("{{{}}}", tensors.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let error = open_error_of(&bytes);
    assert!(matches!(error, WeightsError::Truncated { needed: u64::MAX, .. }), "{error}");
}

#[test]
fn gguf_numbers_that_nobody_can_divide_by_are_refused() {
    // The reader of headers would divide by the alignment, and rows are divided by the heads.
    let field = |key: &str, kind: u32, value: &[u8]| {
        [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes(), value].concat()
    };
    let heads = (1u64 << 62).to_le_bytes();
    let fields = [
        field("general.architecture", 8, b"\x05\0\0\0\0\0\0\0llama"),
        field("llama.attention.head_count", 10, &heads),
        field("llama.embedding_length", 4, &[8, 0, 0, 0]),
    ];
    let tensor =
        [&b"\x13\0\0\0\0\0\0\0blk.0.attn_q.weight\x01\0\0\0"[..], &[0; 8 + 4 + 8]].concat();
    let file = |n: u8, last: Vec<u8>| {
        let counts = [&b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0"[..], &[n, 0, 0, 0, 0, 0, 0, 0]].concat();
        [counts, fields.concat(), last, tensor.clone(), vec![0; 64]].concat()
    };
    let error = open_error_of_gguf(&file(3, vec![])).to_string();
    assert!(error.contains("does not divide by 4611686018427387904 heads"), "{error}");
    let error = open_error_of_gguf(&file(4, field("general.alignment", 4, &[0; 4]))).to_string();
    assert!(error.contains("general.alignment is 0"), "{error}");
}

#[test]
fn truncated_gguf_says_both_lengths() {
    let whole = std::fs::read(fixture("llama.gguf")).unwrap();
    for cut in [whole.len() - 1, whole.len() - 1000] {
        let error = open_error_of_gguf(&whole[..cut]);
        let WeightsError::Truncated { needed, actual, .. } = error else { panic!("{error}") };
        assert!(needed > actual && needed <= whole.len() as u64 && actual == cut as u64);
        assert!(error.to_string().ends_with("the download was cut off? fetch it again"));
    }
    for cut in [4, 20, 1000, 5000] {
        let error = open_error_of_gguf(&whole[..cut]);
        assert!(matches!(error, WeightsError::BadFile { format: "GGUF", .. }), "{error}");
        assert!(error.to_string().ends_with("the download was cut off? fetch it again"), "{error}");
    }
    let error = open_error_of_gguf(b"PK\x03\x04");
    assert!(error.to_string().contains("does not begin with the letters GGUF"), "{error}");
}

#[test]
fn unknown_gguf_architecture_lists_the_known() {
    let mut bytes = std::fs::read(fixture("llama.gguf")).unwrap();
    let at = find(&bytes, b"general.architecture") + 20 + 4 + 8;
    assert_eq!(&bytes[at..at + 5], b"llama");
    bytes[at..at + 5].copy_from_slice(b"mamba");
    let error = open_error_of_gguf(&bytes);
    assert!(
        error.to_string().ends_with("architecture \"mamba\" is not known; known: llama, qwen2")
    );
    assert!(matches!(error, WeightsError::UnknownArchitecture { .. }));
}

#[test]
fn unsupported_gguf_types_are_named() {
    let mut bytes = std::fs::read(fixture("llama.gguf")).unwrap();
    // The type stands behind the name, the number of dimensions and one dimension.
    let at = find(&bytes, b"output_norm.weight") + 18 + 4 + 8;
    assert_eq!(bytes[at..at + 4], [0; 4]);
    bytes[at] = 20;
    let error = open_error_of_gguf(&bytes);
    let text = error.to_string();
    assert!(matches!(error, WeightsError::UnsupportedTensorType { tensor: None, .. }), "{text}");
    assert!(
        text.contains("IQ4_NL (GGML type 20), which is not supported; known: F32, F16"),
        "{text}"
    );

    // Q8_1 is known to the reader, but no file should have it: an error only for who asks for it.
    bytes[at] = 9;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    std::fs::write(&file, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    let error = checkpoint.tensor("model.norm.weight", Kind::Float, Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight is stored as Q8_1"), "{error}");
}

#[test]
fn bad_gguf_metadata_names_the_key() {
    let mut bytes = std::fs::read(fixture("llama.gguf")).unwrap();
    let at = find(&bytes, b"llama.block_count");
    bytes[at..at + 17].copy_from_slice(b"llama.block_fount");
    let error = open_error_of_gguf(&bytes);
    assert!(matches!(error, WeightsError::BadMetadata { .. }), "{error}");
    assert!(
        error.to_string().contains("llama.block_count: expected a whole number above 0, found")
    );
}

#[test]
fn a_path_that_does_not_exist_is_no_hub_name() {
    for name in ["./models/x", "/models/x", "a/b/c", "models/x.gguf"] {
        let error = Checkpoint::find(name).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{name}: no such file or directory, and not a hub name (OWNER/NAME, or NAME)")
        );
        assert!(matches!(error, WeightsError::NotFound { .. }));
    }
}

fn find(bytes: &[u8], text: &[u8]) -> usize {
    bytes.windows(text.len()).position(|window| window == text).unwrap()
}
