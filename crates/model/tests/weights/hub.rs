//! A hub on loopback: what hf-hub asks of huggingface.co, for one directory of files.

use crate::*;
use offshoot_model::weights::{
    Checkpoint, HubSettings, WeightsError, find_config, find_config_with,
};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

const NAME: &str = "offshoot-test/tiny-llama";
/// What it was called before models had owners: the hub sends the caller on.
const OLD_NAME: &str = "tiny-llama";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_test";

/// One request as the hub saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    token: Option<String>,
}

struct Hub {
    endpoint: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Hub {
    /// Serves `files` as the model [`NAME`] until the test's process ends. Weights are redirected
    /// to another path, as the real hub does with large files. With `status`, that is every answer.
    fn start(files: PathBuf, status: Option<u16>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(vec![]));
        let (log, own) = (seen.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &own, status, &log);
            }
        });
        Hub { endpoint, seen }
    }

    fn settings(&self, cache: &Path) -> HubSettings {
        HubSettings {
            endpoint: self.endpoint.clone(),
            cache: cache.to_path_buf(),
            token: Some(TOKEN.into()),
            offline: false,
        }
    }

    /// The paths asked for so far; forgets them.
    fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn answer(
    stream: TcpStream,
    files: &Path,
    endpoint: &str,
    status: Option<u16>,
    log: &Mutex<Vec<Seen>>,
) {
    let mut reader = BufReader::new(stream);
    let mut lines = vec![];
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let Some(path) = lines.first().and_then(|line| line.split(' ').nth(1)) else { return };
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_string())
        })
    };
    log.lock().unwrap().push(Seen { path: path.to_string(), token: header("authorization") });
    let file = path
        .strip_prefix(&format!("/{NAME}/resolve/main/"))
        .or(path.strip_prefix("/blobs/"))
        .map(|file| files.join(file));
    let mut out = reader.into_inner();
    let mut send = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nX-Repo-Commit: {COMMIT}\r\n\
             Connection: close\r\n{headers}\r\n"
        );
        // The client may hang up early: it wants the headers only.
        let _ = out.write_all(&[head.as_bytes(), body].concat());
    };
    if let Some(file) = path.strip_prefix(&format!("/{OLD_NAME}/")) {
        let location = format!("Location: /{NAME}/{file}\r\n");
        return send("307 Temporary Redirect", &location, b"");
    }
    let body = file.as_ref().and_then(|file| std::fs::read(file).ok());
    match (status, body) {
        (Some(status), _) => send(&format!("{status} Refused"), "", b""),
        (None, None) => send("404 Not Found", "", b"Entry not found"),
        (None, Some(_)) if path.ends_with(".safetensors") && !path.starts_with("/blobs/") => {
            let name = path.rsplit('/').next().unwrap();
            let headers =
                format!("X-Linked-Etag: \"{name}-1\"\r\nLocation: {endpoint}/blobs/{name}\r\n");
            send("302 Found", &headers, b"");
        }
        (None, Some(body)) => {
            let range = header("range").unwrap_or_else(|| "bytes=0-".into());
            let (from, to) = range.trim_start_matches("bytes=").split_once('-').unwrap();
            let from: usize = from.parse().unwrap();
            let to = to.parse::<usize>().map_or(body.len(), |to| (to + 1).min(body.len()));
            let name = path.rsplit('/').next().unwrap();
            let headers = format!(
                "ETag: \"{name}-1\"\r\nContent-Range: bytes {from}-{}/{}\r\n",
                to - 1,
                body.len()
            );
            send("206 Partial Content", &headers, &body[from..to]);
        }
    }
}

/// The files of a model with two shards and a tokenizer, as the hub has them.
fn model_files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_sharded(dir.path(), &tiny_config(), &prefixed("model.", &tiny_tensors()), 2);
    std::fs::write(dir.path().join("tokenizer.json"), "{\"tiny\":true}").unwrap();
    dir
}

#[test]
fn hub_model_is_fetched_once_and_works_offline() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_path_buf(), None);
    let settings = hub.settings(cache.path());
    let checkpoint = Checkpoint::find_with(NAME, &settings).unwrap();
    assert_eq!(checkpoint.name(), NAME);
    assert!(checkpoint.path().ends_with(format!("snapshots/{COMMIT}")));
    for (name, _, values) in tiny_tensors() {
        let tensor = checkpoint.tensor(&name, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(floats(&tensor), values, "{name}");
    }
    let tokenizer = std::fs::read_to_string(checkpoint.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer, "{\"tiny\":true}");
    assert!(!checkpoint.path().join("tokenizer_config.json").exists());
    let direct = Checkpoint::open(files.path()).unwrap();
    assert_eq!(checkpoint.fingerprint(), direct.fingerprint());

    let seen = hub.take_seen();
    let sent = format!("Bearer {TOKEN}");
    assert!(seen.iter().all(|seen| seen.token.as_deref() == Some(&sent)), "{seen:?}");
    assert!(seen.iter().any(|seen| seen.path.starts_with("/blobs/")));
    assert!(!seen.iter().any(|seen| seen.path.ends_with("/model.safetensors")), "{seen:?}");

    // Again: the configuration says that nothing changed, no weights travel.
    Checkpoint::find_with(NAME, &settings).unwrap();
    assert!(!hub.take_seen().iter().any(|seen| seen.path.ends_with(".safetensors")));

    let offline = HubSettings { offline: true, ..settings.clone() };
    let again = Checkpoint::find_with(NAME, &offline).unwrap();
    assert_eq!((again.name(), again.path()), (NAME, checkpoint.path()));
    assert!(hub.take_seen().is_empty());

    // No hub at all: what is cached is used.
    let gone = HubSettings { endpoint: closed_endpoint(), ..settings };
    assert_eq!(Checkpoint::find_with(NAME, &gone).unwrap().path(), checkpoint.path());
}

#[test]
fn a_configuration_comes_without_the_weights() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_path_buf(), None);
    let settings = hub.settings(cache.path());
    assert_eq!(find_config_with(NAME, &settings).unwrap(), tiny_config());
    let asked: Vec<String> = hub.take_seen().into_iter().map(|seen| seen.path).collect();
    assert!(asked.iter().all(|path| path.ends_with("config.json")), "{asked:?}");
    for settings in [
        HubSettings { offline: true, ..settings.clone() },
        HubSettings { endpoint: closed_endpoint(), ..settings.clone() },
    ] {
        assert_eq!(find_config_with(NAME, &settings).unwrap(), tiny_config());
        let error = find_config_with("offshoot-test/other", &settings).unwrap_err().to_string();
        assert!(error.contains("offshoot-test/other"), "{error}");
    }

    // A folder, or the file itself, needs no weights either; a GGUF file has it in its header.
    let alone = tempfile::tempdir().unwrap();
    let file = alone.path().join("config.json");
    std::fs::write(&file, tiny_config().to_string()).unwrap();
    for path in [alone.path(), &file] {
        assert_eq!(find_config(path.to_str().unwrap()).unwrap(), tiny_config());
    }
    let gguf = fixture("llama.gguf");
    let config = find_config(gguf.to_str().unwrap()).unwrap();
    assert_eq!(&config, Checkpoint::open(&gguf).unwrap().config());
    let error = find_config("/no/such/model").unwrap_err().to_string();
    assert!(error.contains("/no/such/model"), "{error}");
}

#[test]
fn hub_model_in_one_file() {
    let (files, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_model(files.path(), &tiny_config(), &tiny_tensors());
    let hub = Hub::start(files.path().to_path_buf(), None);
    let settings = HubSettings { token: None, ..hub.settings(cache.path()) };
    let checkpoint = Checkpoint::find_with(NAME, &settings).unwrap();
    assert!(checkpoint.contains("model.norm.weight"));
    assert!(hub.take_seen().iter().all(|seen| seen.token.is_none()));
}

#[test]
fn hub_model_under_its_old_name_without_an_owner() {
    let (files, cache) = (model_files(), tempfile::tempdir().unwrap());
    let hub = Hub::start(files.path().to_path_buf(), None);
    let settings = HubSettings { token: None, ..hub.settings(cache.path()) };
    let checkpoint = Checkpoint::find_with(OLD_NAME, &settings).unwrap();
    assert!(checkpoint.contains("model.norm.weight"));
    assert_eq!(checkpoint.name(), OLD_NAME);
    // And again from the cache.
    let offline = HubSettings { offline: true, ..settings };
    assert_eq!(Checkpoint::find_with(OLD_NAME, &offline).unwrap().path(), checkpoint.path());
}

#[test]
fn offline_and_not_cached_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let (files, hub_cache) = (model_files(), tempfile::tempdir().unwrap());
    let offline = |cache: &Path| HubSettings {
        endpoint: closed_endpoint(),
        cache: cache.to_path_buf(),
        token: None,
        offline: true,
    };
    let error = Checkpoint::find_with(NAME, &offline(cache.path())).unwrap_err();
    assert!(matches!(&error, WeightsError::NotCached { file, .. } if file == "config.json"));
    let text = error.to_string();
    assert!(text.contains(NAME) && text.contains("HF_HUB_OFFLINE is set"), "{text}");

    // A fetch that ended before the last shard.
    let hub = Hub::start(files.path().to_path_buf(), None);
    let path = Checkpoint::find_with(NAME, &hub.settings(hub_cache.path())).unwrap();
    let shard = "model-00002-of-00002.safetensors";
    std::fs::remove_file(path.path().join(shard)).unwrap();
    let error = Checkpoint::find_with(NAME, &offline(hub_cache.path())).unwrap_err();
    assert!(matches!(&error, WeightsError::NotCached { file, .. } if file == shard), "{error}");
}

#[test]
fn hub_refusals_say_name_endpoint_and_hint() {
    let cache = tempfile::tempdir().unwrap();
    let find = |hub: &Hub, token: Option<&str>, name: &str| {
        let token = token.map(String::from);
        let settings = HubSettings { token, ..hub.settings(cache.path()) };
        let error = Checkpoint::find_with(name, &settings).unwrap_err();
        let text = error.to_string();
        println!("{text}");
        assert!(text.contains(name) && text.contains(&hub.endpoint), "{text}");
        assert!(!text.contains(TOKEN), "{text}");
        (error, text)
    };
    let files = model_files();
    let hub = Hub::start(files.path().to_path_buf(), None);
    let (error, text) = find(&hub, None, "offshoot-test/no-such-model");
    assert!(matches!(error, WeightsError::HubNotFound { .. }), "{text}");

    std::fs::remove_file(files.path().join("model-00001-of-00002.safetensors")).unwrap();
    let (error, text) = find(&hub, None, NAME);
    assert!(matches!(error, WeightsError::HubNotFound { .. }), "{text}");
    assert!(text.contains("model-00001-of-00002.safetensors"), "{text}");

    for status in [401, 403] {
        let hub = Hub::start(files.path().to_path_buf(), Some(status));
        let (error, text) = find(&hub, None, NAME);
        assert!(matches!(error, WeightsError::HubDenied { status: s, .. } if s == status));
        assert!(text.ends_with("set HF_TOKEN"), "{text}");
        let (_, text) = find(&hub, Some(TOKEN), NAME);
        assert!(text.contains("check the token in HF_TOKEN"), "{text}");
    }
    let hub = Hub::start(files.path().to_path_buf(), Some(503));
    let (error, text) = find(&hub, None, NAME);
    assert!(matches!(error, WeightsError::HubFailed { .. }) && text.contains("503"), "{text}");
}

#[test]
fn unreachable_hub_says_what_helps() {
    let cache = tempfile::tempdir().unwrap();
    let settings = HubSettings {
        endpoint: closed_endpoint(),
        cache: cache.path().to_path_buf(),
        token: None,
        offline: false,
    };
    let error = Checkpoint::find_with(NAME, &settings).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, WeightsError::HubUnreachable { .. }), "{text}");
    assert!(text.contains(NAME) && text.contains(&settings.endpoint), "{text}");
    assert!(text.contains("HF_HUB_OFFLINE=1"), "{text}");
}

/// An address where nobody listens.
fn closed_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
