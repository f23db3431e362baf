//! What can go wrong between a model's name and its tensors.

use std::path::PathBuf;

/// Why a model could not be found, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a path that exists nor a name the hub could know.
    #[error("{name}: no such file or directory, and not a hub name (OWNER/NAME, or NAME)")]
    NotFound {
        /// The name as given.
        name: String,
    },
    /// The path exists but holds no model that can be read.
    #[error("{} is not a model: expected {expected}; found {found}", path.display())]
    NotAModel {
        /// The path as given.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
        /// What is there instead.
        found: String,
    },
    /// The file's header speaks of bytes that the file does not have.
    #[error(
        "{}: needs {needed} bytes, has {actual}; the download was cut off? fetch it again",
        file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Its length by its own header; at least this where the header itself is cut off.
        needed: u64,
        /// Its length on disk.
        actual: u64,
    },
    /// The file is not what its name says.
    #[error("{}: not a readable {format} file: {reason}", file.display())]
    BadFile {
        /// The file.
        file: PathBuf,
        /// "safetensors", "GGUF" or "JSON".
        format: &'static str,
        /// What the reader said.
        reason: String,
    },
    /// `model.safetensors.index.json` and the files beside it do not fit.
    #[error(
        "{}: {reason}; the index and the files beside it must come from one download, fetch them again",
        index.display()
    )]
    BadIndex {
        /// The index file.
        index: PathBuf,
        /// What does not fit, with the shard's name.
        reason: String,
    },
    /// No tensor of this name, with or without the base model's prefix.
    #[error("no tensor {name} in {searched}{}", closest_hint(closest))]
    MissingTensor {
        /// The full name that was asked for.
        name: String,
        /// The file or files that were searched.
        searched: String,
        /// The most similar name that exists.
        closest: Option<String>,
    },
    /// A storage type that cannot be converted.
    #[error("{}: {} is stored as {found}, which is not supported; known: {known}", file.display(), tensor.as_deref().unwrap_or("a tensor"))]
    UnsupportedTensorType {
        /// The file.
        file: PathBuf,
        /// The tensor, where the reader knows it.
        tensor: Option<String>,
        /// The type's name, and its number where it has one.
        found: String,
        /// The types that can be read.
        known: &'static str,
    },
    /// A GGUF file of a model family that has no mapping to Hugging Face names here.
    #[error("{}: GGUF architecture {found:?} is not known; known: {known}", file.display())]
    UnknownArchitecture {
        /// The file.
        file: PathBuf,
        /// `general.architecture`.
        found: String,
        /// The architectures that can be read.
        known: String,
    },
    /// A field of the GGUF metadata is missing or has an unusable value.
    #[error("{}: GGUF metadata {key}: expected {expected}, found {found}", file.display())]
    BadMetadata {
        /// The file.
        file: PathBuf,
        /// The metadata key.
        key: String,
        /// What the reader needs.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// The hub knows no such model or file.
    #[error(
        "{name}: no such path, and the hub at {endpoint} has no file {file} of this model (404); is the name right? HF_ENDPOINT chooses the hub"
    )]
    HubNotFound {
        /// OWNER/NAME.
        name: String,
        /// The file that was asked for.
        file: String,
        /// The hub's address.
        endpoint: String,
    },
    /// The hub refuses this caller. It also answers so for names that do not exist.
    #[error(
        "{name}: no such path, and the hub at {endpoint} refused access ({status}); the name is wrong, or the model is private or gated: {}",
        if *with_token { "ask its owner for access, or check the token in HF_TOKEN" } else { "set HF_TOKEN" }
    )]
    HubDenied {
        /// OWNER/NAME.
        name: String,
        /// The hub's address.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// No answer from the hub.
    #[error(
        "{name}: no such path, and cannot reach the hub at {endpoint}: {reason}; check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use only what is cached, or give a path"
    )]
    HubUnreachable {
        /// OWNER/NAME.
        name: String,
        /// The hub's address.
        endpoint: String,
        /// What the connection said.
        reason: String,
    },
    /// The hub answered something that cannot be used.
    #[error("{name}: fetching {file} from the hub at {endpoint} failed: {reason}")]
    HubFailed {
        /// OWNER/NAME.
        name: String,
        /// The file that was asked for.
        file: String,
        /// The hub's address.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// Offline, and the cache lacks a file.
    #[error(
        "{name}: HF_HUB_OFFLINE is set and {file} is not in the cache {}; fetch the model once without it",
        cache.display()
    )]
    NotCached {
        /// OWNER/NAME.
        name: String,
        /// The file that is missing.
        file: String,
        /// The cache directory.
        cache: PathBuf,
    },
    /// libtorch could not make the tensor, mostly for lack of memory on the device.
    #[error("{name}: cannot make the tensor: {source}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What libtorch said.
        source: Box<tch::TchError>,
    },
}

fn closest_hint(closest: &Option<String>) -> String {
    match closest {
        Some(name) => format!("; the closest name there is {name}"),
        None => "; there are no tensors at all".into(),
    }
}
