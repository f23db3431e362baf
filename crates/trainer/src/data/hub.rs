//! Data sets of the hub, fetched with hf-hub into the cache that all Hugging Face tools share.
//!
//! First the repository's own files, as its card or their names sort them into configs and splits.
//! Where none of them can be read (a data set made by a script, an archive), the Parquet files that
//! the hub converts every public data set to, on the branch `refs/convert/parquet`.

use super::read::{Folder, Splits, files_below};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use offshoot_model::weights::HubSettings;
use progress::Shown;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

mod progress;

/// A download that breaks off is taken up again this many times.
const RETRIES: usize = 3;
const CARD: &str = "README.md";
const MAIN: &str = "main";
const CONVERTED: &str = "refs/convert/parquet";
/// Folder beside a repository's snapshots: which files each has, those that were never fetched
/// included, so that a run without the hub knows what is missing.
const LISTINGS: &str = ".offshoot";

/// Why a data set cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataSetError {
    #[error(
        "--dataset-name {name}: there is no such file or folder, and a data set of the hub is called NAME or OWNER/NAME"
    )]
    NotAName { name: String },
    #[error(
        "the data set {name} is not on {endpoint}. Check the name, which is OWNER/NAME for most; a private one needs HF_TOKEN. Texts in files of your own are named with --train-file"
    )]
    NotFound { name: String, endpoint: String },
    #[error(
        "{endpoint} does not give out the data set {name} (status {status}): {}",
        match with_token {
            true => "check the token in HF_TOKEN, and whether the data set's conditions were accepted on its page",
            false => "it is private, or has conditions to be accepted on its page; set HF_TOKEN",
        }
    )]
    Denied { name: String, endpoint: String, status: u16, with_token: bool },
    #[error(
        "cannot reach {endpoint} for the data set {name} ({reason}). Check network and proxy, or HF_ENDPOINT for a mirror; without a network, fetch it elsewhere, copy the folder of HF_HOME and set HF_HUB_OFFLINE=1, or give the texts as files with --train-file"
    )]
    Unreachable { name: String, endpoint: String, reason: String },
    #[error(
        "HF_HUB_OFFLINE is set, and {} of the data set {name} {} in {}; fetch it once with a network, or give the texts as files with --train-file",
        file.as_deref().unwrap_or("no file"),
        if file.is_some() { "is not" } else { "is" },
        cache.display()
    )]
    NotCached { name: String, file: Option<String>, cache: PathBuf },
    #[error("fetching {file} of the data set {name} from {endpoint} failed: {reason}")]
    Failed { name: String, file: String, endpoint: String, reason: String },
    #[error(
        "the data set {name} has no file that can be read (expected names ending with {}), and the hub has no conversion of it to Parquet; write its texts to a file and name that with --train-file",
        super::read::Format::endings()
    )]
    NoData { name: String },
    /// A config or split that is not there, or has to be chosen.
    #[error("the data set {name}: {problem}")]
    Choice { name: String, problem: String },
}

/// A data set that is known: its files may still have to be fetched.
pub(super) struct Found {
    pub splits: Splits,
    pub snapshot: Snapshot,
}

/// Looks a data set up. When the hub cannot be reached, what was cached before is used, with a
/// warning.
pub(super) fn find(
    name: &str,
    config: Option<&str>,
    settings: &HubSettings,
) -> Result<Found, DataSetError> {
    if !is_name(name) {
        return Err(DataSetError::NotAName { name: name.into() });
    }
    if settings.offline {
        return cached(name, config, settings);
    }
    match Hub::new(name, settings)?.find(config) {
        Err(DataSetError::Unreachable { name, endpoint, reason }) => {
            match cached(&name, config, settings) {
                Ok(found) => {
                    tracing::warn!(name, endpoint, reason, "hub unreachable, using the cache");
                    Ok(found)
                }
                Err(_) => Err(DataSetError::Unreachable { name, endpoint, reason }),
            }
        }
        result => result,
    }
}

/// NAME or OWNER/NAME, and not a path to a file.
fn is_name(name: &str) -> bool {
    let good = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let parts: Vec<_> = name.split('/').collect();
    let is_file = super::read::Format::of_name(name).is_some();
    !is_file && parts.len() <= 2 && parts.into_iter().all(good)
}

/// A repository as the hub describes it.
#[derive(Deserialize)]
struct Info {
    /// OWNER/NAME; a short name such as wikitext leads there.
    id: String,
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// One commit of a data set.
pub(super) struct Snapshot {
    /// None without a network.
    hub: Option<(Hub, Repo)>,
    name: String,
    cache: PathBuf,
    /// The files lie below it.
    dir: PathBuf,
}

impl Snapshot {
    /// The file's place, after fetching it if it is not there yet.
    pub fn file(&self, file: &str) -> Result<PathBuf, DataSetError> {
        let path = self.dir.join(file);
        if !path.exists() {
            let (hub, repo) = self.hub.as_ref().ok_or_else(|| DataSetError::NotCached {
                name: self.name.clone(),
                file: Some(file.into()),
                cache: self.cache.clone(),
            })?;
            hub.fetch(repo, file, &path)?;
        }
        Ok(path)
    }

    /// Names the commit.
    pub fn commit(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn choice(&self, problem: String) -> DataSetError {
        DataSetError::Choice { name: self.name.clone(), problem }
    }
}

/// The hub, asked for one data set.
#[derive(Clone)]
struct Hub {
    name: String,
    settings: HubSettings,
    api: Api,
}

impl Hub {
    fn new(name: &str, settings: &HubSettings) -> Result<Self, DataSetError> {
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .build()
            .map_err(|error| DataSetError::Failed {
                name: name.into(),
                file: CARD.into(),
                endpoint: settings.endpoint.clone(),
                reason: error.to_string(),
            })?;
        Ok(Hub { name: name.into(), settings: settings.clone(), api })
    }

    fn find(&self, config: Option<&str>) -> Result<Found, DataSetError> {
        let (snapshot, folder) = self.snapshot(MAIN)?;
        let own = folder.splits(config);
        let problem = match own {
            Ok(splits) if !splits.is_empty() => return Ok(Found { splits, snapshot }),
            own => own.err(),
        };
        let (snapshot, folder) = match (self.snapshot(CONVERTED), problem) {
            (Ok(converted), _) => converted,
            (Err(DataSetError::NotFound { name, .. }), None) => {
                return Err(DataSetError::NoData { name });
            }
            (Err(DataSetError::NotFound { .. }), Some(problem)) => {
                return Err(snapshot.choice(problem));
            }
            (Err(error), _) => return Err(error),
        };
        let splits = folder.splits(config).map_err(|problem| snapshot.choice(problem))?;
        Ok(Found { splits, snapshot })
    }

    /// What the hub has at a revision, with the card's text.
    fn snapshot(&self, revision: &str) -> Result<(Snapshot, Folder), DataSetError> {
        let dataset = |name| Repo::with_revision(name, RepoType::Dataset, revision.into());
        let what = format!("the list of files ({revision})");
        let request = self.api.repo(dataset(self.name.clone())).info_request();
        let mut answer = request.call().map_err(|error| self.failed(&what, error))?;
        let info: Info =
            answer.body_mut().read_json().map_err(|error| self.failed(&what, error))?;
        let repo = dataset(info.id);
        let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let dir =
            Cache::new(self.settings.cache.clone()).repo(repo.clone()).pointer_path(&info.sha);
        self.list(&self.settings.cache.join(repo.folder_name()), &info.sha, &files)?;
        let snapshot = Snapshot {
            hub: Some((self.clone(), repo)),
            name: self.name.clone(),
            cache: self.settings.cache.clone(),
            dir,
        };
        let converted = revision == CONVERTED;
        let card = match files.iter().any(|file| file == CARD) && !converted {
            true => fs::read_to_string(snapshot.file(CARD)?).ok(),
            false => None,
        };
        Ok((snapshot, Folder { files, card, converted }))
    }

    fn list(&self, repo: &Path, sha: &str, files: &[String]) -> Result<(), DataSetError> {
        let dir = repo.join(LISTINGS);
        let written =
            fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join(sha), files.join("\n")));
        let problem = |error| format!("cannot write to {}: {error}", dir.display());
        written.map_err(|error| self.other("the list of files", &problem(error)))
    }

    fn fetch(&self, repo: &Repo, file: &str, expected: &Path) -> Result<(), DataSetError> {
        let path = self
            .api
            .repo(repo.clone())
            .download_with_progress(file, Shown::new(&self.name))
            .map_err(|error| self.failed_api(file, error))?;
        if path != expected {
            return Err(
                self.other(file, "the data set was changed on the hub meanwhile; try again")
            );
        }
        Ok(())
    }

    fn other(&self, file: &str, reason: &str) -> DataSetError {
        DataSetError::Failed {
            name: self.name.clone(),
            file: file.into(),
            endpoint: self.settings.endpoint.clone(),
            reason: reason.into(),
        }
    }

    fn failed_api(&self, file: &str, error: ApiError) -> DataSetError {
        match error {
            ApiError::RequestError(error) => self.failed(file, *error),
            ApiError::TooManyRetries(_) => self.unreachable(error.to_string()),
            _ => self.other(file, &error.to_string()),
        }
    }

    fn unreachable(&self, reason: String) -> DataSetError {
        let (name, endpoint) = (self.name.clone(), self.settings.endpoint.clone());
        DataSetError::Unreachable { name, endpoint, reason }
    }

    /// Tells the cases apart in which the user can do different things.
    fn failed(&self, file: &str, error: ureq::Error) -> DataSetError {
        let (name, endpoint) = (self.name.clone(), self.settings.endpoint.clone());
        match error {
            ureq::Error::StatusCode(404) => DataSetError::NotFound { name, endpoint },
            ureq::Error::StatusCode(status @ (401 | 403)) => {
                let with_token = self.settings.token.is_some();
                DataSetError::Denied { name, endpoint, status, with_token }
            }
            ureq::Error::StatusCode(status) => {
                self.other(file, &format!("it answered with status {status}; try again later"))
            }
            ureq::Error::Json(error) => {
                self.other(file, &format!("the answer is not what a hub sends ({error})"))
            }
            error => self.unreachable(error.to_string()),
        }
    }
}

/// The same from the cache alone.
fn cached(name: &str, config: Option<&str>, settings: &HubSettings) -> Result<Found, DataSetError> {
    let cache = &settings.cache;
    let nothing =
        || DataSetError::NotCached { name: name.into(), file: None, cache: cache.clone() };
    let repo = cached_repo(name, cache).ok_or_else(nothing)?;
    let mut problem = None;
    for revision in [MAIN, CONVERTED] {
        let Ok(sha) = fs::read_to_string(repo.join("refs").join(revision)) else { continue };
        let dir = repo.join("snapshots").join(sha.trim());
        let files = match fs::read_to_string(repo.join(LISTINGS).join(sha.trim())) {
            Ok(listing) => listing.lines().map(String::from).collect(),
            // Fetched by another tool.
            Err(_) => files_below(&dir).map_err(|_| nothing())?,
        };
        let card = fs::read_to_string(dir.join(CARD)).ok().filter(|_| revision == MAIN);
        let folder = Folder { files, card, converted: revision == CONVERTED };
        let snapshot = Snapshot { hub: None, name: name.into(), cache: cache.clone(), dir };
        match folder.splits(config) {
            Ok(splits) if splits.is_empty() => {}
            Ok(splits) => return Ok(Found { splits, snapshot }),
            Err(error) => problem = problem.or(Some(snapshot.choice(error))),
        }
    }
    Err(problem.unwrap_or_else(nothing))
}

/// The repository's folder in the cache; a short name leads to the only owner that has one.
fn cached_repo(name: &str, cache: &Path) -> Option<PathBuf> {
    let exact = cache.join(Repo::new(name.into(), RepoType::Dataset).folder_name());
    if exact.is_dir() {
        return Some(exact);
    }
    let ending = format!("--{name}");
    let entries = fs::read_dir(cache).ok()?.filter_map(Result::ok).map(|entry| entry.path());
    let mut found = entries.filter(|path| {
        let folder = path.file_name().unwrap_or_default().to_string_lossy();
        folder.starts_with("datasets--") && folder.ends_with(&ending)
    });
    let first = found.next();
    first.filter(|_| found.next().is_none() && !name.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_no_paths() {
        for good in ["wikitext", "Salesforce/wikitext", "a/b.c-d_e"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["./data", "/data", "a/b/c", "a/", "~/x", "texts.jsonl", "d/t.csv.gz", "a b", ""]
        {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
