//! Models by hub name: fetched with hf-hub into the cache that all Hugging Face tools share.

use super::WeightsError;
use super::safetensors::{CONFIG, INDEX, SINGLE, read_index};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Fetched where the model has them.
const OPTIONAL: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
/// A download that breaks off is taken up again this many times.
const RETRIES: usize = 3;
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Which hub, which cache, and who asks.
#[derive(Clone)]
pub struct HubSettings {
    /// The hub's address (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The directory of `models--OWNER--NAME` (`HF_HUB_CACHE`, or `hub` in `HF_HOME`).
    pub cache: PathBuf,
    /// For private and gated models (`HF_TOKEN`, or the file `token` in `HF_HOME`).
    pub token: Option<String>,
    /// Never ask the hub (`HF_HUB_OFFLINE`).
    pub offline: bool,
}

/// The token is not shown.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish()
    }
}

impl HubSettings {
    /// From `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH` and
    /// `HF_HUB_OFFLINE`, with the meaning and defaults of the Python package huggingface_hub.
    pub fn from_env() -> HubSettings {
        HubSettings::from_vars(|name| std::env::var(name).ok())
    }

    fn from_vars(get: impl Fn(&str) -> Option<String>) -> HubSettings {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let user_cache = || match get("XDG_CACHE_HOME") {
            Some(dir) => PathBuf::from(dir),
            None => PathBuf::from(get("HOME").unwrap_or_else(|| ".".into())).join(".cache"),
        };
        let home = get("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from);
        let token_file = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = get("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        HubSettings {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            offline: get("HF_HUB_OFFLINE").is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
            }),
        }
    }
}

/// Whether `name` can be a hub name: OWNER/NAME, or one of the old ones without an owner, such as
/// gpt2, which the hub redirects; and not a path to a file.
pub(super) fn is_hub_name(name: &str) -> bool {
    let good = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let is_file = name.ends_with(".gguf") || name.ends_with(".safetensors");
    !is_file && name.split('/').count() <= 2 && name.split('/').all(good)
}

/// The directory of the model's files in the cache, after fetching what is not there yet. When
/// the hub cannot be reached, what was cached before is used, with a warning.
pub(super) fn fetch(name: &str, settings: &HubSettings) -> Result<PathBuf, WeightsError> {
    if settings.offline {
        return cached(name, settings);
    }
    match download(name, settings) {
        Err(WeightsError::HubUnreachable { name, endpoint, reason }) => {
            match cached(&name, settings) {
                Ok(dir) => {
                    tracing::warn!(name, endpoint, reason, "hub unreachable, using the cache");
                    Ok(dir)
                }
                Err(_) => Err(WeightsError::HubUnreachable { name, endpoint, reason }),
            }
        }
        result => result,
    }
}

/// The same for `config.json` alone: where it is in the cache.
pub(super) fn fetch_config(name: &str, settings: &HubSettings) -> Result<PathBuf, WeightsError> {
    let known = cached_config(name, settings);
    if settings.offline {
        return known;
    }
    match repo(name, settings).and_then(|repo| get(&repo, name, CONFIG, settings)) {
        Err(error @ WeightsError::HubUnreachable { .. }) => known.map_err(|_| error),
        result => result,
    }
}

fn missing(name: &str, file: &str, settings: &HubSettings) -> WeightsError {
    let (name, file, cache) = (name.into(), file.into(), settings.cache.clone());
    WeightsError::NotCached { name, file, cache }
}

fn cached_config(name: &str, settings: &HubSettings) -> Result<PathBuf, WeightsError> {
    let cache = Cache::new(settings.cache.clone()).repo(Repo::model(name.into()));
    cache.get(CONFIG).ok_or_else(|| missing(name, CONFIG, settings))
}

/// The current snapshot in the cache, if it is whole.
fn cached(name: &str, settings: &HubSettings) -> Result<PathBuf, WeightsError> {
    let missing = |file: &str| missing(name, file, settings);
    let config = cached_config(name, settings)?;
    let dir = config.parent().ok_or_else(|| missing(CONFIG))?;
    let weights = match dir.join(INDEX).exists() {
        true => read_index(&dir.join(INDEX))?.into_values().collect(),
        false => BTreeSet::from([SINGLE.to_string()]),
    };
    match weights.iter().find(|file| !dir.join(file).exists()) {
        Some(file) => Err(missing(file)),
        None => Ok(dir.to_path_buf()),
    }
}

fn repo(name: &str, settings: &HubSettings) -> Result<ApiRepo, WeightsError> {
    let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_progress(false)
        .with_retries(RETRIES)
        .build()
        .map_err(|error| failed(name, CONFIG, settings, error))?;
    Ok(api.repo(Repo::model(name.into())))
}

fn download(name: &str, settings: &HubSettings) -> Result<PathBuf, WeightsError> {
    let repo = repo(name, settings)?;
    // The configuration is always asked for: its answer says which commit is the current one.
    let config = get(&repo, name, CONFIG, settings)?;
    let dir = config.parent().unwrap_or(Path::new(".")).to_path_buf();
    let fetch = Fetch { repo, name, settings, dir };
    for file in OPTIONAL {
        fetch.optional(file)?;
    }
    if fetch.optional(INDEX)? {
        let index = read_index(&fetch.dir.join(INDEX))?;
        for shard in index.values().collect::<BTreeSet<_>>() {
            fetch.required(shard)?;
        }
    } else {
        fetch.required(SINGLE)?;
    }
    Ok(fetch.dir)
}

/// One model being fetched: all files of one commit, into one directory.
struct Fetch<'a> {
    repo: ApiRepo,
    name: &'a str,
    settings: &'a HubSettings,
    dir: PathBuf,
}

impl Fetch<'_> {
    fn required(&self, file: &str) -> Result<(), WeightsError> {
        if self.dir.join(file).exists() {
            return Ok(());
        }
        let path = get(&self.repo, self.name, file, self.settings)?;
        if path.parent() != Some(&self.dir) {
            return Err(WeightsError::HubFailed {
                name: self.name.into(),
                file: file.into(),
                endpoint: self.settings.endpoint.clone(),
                reason: "the model was changed on the hub meanwhile; try again".into(),
            });
        }
        Ok(())
    }

    /// False if the hub has no such file.
    fn optional(&self, file: &str) -> Result<bool, WeightsError> {
        match self.required(file) {
            Ok(()) => Ok(true),
            Err(WeightsError::HubNotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn get(
    repo: &ApiRepo,
    name: &str,
    file: &str,
    settings: &HubSettings,
) -> Result<PathBuf, WeightsError> {
    repo.download_with_progress(file, LogProgress::new(name))
        .map_err(|error| failed(name, file, settings, error))
}

/// Tells the cases apart in which the user can do different things.
fn failed(name: &str, file: &str, settings: &HubSettings, error: ApiError) -> WeightsError {
    let (name, file, endpoint) = (name.to_string(), file.to_string(), settings.endpoint.clone());
    let reason = error.to_string();
    match error {
        ApiError::TooManyRetries(_) => WeightsError::HubUnreachable { name, endpoint, reason },
        ApiError::RequestError(error) => match *error {
            ureq::Error::StatusCode(404) => WeightsError::HubNotFound { name, file, endpoint },
            ureq::Error::StatusCode(status @ (401 | 403)) => {
                let with_token = settings.token.is_some();
                WeightsError::HubDenied { name, endpoint, status, with_token }
            }
            ureq::Error::StatusCode(status) => {
                let reason = format!("it answered with status {status}; try again later");
                WeightsError::HubFailed { name, file, endpoint, reason }
            }
            _ => WeightsError::HubUnreachable { name, endpoint, reason },
        },
        _ => WeightsError::HubFailed { name, file, endpoint, reason },
    }
}

/// Logs what is being fetched, and every few seconds how far it is.
struct LogProgress {
    name: String,
    file: String,
    total_bytes: usize,
    done_bytes: usize,
    logged: Instant,
}

impl LogProgress {
    fn new(name: &str) -> Self {
        LogProgress {
            name: name.into(),
            file: String::new(),
            total_bytes: 0,
            done_bytes: 0,
            logged: Instant::now(),
        }
    }
}

impl Progress for LogProgress {
    /// Called twice for each file, and once more for each retry.
    fn init(&mut self, size: usize, filename: &str) {
        if self.file != filename {
            self.file = filename.into();
            tracing::info!(name = self.name, file = filename, bytes = size, "fetching");
        }
        self.total_bytes = size;
        self.done_bytes = 0;
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size;
        if self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            let percent = 100 * self.done_bytes / self.total_bytes.max(1);
            tracing::info!(name = self.name, file = self.file, percent, "fetching");
        }
    }

    fn finish(&mut self) {
        tracing::debug!(name = self.name, file = self.file, bytes = self.done_bytes, "fetched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names_are_names_with_or_without_an_owner() {
        for good in ["HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "o_1/x.y-z", "gpt2"] {
            assert!(is_hub_name(good), "{good}");
        }
        for bad in
            ["./model", "/model", "a/b/c", "a/", "/b", "../x", "~/m", "d/m.gguf", "a b/c", ""]
        {
            assert!(!is_hub_name(bad), "{bad}");
        }
    }

    #[test]
    fn settings_follow_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let settings = HubSettings::from_vars(|name| match name {
            "HF_HOME" => Some(home.into()),
            "HF_ENDPOINT" => Some("http://mirror/".into()),
            "HF_HUB_OFFLINE" => Some("true".into()),
            _ => None,
        });
        assert_eq!(settings.endpoint, "http://mirror");
        assert_eq!(settings.cache, dir.path().join("hub"));
        assert_eq!(settings.token.as_deref(), Some("from-file"));
        assert!(settings.offline);
        assert!(!format!("{settings:?}").contains("from-file"));

        let settings = HubSettings::from_vars(|name| match name {
            "HOME" => Some("/home/x".into()),
            "HF_TOKEN" => Some("from-variable".into()),
            "HF_HUB_OFFLINE" => Some("0".into()),
            _ => None,
        });
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(settings.cache, Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!(settings.token.as_deref(), Some("from-variable"));
        assert!(!settings.offline);
    }
}
