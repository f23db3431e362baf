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
        "HF_HUB_OFFLINE is set, and {file} of the data set {name} is not in {}; fetch it once with a network, or give the texts as files with --train-file", cache.display()
    )]
    NotCached { name: String, file: String, cache: PathBuf },
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

/// The files of a data set that were asked for.
#[derive(Debug)]
pub(super) struct Fetched {
    /// They lie below it.
    pub dir: PathBuf,
    pub splits: Splits,
}

/// What is asked for.
pub(super) struct Request<'a> {
    pub name: &'a str,
    pub config: Option<&'a str>,
    /// The files of the splits that are read.
    pub wanted: &'a dyn Fn(&Splits) -> Result<Vec<String>, String>,
}

impl Request<'_> {
    fn choice(&self, problem: String) -> DataSetError {
        DataSetError::Choice { name: self.name.into(), problem }
    }
}

/// Fetches what is not there yet. When the hub cannot be reached, what was cached before is used,
/// with a warning.
pub(super) fn fetch(request: &Request, settings: &HubSettings) -> Result<Fetched, DataSetError> {
    if !is_name(request.name) {
        return Err(DataSetError::NotAName { name: request.name.into() });
    }
    if settings.offline {
        return cached(request, settings);
    }
    match Fetch::new(request, settings)?.all() {
        Err(DataSetError::Unreachable { name, endpoint, reason }) => {
            match cached(request, settings) {
                Ok(fetched) => {
                    tracing::warn!(name, endpoint, reason, "hub unreachable, using the cache");
                    Ok(fetched)
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

/// One commit of a data set, as far as it is fetched.
struct Snapshot {
    repo: Repo,
    dir: PathBuf,
    folder: Folder,
}

struct Fetch<'a> {
    request: &'a Request<'a>,
    settings: &'a HubSettings,
    api: Api,
}

impl<'a> Fetch<'a> {
    fn new(request: &'a Request<'a>, settings: &'a HubSettings) -> Result<Self, DataSetError> {
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .build()
            .map_err(|error| DataSetError::Failed {
                name: request.name.into(),
                file: CARD.into(),
                endpoint: settings.endpoint.clone(),
                reason: error.to_string(),
            })?;
        Ok(Fetch { request, settings, api })
    }

    fn all(&self) -> Result<Fetched, DataSetError> {
        let own = self.snapshot(MAIN)?;
        let own_splits = own.folder.splits(self.request.config);
        if let Some(splits) = own_splits.as_ref().ok().filter(|splits| !splits.is_empty()) {
            let wanted = (self.request.wanted)(splits).map_err(|p| self.request.choice(p))?;
            return self.files(&own, &wanted).and_then(|dir| {
                let splits = own_splits.map_err(|problem| self.request.choice(problem))?;
                Ok(Fetched { dir, splits })
            });
        }
        let converted = match (self.snapshot(CONVERTED), own_splits) {
            (Ok(converted), _) => converted,
            (Err(DataSetError::NotFound { name, .. }), Ok(_)) => {
                return Err(DataSetError::NoData { name });
            }
            (Err(DataSetError::NotFound { .. }), Err(problem)) => {
                return Err(self.request.choice(problem));
            }
            (Err(error), _) => return Err(error),
        };
        let splits = converted.folder.splits(self.request.config);
        let splits = splits.map_err(|problem| self.request.choice(problem))?;
        let wanted = (self.request.wanted)(&splits).map_err(|p| self.request.choice(p))?;
        Ok(Fetched { dir: self.files(&converted, &wanted)?, splits })
    }

    /// What the hub has at a revision, with the card's text.
    fn snapshot(&self, revision: &str) -> Result<Snapshot, DataSetError> {
        let repo =
            Repo::with_revision(self.request.name.into(), RepoType::Dataset, revision.into());
        let what = format!("the list of files ({revision})");
        let mut answer =
            self.api.repo(repo).info_request().call().map_err(|error| self.failed(&what, error))?;
        let info: Info =
            answer.body_mut().read_json().map_err(|error| self.failed(&what, error))?;
        let repo = Repo::with_revision(info.id, RepoType::Dataset, revision.into());
        let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let cache = Cache::new(self.settings.cache.clone());
        let dir = cache.repo(repo.clone()).pointer_path(&info.sha);
        self.list(&self.settings.cache.join(repo.folder_name()), &info.sha, &files)?;
        let converted = revision == CONVERTED;
        let has_card = files.iter().any(|file| file == CARD) && !converted;
        let mut snapshot = Snapshot { repo, dir, folder: Folder { files, card: None, converted } };
        if has_card {
            self.file(&snapshot, CARD)?;
            snapshot.folder.card = fs::read_to_string(snapshot.dir.join(CARD)).ok();
        }
        Ok(snapshot)
    }

    fn list(&self, repo: &Path, sha: &str, files: &[String]) -> Result<(), DataSetError> {
        let dir = repo.join(LISTINGS);
        let written =
            fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join(sha), files.join("\n")));
        written.map_err(|error| DataSetError::Failed {
            name: self.request.name.into(),
            file: "the list of files".into(),
            endpoint: self.settings.endpoint.clone(),
            reason: format!("cannot write to {}: {error}", dir.display()),
        })
    }

    fn files(&self, snapshot: &Snapshot, files: &[String]) -> Result<PathBuf, DataSetError> {
        for file in files {
            self.file(snapshot, file)?;
        }
        Ok(snapshot.dir.clone())
    }

    fn file(&self, snapshot: &Snapshot, file: &str) -> Result<(), DataSetError> {
        if snapshot.dir.join(file).exists() {
            return Ok(());
        }
        let repo = self.api.repo(snapshot.repo.clone());
        let path = repo
            .download_with_progress(file, Shown::new(self.request.name))
            .map_err(|error| self.failed_api(file, error))?;
        if path != snapshot.dir.join(file) {
            return Err(
                self.other(file, "the data set was changed on the hub meanwhile; try again")
            );
        }
        Ok(())
    }

    fn other(&self, file: &str, reason: &str) -> DataSetError {
        DataSetError::Failed {
            name: self.request.name.into(),
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
        let (name, endpoint) = (self.request.name.into(), self.settings.endpoint.clone());
        DataSetError::Unreachable { name, endpoint, reason }
    }

    /// Tells the cases apart in which the user can do different things.
    fn failed(&self, file: &str, error: ureq::Error) -> DataSetError {
        let (name, endpoint) = (self.request.name.to_string(), self.settings.endpoint.clone());
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
fn cached(request: &Request, settings: &HubSettings) -> Result<Fetched, DataSetError> {
    let missing = |file: &str| DataSetError::NotCached {
        name: request.name.into(),
        file: file.into(),
        cache: settings.cache.clone(),
    };
    let repo = cached_repo(request.name, &settings.cache).ok_or_else(|| missing("any file"))?;
    let mut problem = None;
    for revision in [MAIN, CONVERTED] {
        let Ok(sha) = fs::read_to_string(repo.join("refs").join(revision)) else { continue };
        let dir = repo.join("snapshots").join(sha.trim());
        let files = match fs::read_to_string(repo.join(LISTINGS).join(sha.trim())) {
            Ok(listing) => listing.lines().map(String::from).collect(),
            // Fetched by another tool.
            Err(_) => files_below(&dir).map_err(|_| missing("any file"))?,
        };
        let card = fs::read_to_string(dir.join(CARD)).ok().filter(|_| revision == MAIN);
        let folder = Folder { files, card, converted: revision == CONVERTED };
        let splits = match folder.splits(request.config) {
            Ok(splits) if splits.is_empty() => continue,
            Ok(splits) => splits,
            Err(error) => {
                problem = problem.or(Some(error));
                continue;
            }
        };
        let wanted = (request.wanted)(&splits).map_err(|problem| request.choice(problem))?;
        return match wanted.iter().find(|file| !dir.join(file).exists()) {
            Some(file) => Err(missing(file)),
            None => Ok(Fetched { dir, splits }),
        };
    }
    Err(problem.map_or_else(|| missing("any file"), |problem| request.choice(problem)))
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
