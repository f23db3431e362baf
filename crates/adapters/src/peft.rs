//! PEFT's directories: `adapter_config.json` and `adapter_model.safetensors`.

use crate::{AdapterError, LoraSpec};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter as it lies on disk: float32 host tensors under PEFT's names.
#[derive(Debug)]
pub struct PeftAdapter {
    pub spec: LoraSpec,
    pub tensors: Vec<(String, Tensor)>,
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
    std::fs::create_dir_all(dir).map_err(|e| file_error(dir, e.to_string()))?;
    let spec = config.spec;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": spec.r,
        "lora_alpha": number(spec.lora_alpha),
        "lora_dropout": spec.lora_dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": spec.target_modules,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "use_dora": false,
    });
    let text = serde_json::to_string_pretty(&config).expect("a JSON value can be written");
    let path = dir.join(CONFIG);
    std::fs::write(&path, text + "\n").map_err(|e| file_error(&path, e.to_string()))?;

    let path = dir.join(WEIGHTS);
    std::fs::write(&path, to_safetensors(tensors)).map_err(|e| file_error(&path, e.to_string()))
}

/// Reads an adapter that PEFT saved. Kinds of adapter that Offshoot cannot train exactly (DoRA,
/// trained biases, rank patterns, ...) are refused by name.
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
    refuse_unsupported(&path, &config)?;

    let path = dir.join(WEIGHTS);
    let bytes = std::fs::read(&path).map_err(|e| {
        file_error(
            &path,
            format!("{e}; adapters saved as .bin are not read: save with safe_serialization=True"),
        )
    })?;
    let tensors = from_safetensors(&path, &bytes)?;
    let spec = parse_spec(&dir.join(CONFIG), &config, &tensors)?;
    Ok(PeftAdapter { spec, tensors })
}

/// Values at which the named PEFT features are off; absent and null are off as well.
fn refuse_unsupported(path: &Path, config: &Value) -> Result<(), AdapterError> {
    if config["peft_type"] != "LORA" {
        let found = &config["peft_type"];
        return Err(file_error(path, format!("peft_type is {found}, expected \"LORA\"")));
    }
    let off = [
        ("bias", json!("none")),
        ("use_dora", json!(false)),
        ("lora_bias", json!(false)),
        ("modules_to_save", json!([])),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("layers_to_transform", json!([])),
        ("layer_replication", json!([])),
        ("trainable_token_indices", json!([])),
        ("target_parameters", json!([])),
        ("exclude_modules", json!([])),
    ];
    for (field, off) in off {
        let value = &config[field];
        if !value.is_null() && *value != off {
            let problem =
                format!("{field} is {value}; Offshoot trains plain LoRA, where it is {off}");
            return Err(file_error(path, problem));
        }
    }
    Ok(())
}

fn parse_spec(
    path: &Path,
    config: &Value,
    tensors: &[(String, Tensor)],
) -> Result<LoraSpec, AdapterError> {
    let missing = |field: &str| file_error(path, format!("{field} is missing or no number"));
    let targets = match &config["target_modules"] {
        Value::Array(names) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        // A pattern or "all-linear": the tensors say which modules it met.
        _ => modules_of(tensors),
    };
    let spec = LoraSpec {
        r: config["r"].as_u64().ok_or_else(|| missing("r"))? as usize,
        lora_alpha: config["lora_alpha"].as_f64().ok_or_else(|| missing("lora_alpha"))?,
        lora_dropout: config["lora_dropout"].as_f64().unwrap_or(0.0),
        use_rslora: config["use_rslora"].as_bool().unwrap_or(false),
        target_modules: targets,
    };
    spec.validate()?;
    Ok(spec)
}

/// The distinct module names behind the layer number, such as `self_attn.q_proj`.
fn modules_of(tensors: &[(String, Tensor)]) -> Vec<String> {
    let mut modules: Vec<String> = tensors
        .iter()
        .filter_map(|(name, _)| {
            let path = name.split(".lora_").next()?;
            let behind_number = path
                .char_indices()
                .filter(|(_, c)| *c == '.')
                .map(|(i, _)| &path[i + 1..])
                .find_map(|rest| {
                    let (number, module) = rest.split_once('.')?;
                    number.parse::<usize>().ok().map(|_| module)
                })?;
            Some(behind_number.to_owned())
        })
        .collect();
    modules.sort();
    modules.dedup();
    modules
}

/// Tensors as one safetensors file, in float32.
pub fn to_safetensors(tensors: &[(String, Tensor)]) -> Vec<u8> {
    let buffers: Vec<(&str, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let host = tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
            let mut bytes = vec![0; host.numel() * 4];
            host.copy_data_u8(&mut bytes, host.numel());
            (name.as_str(), host.size().iter().map(|&n| n as usize).collect(), bytes)
        })
        .collect();
    let views = buffers.iter().map(|(name, shape, bytes)| {
        let view =
            TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes for each value");
        (*name, view)
    });
    // PEFT and Transformers look for this mark.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(metadata)).expect("names are unique")
}

fn from_safetensors(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Tensor)>, AdapterError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| file_error(path, format!("not a safetensors file ({e}); was it cut off?")))?;
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
            let tensor = Tensor::from_data_size(view.data(), &shape, kind).to_kind(Kind::Float);
            Ok((name.to_owned(), tensor))
        })
        .collect()
}

/// PEFT writes whole alphas as integers.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

fn file_error(path: &Path, problem: String) -> AdapterError {
    AdapterError::File { path: path.display().to_string(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_target_pattern_is_read_from_the_tensors() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &LoraSpec::default());
        let path = dir.path().join(CONFIG);
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config["target_modules"] = json!(".*q_proj");
        std::fs::write(&path, config.to_string()).unwrap();
        assert_eq!(read_dir(dir.path()).unwrap().spec.target_modules, ["self_attn.q_proj"]);

        config["use_dora"] = json!(true);
        std::fs::write(&path, config.to_string()).unwrap();
        let error = read_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("use_dora is true"), "{error}");
    }
}
