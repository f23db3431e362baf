use crate::*;
use offshoot_model::weights::Checkpoint;

/// Both spellings of every name find the tensor, whichever the file has.
#[test]
fn names_resolve_with_and_without_prefix() {
    for stored in ["", "model.", "transformer."] {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = prefixed(stored, &tiny_tensors());
        tensors.push(named("lm_head.weight", &[7, 4]));
        write_model(dir.path(), &tiny_config(), &tensors);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.config()["hidden_size"], 4);
        assert!(checkpoint.gguf_tokenizer().is_none());
        for (name, shape, values) in tiny_tensors() {
            for asked in [name.clone(), format!("model.{name}"), format!("transformer.{name}")] {
                assert!(checkpoint.contains(&asked), "{asked}");
                let tensor = checkpoint.tensor(&asked, Kind::Float, Device::Cpu).unwrap();
                let size: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
                assert_eq!((tensor.size(), floats(&tensor)), (size, values.clone()), "{asked}");
            }
        }
        assert!(checkpoint.contains("lm_head.weight"));
        assert!(!checkpoint.contains("lm_head.bias"));
    }
}

#[test]
fn shards_equal_one_file_and_tensors_outlive_the_map() {
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path(), &tiny_config(), &prefixed("model.", &tiny_tensors()), 3);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.path(), dir.path());
    assert_eq!(checkpoint.name(), dir.path().file_name().unwrap().to_str().unwrap());
    let tensors: Vec<_> = tiny_tensors()
        .iter()
        .map(|(name, ..)| checkpoint.tensor(name, Kind::Float, Device::Cpu).unwrap())
        .collect();
    drop(checkpoint);
    for (tensor, (name, _, values)) in tensors.iter().zip(tiny_tensors()) {
        assert_eq!(floats(tensor), values, "{name}");
    }
}

/// From each stored type to each wanted one: as libtorch converts.
#[test]
fn stored_types_convert() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let values = Tensor::from_slice(&[1.0f64, -2.5, 3.0e-3, 100.25]).view([2, 2]);
    let stored = [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16, Kind::Int64, Kind::Uint8];
    let named = stored.map(|kind| (format!("{kind:?}"), values.abs().to_kind(kind)));
    Tensor::write_safetensors(&named, dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (name, expected) in &named {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let tensor = checkpoint.tensor(name, kind, Device::Cpu).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (kind, vec![2, 2]), "{name}");
            assert_eq!(floats(&tensor), floats(&expected.to_kind(kind)), "{name} as {kind:?}");
        }
    }
}

/// Old files have headers of any length, so that no tensor is aligned; and tensors may be empty.
#[test]
fn unaligned_and_empty_tensors_load() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let mut header = json!({
        "a": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
        "none": { "dtype": "F32", "shape": [0, 3], "data_offsets": [8, 8] },
    })
    .to_string();
    while header.len() % 4 != 1 {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let a = checkpoint.tensor("a", Kind::Float, Device::Cpu).unwrap();
    assert_eq!(floats(&a), [1.5, -2.0]);
    let none = checkpoint.tensor("none", Kind::BFloat16, Device::Cpu).unwrap();
    assert_eq!(none.size(), [0, 3]);
}
