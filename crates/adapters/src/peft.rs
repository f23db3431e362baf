//! PEFT's directories: `adapter_config.json` and `adapter_model.safetensors`.

mod config;

use crate::{AdapterError, LoraSpec, checked};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// PEFT's name of the settings' file.
pub const CONFIG: &str = "adapter_config.json";
/// PEFT's name of the tensors' file.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// How PEFT called it before there was safetensors.
const PICKLE: &str = "adapter_model.bin";

/// An adapter as it lies on disk: float32 host tensors under PEFT's names.
#[derive(Debug)]
pub struct PeftAdapter {
    pub spec: LoraSpec,
    pub tensors: Vec<(String, Tensor)>,
    /// `base_model_name_or_path`, if the directory names one.
    pub base_model: Option<String>,
}

/// What a PEFT directory says beside the tensors.
pub struct PeftConfig<'a> {
    pub spec: &'a LoraSpec,
    /// Path or hub name of the base model, for people and for `AutoPeftModel`.
    pub base_model: &'a str,
    /// True for models whose linear layers are stored `[in, out]` (GPT-2's Conv1D).
    pub fan_in_fan_out: bool,
}

/// Writes an adapter that `peft.PeftModel.from_pretrained` loads. Creates the directory.
pub fn write_dir(
    dir: &Path,
    config: &PeftConfig<'_>,
    tensors: &[(String, Tensor)],
) -> Result<(), AdapterError> {
    write_dir_as(dir, config, tensors, Kind::Float)
}

/// The same with tensors in `kind`: float32, bfloat16 or float16.
pub fn write_dir_as(
    dir: &Path,
    config: &PeftConfig<'_>,
    tensors: &[(String, Tensor)],
    kind: Kind,
) -> Result<(), AdapterError> {
    std::fs::create_dir_all(dir).map_err(|e| file_error(dir, e.to_string()))?;
    let config = config::to_json(config);
    let text = serde_json::to_string_pretty(&config).expect("a JSON value can be written");
    let path = dir.join(CONFIG);
    std::fs::write(&path, text + "\n").map_err(|e| file_error(&path, e.to_string()))?;

    let path = dir.join(WEIGHTS);
    let bytes = to_safetensors_as(tensors, kind);
    std::fs::write(&path, bytes).map_err(|e| file_error(&path, e.to_string()))
}

/// Reads an adapter that PEFT saved. Kinds of adapter that Offshoot cannot train exactly (DoRA,
/// trained biases, rank patterns, ...) are refused by name. Where the settings name a pattern or
/// some layers, the modules that have tensors are the targets, by their paths.
pub fn read_dir(dir: &Path) -> Result<PeftAdapter, AdapterError> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| {
        file_error(
            &path,
            format!("{e}; expected a PEFT adapter directory with {CONFIG} and {WEIGHTS}"),
        )
    })?;
    let config: Value =
        serde_json::from_str(&text).map_err(|e| file_error(&path, format!("not JSON: {e}")))?;
    config::refuse_unsupported(&path, &config)?;

    let tensors = from_safetensors(&dir.join(WEIGHTS), &read_weights(dir)?)?;
    let spec = config::spec(&path, &config, paths_of(&tensors))?;
    let base_model = config["base_model_name_or_path"].as_str().map(str::to_owned);
    Ok(PeftAdapter { spec, tensors, base_model: base_model.filter(|name| !name.is_empty()) })
}

fn read_weights(dir: &Path) -> Result<Vec<u8>, AdapterError> {
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join(PICKLE).exists() {
        return Err(file_error(
            &dir.join(PICKLE),
            format!(
                "it is a pickle file, which can run code when it is read, so it is not; load it with PEFT and save it again (save_pretrained writes {WEIGHTS})"
            ),
        ));
    }
    std::fs::read(&path).map_err(|e| file_error(&path, e.to_string()))
}

/// The module that a tensor's name in a PEFT file belongs to, such as
/// `model.layers.3.self_attn.q_proj`, if it is an A or B.
pub fn module_path(name: &str) -> Option<&str> {
    let path = name.strip_prefix("base_model.model.").unwrap_or(name);
    [".lora_A.weight", ".lora_B.weight"].iter().find_map(|end| path.strip_suffix(end))
}

fn paths_of(tensors: &[(String, Tensor)]) -> Vec<String> {
    let paths = tensors.iter().filter_map(|(name, _)| module_path(name));
    paths.collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect()
}

/// Tensors as one safetensors file, in float32.
pub fn to_safetensors(tensors: &[(String, Tensor)]) -> Vec<u8> {
    to_safetensors_as(tensors, Kind::Float)
}

/// Tensors as one safetensors file. Panics if `kind` is not float32, bfloat16 or float16.
pub fn to_safetensors_as(tensors: &[(String, Tensor)], kind: Kind) -> Vec<u8> {
    let dtype = match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        other => panic!("adapters are written in float32, bfloat16 or float16, not {other:?}"),
    };
    let size = kind.elt_size_in_bytes();
    let buffers: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let host = tensor.to_device(Device::Cpu).to_kind(kind).contiguous();
            let mut bytes = vec![0; host.numel() * size];
            host.copy_data_u8(&mut bytes, host.numel());
            (name.as_str(), host.size().iter().map(|&n| n as usize).collect(), bytes)
        })
        .collect();
    let views = buffers.iter().map(|(name, shape, bytes)| {
        let view =
            TensorView::new(dtype, shape.clone(), bytes).expect("as many bytes as the values have");
        (*name, view)
    });
    // PEFT and Transformers look for this mark.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(metadata)).expect("names are unique")
}

fn from_safetensors(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Tensor)>, AdapterError> {
    let (file, _) = checked::safetensors(bytes).map_err(|problem| file_error(path, problem))?;
    // The library hands tensors out in the order of a hash map; here it is that of their names.
    let named: BTreeMap<&str, TensorView<'_>> = file.iter().collect();
    named
        .into_iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::F16 => Kind::Half,
                Dtype::BF16 => Kind::BFloat16,
                other => {
                    return Err(file_error(
                        path,
                        format!("\"{name}\" is {other:?}, expected F32, F16 or BF16"),
                    ));
                }
            };
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            // libtorch has limits of its own, on the number of dimensions and on their size.
            let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)
                .and_then(|tensor| tensor.f_to_kind(Kind::Float))
                .map_err(|e| file_error(path, format!("\"{name}\": {}", first_line(&e))))?;
            Ok((name.to_owned(), tensor))
        })
        .collect()
}

/// Without libtorch's own call stack.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn file_error(path: &Path, problem: String) -> AdapterError {
    AdapterError::File { path: path.display().to_string(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tensors() -> Vec<(String, Tensor)> {
        ["lora_A", "lora_B"]
            .map(|m| {
                let name = format!("base_model.model.model.layers.12.self_attn.q_proj.{m}.weight");
                (name, Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]))
            })
            .into()
    }

    fn write(dir: &Path, spec: &LoraSpec) {
        let config = PeftConfig { spec, base_model: "tiny", fan_in_fan_out: false };
        write_dir(dir, &config, &tensors()).unwrap();
    }

    #[test]
    fn an_adapter_survives_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let spec = LoraSpec {
            lora_alpha: 7.5,
            target_modules: vec!["q_proj".into()],
            ..LoraSpec::default()
        };
        write(dir.path(), &spec);
        let read = read_dir(dir.path()).unwrap();
        assert_eq!(read.spec, spec);
        for ((name, tensor), (name2, tensor2)) in tensors().iter().zip(&read.tensors) {
            assert_eq!(name, name2);
            assert!(tensor.equal(tensor2));
        }
    }

    /// libtorch refuses such shapes with an exception.
    #[test]
    fn a_shape_that_no_tensor_can_have_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &LoraSpec::default());
        for shape in ["[0,9223372036854775808]", "[0,4294967296,4294967296,2]"] {
            let header =
                format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            std::fs::write(dir.path().join(WEIGHTS), file).unwrap();
            let error = read_dir(dir.path()).unwrap_err().to_string();
            assert!(error.contains("adapter_model.safetensors: \"w\": "), "{error}");
        }
    }

    #[test]
    fn lengths_that_overflow_together_are_refused() {
        let (size, mut tensors) = ((1u64 << 61) - 1, Vec::new());
        for i in 0..8 {
            let (start, end) = (i * size, (i + 1) * size);
            tensors.push(format!(
                r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#
            ));
        }
        let header = format!("{{{}}}", tensors.join(","));
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        let error = from_safetensors(Path::new("x"), &file).unwrap_err().to_string();
        assert!(error.contains("18446744073709551608 bytes, 0 are there"), "{error}");
        assert!(crate::AdapterState::from_safetensors(&file).is_err());
    }

    #[test]
    fn a_target_pattern_is_read_from_the_tensors() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &LoraSpec::default());
        let path = dir.path().join(CONFIG);
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config["target_modules"] = json!(".*q_proj");
        std::fs::write(&path, config.to_string()).unwrap();
        assert_eq!(
            read_dir(dir.path()).unwrap().spec.target_modules,
            ["model.layers.12.self_attn.q_proj"]
        );

        config["use_dora"] = json!(true);
        std::fs::write(&path, config.to_string()).unwrap();
        let error = read_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("use_dora is true"), "{error}");
    }
}
