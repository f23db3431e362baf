//! One GGUF file: header by candle-core, tensors under their Hugging Face names.

use super::gguf_metadata::Metadata;
use super::{Entries, Entry, Mapped, Opened, Stored, WeightsError};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use std::io::Cursor;
use std::path::Path;
use tch::{Device, Kind};

/// The architectures whose names and row orders are known here.
const ARCHITECTURES: [&str; 2] = ["llama", "qwen2"];
const KNOWN_TYPES: &str =
    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K";
/// What candle-core says of a type that it does not know; the type's number follows.
const UNKNOWN_DTYPE: &str = "unknown dtype for tensor ";
const CUT_OFF: &str = "the download was cut off? fetch it again";
/// llama.cpp's frequency factors (llama3 scaling), `[D/2]`: part of the configuration here.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// llama.cpp's module names within a block, and Hugging Face's.
const BLOCK_MODULES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Opens the file: reads its header, makes configuration and tokenizer from its metadata.
pub(super) fn open(path: &Path) -> Result<Opened, WeightsError> {
    let file = Mapped::open(path, "GGUF")?;
    if !file.bytes().starts_with(b"GGUF") {
        return Err(file.bad("it does not begin with the letters GGUF"));
    }
    super::gguf_header::check(file.bytes()).map_err(|reason| file.bad(reason))?;
    let content = Content::read(&mut Cursor::new(file.bytes())).map_err(|e| header(&file, &e))?;
    let mut metadata = Metadata::new(path, content.metadata);
    let architecture = metadata.architecture()?;
    if !ARCHITECTURES.contains(&architecture.as_str()) {
        return Err(WeightsError::UnknownArchitecture {
            file: path.to_path_buf(),
            found: architecture,
            known: ARCHITECTURES.join(", "),
        });
    }
    metadata.refuse_unsupported()?;

    let n_heads = metadata.n_heads()? as i64;
    let n_kv_heads = metadata.n_kv_heads()? as i64;
    let mut entries = Entries::new();
    let mut factors = None;
    for (stored_name, info) in &content.tensor_infos {
        let mut entry = locate(&file, content.tensor_data_offset, stored_name, info)?;
        if stored_name == ROPE_FACTORS {
            factors = Some(entry);
            continue;
        }
        if architecture == "llama" {
            entry.heads = match stored_name.rsplit('.').nth(1) {
                Some("attn_q") => Some(n_heads),
                Some("attn_k") => Some(n_kv_heads),
                _ => None,
            };
        }
        let divides = |heads: i64| {
            let rows = entry.shape.first().zip(heads.checked_mul(2));
            rows.is_some_and(|(rows, halves)| rows % halves == 0)
        };
        if let Some(heads) = entry.heads
            && !divides(heads)
        {
            let shape = &entry.shape;
            return Err(
                file.bad(format!("{stored_name} {shape:?} does not divide by {heads} heads"))
            );
        }
        entries.insert(super::names::canonical(&entry.name).to_string(), entry);
    }

    let factors = factors.map(|entry| rope_factors(&file, &entry)).transpose()?;
    let embedding = &entries.get("embed_tokens.weight");
    let Some(&[vocab_size, _]) = embedding.map(|entry| entry.shape.as_slice()) else {
        return Err(file.bad("it has no token_embd.weight [V, H]"));
    };
    let config = metadata.config(&entries, vocab_size as u64, factors)?;
    let tokenizer = metadata.tokenizer()?;
    Ok(Opened { files: vec![file], entries, config, tokenizer })
}

/// The error for a header that candle-core cannot read.
fn header(file: &Mapped, error: &candle_core::Error) -> WeightsError {
    let text = error.to_string();
    let number = text.split_once(UNKNOWN_DTYPE).and_then(|(_, rest)| {
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse::<u32>().ok()
    });
    match number {
        Some(number) => WeightsError::UnsupportedTensorType {
            file: file.path.clone(),
            tensor: None,
            found: type_name(number),
            known: KNOWN_TYPES,
        },
        None => file.bad(format!("{}; {CUT_OFF}", text.lines().next().unwrap_or_default())),
    }
}

/// ggml's names for the types that candle-core does not know.
fn type_name(number: u32) -> String {
    let name = match number {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("GGML type {number}"),
    };
    format!("{name} (GGML type {number})")
}

/// Where a tensor lies; checked against the file's length.
fn locate(
    file: &Mapped,
    data_offset: u64,
    stored_name: &str,
    info: &TensorInfo,
) -> Result<Entry, WeightsError> {
    let name = hugging_face_name(stored_name).unwrap_or_else(|| stored_name.to_string());
    let dims = info.shape.dims();
    let (block, block_bytes) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
    let elements = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let length = elements.and_then(|n| (n / block).checked_mul(block_bytes));
    let start = data_offset.checked_add(info.offset);
    let (Some(length), Some(start)) = (length, start) else {
        return Err(file.bad(format!("{stored_name} {dims:?} is larger than any memory")));
    };
    // A single number has no row, and no quantised type stores one.
    if !dims.last().unwrap_or(&1).is_multiple_of(block) {
        let dtype = info.ggml_dtype;
        return Err(file.bad(format!("{stored_name} {dims:?} does not fit {dtype:?} blocks")));
    }
    if !info.offset.is_multiple_of(8) || !data_offset.is_multiple_of(8) {
        return Err(file.bad(format!("{stored_name} does not begin at a multiple of 8 bytes")));
    }
    let end = start.saturating_add(length as u64);
    if end > file.bytes().len() as u64 {
        return Err(file.truncated(end));
    }
    Ok(Entry {
        name,
        file: 0,
        bytes: start as usize..end as usize,
        shape: dims.iter().map(|&n| n as i64).collect(),
        stored: stored(info.ggml_dtype),
        heads: None,
    })
}

fn stored(dtype: GgmlDType) -> Stored {
    match dtype {
        GgmlDType::F32 => Stored::Plain(Kind::Float),
        GgmlDType::F16 => Stored::Plain(Kind::Half),
        GgmlDType::BF16 => Stored::Plain(Kind::BFloat16),
        GgmlDType::Q8_1 => Stored::Other { found: "Q8_1".into(), known: KNOWN_TYPES },
        GgmlDType::Q4_0
        | GgmlDType::Q4_1
        | GgmlDType::Q5_0
        | GgmlDType::Q5_1
        | GgmlDType::Q8_0
        | GgmlDType::Q2K
        | GgmlDType::Q3K
        | GgmlDType::Q4K
        | GgmlDType::Q5K
        | GgmlDType::Q6K
        | GgmlDType::Q8K => Stored::Quantised(dtype),
    }
}

/// "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight"; None for names that these
/// families do not have.
fn hugging_face_name(stored: &str) -> Option<String> {
    let (module, parameter) = stored.rsplit_once('.')?;
    let module = match module {
        "token_embd" => "model.embed_tokens".to_string(),
        "output_norm" => "model.norm".to_string(),
        "output" => "lm_head".to_string(),
        _ => {
            let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
            let (_, module) = BLOCK_MODULES.iter().find(|(theirs, _)| *theirs == module)?;
            format!("model.layers.{layer}.{module}")
        }
    };
    Some(format!("{module}.{parameter}"))
}

fn rope_factors(file: &Mapped, entry: &Entry) -> Result<Vec<f64>, WeightsError> {
    let tensor = super::read::tensor(file, entry, Kind::Float, Device::Cpu)?;
    Vec::<f32>::try_from(&tensor.flatten(0, -1))
        .map(|factors| factors.into_iter().map(f64::from).collect())
        .map_err(|source| WeightsError::Tensor { name: entry.name.clone(), source: source.into() })
}

#[cfg(test)]
mod tests {
    use super::hugging_face_name;

    #[test]
    fn names_map_to_hugging_face() {
        for (theirs, ours) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("blk.11.attn_norm.weight", "model.layers.11.input_layernorm.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
            ("blk.2.ffn_norm.weight", "model.layers.2.post_attention_layernorm.weight"),
            ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
        ] {
            assert_eq!(hugging_face_name(theirs).as_deref(), Some(ours));
        }
        assert_eq!(hugging_face_name("blk.0.ffn_gate_exps.weight"), None);
    }
}
