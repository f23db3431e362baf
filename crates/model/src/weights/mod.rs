//! Weights: a model by path or hub name, memory-mapped, its tensors by their Hugging Face names.
//!
//! A [`Checkpoint`] is open only while parts are loaded from it. A process reads the pages of the
//! tensors that it asks for and no others; each becomes a tensor of the wanted kind in one pass.
//!
//! ```no_run
//! use offshoot_model::weights::Checkpoint;
//!
//! let checkpoint = Checkpoint::find("HuggingFaceTB/SmolLM2-135M-Instruct")?;
//! println!("{} layers", checkpoint.config()["num_hidden_layers"]);
//! let q = checkpoint.tensor(
//!     "model.layers.0.self_attn.q_proj.weight",
//!     tch::Kind::BFloat16,
//!     tch::Device::Cpu,
//! )?;
//! # Ok::<(), offshoot_model::weights::WeightsError>(())
//! ```

mod config_only;
mod error;
mod fingerprint;
mod gguf;
mod gguf_header;
mod gguf_metadata;
mod hub;
mod mapped;
mod names;
mod read;
mod safetensors;

pub use config_only::{find_config, find_config_with};
pub use error::WeightsError;
pub use hub::HubSettings;

use candle_core::quantized::GgmlDType;
use mapped::Mapped;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Tensors by their name without the base model's prefix.
type Entries = BTreeMap<String, Entry>;

/// What both formats come to.
struct Opened {
    files: Vec<Mapped>,
    entries: Entries,
    config: Value,
    tokenizer: Option<GgufTokenizer>,
}

/// Where one tensor lies, and how.
struct Entry {
    /// The name that the file gives it (for GGUF: its Hugging Face name).
    name: String,
    file: usize,
    bytes: Range<usize>,
    shape: Vec<i64>,
    stored: Stored,
    /// Set where the rows of so many heads stand in llama.cpp's rotary order.
    heads: Option<i64>,
}

impl Entry {
    fn elements(&self) -> usize {
        self.shape.iter().map(|&n| n as usize).product()
    }
}

enum Stored {
    Plain(Kind),
    Quantised(GgmlDType),
    /// Known by name only; an error when somebody asks for the tensor.
    Other {
        found: String,
        known: &'static str,
    },
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Stored::Plain(kind) => write!(f, "{kind:?}"),
            Stored::Quantised(dtype) => write!(f, "{dtype:?}"),
            Stored::Other { found, .. } => f.write_str(found),
        }
    }
}

/// A model as it lies on disk, memory-mapped: a Hugging Face directory or one GGUF file.
pub struct Checkpoint {
    name: String,
    path: PathBuf,
    opened: Opened,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, a GGUF file, or a directory that holds exactly one GGUF
    /// file and no `config.json`. Reads headers only, and checks them against the files' lengths.
    ///
    /// # Errors
    /// [`WeightsError::NotAModel`], [`WeightsError::Truncated`], [`WeightsError::BadFile`],
    /// [`WeightsError::BadIndex`], [`WeightsError::Io`]; for GGUF also
    /// [`WeightsError::UnknownArchitecture`], [`WeightsError::BadMetadata`] and
    /// [`WeightsError::UnsupportedTensorType`].
    pub fn open(path: &Path) -> Result<Checkpoint, WeightsError> {
        let (name, path) = (last_part(path), locate(path)?);
        let opened = if path.is_dir() { safetensors::open(&path)? } else { gguf::open(&path)? };
        Ok(Checkpoint { name, path, opened })
    }

    /// Opens `name`: a path that exists, else a hub name ("HuggingFaceTB/SmolLM2-135M-Instruct"),
    /// fetched as the environment says ([`HubSettings::from_env`]).
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; [`WeightsError::NotFound`], [`WeightsError::NotCached`] and
    /// the variants whose names begin with Hub.
    pub fn find(name: &str) -> Result<Checkpoint, WeightsError> {
        Checkpoint::find_with(name, &HubSettings::from_env())
    }

    /// [`Checkpoint::find`] with a hub, a cache and a token of one's own.
    ///
    /// # Errors
    /// As for [`Checkpoint::find`].
    pub fn find_with(name: &str, settings: &HubSettings) -> Result<Checkpoint, WeightsError> {
        if Path::new(name).exists() {
            return Checkpoint::open(Path::new(name));
        }
        if !hub::is_hub_name(name) {
            return Err(WeightsError::NotFound { name: name.into() });
        }
        let path = hub::fetch(name, settings)?;
        let checkpoint = Checkpoint::open(&path)?;
        Ok(Checkpoint { name: name.into(), ..checkpoint })
    }

    /// The path's last part, or the hub name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`; for a GGUF file the same fields, made from its metadata. There `rope_scaling`
    /// may be `{"rope_type": "factors", "factors": [D/2 numbers]}`: each inverse frequency is to be
    /// divided by its factor.
    pub fn config(&self) -> &Value {
        &self.opened.config
    }

    /// Whether there is a tensor of this name, with or without the base model's prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.opened.entries.contains_key(names::canonical(name))
    }

    /// The tensors' names as the files give them (for GGUF: their Hugging Face names).
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.opened.entries.values().map(|entry| entry.name.as_str())
    }

    /// The dtype in which a tensor is stored; none if it is quantised, or not there.
    pub fn stored_kind(&self, name: &str) -> Option<Kind> {
        match self.opened.entries.get(names::canonical(name))?.stored {
            Stored::Plain(kind) => Some(kind),
            Stored::Quantised(_) | Stored::Other { .. } => None,
        }
    }

    /// The tensor `name` (its Hugging Face name in the full model, such as
    /// "model.layers.0.self_attn.q_proj.weight"; the base model's prefix may be missing in the
    /// file). Shape as stored, converted to `kind`, on `device`, owning its memory.
    ///
    /// # Errors
    /// [`WeightsError::MissingTensor`], [`WeightsError::UnsupportedTensorType`],
    /// [`WeightsError::Tensor`].
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor, WeightsError> {
        match self.opened.entries.get(names::canonical(name)) {
            Some(entry) => read::tensor(&self.opened.files[entry.file], entry, kind, device),
            None => Err(self.missing(name)),
        }
    }

    /// Hex blake3 over the configuration fields that change numbers and each tensor's name, shape,
    /// type and some of its bytes. The same on both sides whatever layers they load; path, sharding
    /// and name prefix do not change it. Reads some pages of each tensor.
    pub fn fingerprint(&self) -> String {
        fingerprint::fingerprint(&self.opened.config, &self.opened.files, &self.opened.entries)
    }

    /// The tokenizer in a GGUF file's metadata, None for a directory.
    pub fn gguf_tokenizer(&self) -> Option<&GgufTokenizer> {
        self.opened.tokenizer.as_ref()
    }

    fn missing(&self, name: &str) -> WeightsError {
        let searched = match self.opened.files.as_slice() {
            [file] => file.path.display().to_string(),
            files => format!("{} files of {}", files.len(), self.path.display()),
        };
        let stored = self.opened.entries.values().map(|entry| &entry.name);
        let closest = names::closest(name, stored).cloned();
        WeightsError::MissingTensor { name: name.to_string(), searched, closest }
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("name", &self.name)
            .field("path", &self.path)
            .field("tensors", &self.opened.entries.len())
            .finish()
    }
}

/// A tokenizer as GGUF metadata holds it (`tokenizer.ggml.*`).
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: "gpt2" is byte-level BPE, "llama" is SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: names the rule that splits text before BPE.
    pub pre: String,
    /// The text of each token id.
    pub tokens: Vec<String>,
    /// llama.cpp's kind of each token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused,
    /// 6 byte. Empty where the file has none.
    pub token_types: Vec<i32>,
    /// BPE merges, "left right", best first.
    pub merges: Vec<String>,
    /// SentencePiece scores. Empty for BPE.
    pub scores: Vec<f32>,
    /// Begin of text.
    pub bos_token_id: Option<u32>,
    /// End of text.
    pub eos_token_id: Option<u32>,
    /// Whether text gets `bos_token_id` in front.
    pub add_bos_token: bool,
    /// Jinja source of the chat template.
    pub chat_template: Option<String>,
}

fn last_part(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let part = path.file_name().or(whole.file_name());
    part.map_or_else(|| path.display().to_string(), |part| part.to_string_lossy().into_owned())
}

/// The directory, or the GGUF file that `path` is or holds.
fn locate(path: &Path) -> Result<PathBuf, WeightsError> {
    if path.is_file() {
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        return if is_gguf { Ok(path.to_path_buf()) } else { Err(safetensors::not_a_model(path)) };
    }
    if path.join(safetensors::CONFIG).exists() {
        return Ok(path.to_path_buf());
    }
    let mut files = safetensors::list(path)?;
    files.retain(|file| file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")));
    match files.as_slice() {
        [file] => Ok(file.clone()),
        _ => Err(safetensors::not_a_model(path)),
    }
}
