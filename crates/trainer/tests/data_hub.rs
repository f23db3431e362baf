//! A hub on loopback: what is asked of huggingface.co for a data set, answered from memory.

use offshoot_model::weights::HubSettings;
use offshoot_trainer::TrainError;
use offshoot_trainer::data::source::{DataSetError, DataSpec, Record};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const TOKEN: &str = "hf_test";
const CONVERTED: &str = "refs%2Fconvert%2Fparquet";

/// Files by path, of one branch.
type Branch = BTreeMap<String, Vec<u8>>;

/// Branches by repository and revision, as both stand in an address.
#[derive(Clone, Default)]
struct Shelf(BTreeMap<(String, String), Branch>);

impl Shelf {
    fn put(mut self, repo: &str, revision: &str, path: &str, bytes: impl Into<Vec<u8>>) -> Shelf {
        let branch = self.0.entry((repo.into(), revision.into())).or_default();
        branch.insert(path.into(), bytes.into());
        self
    }

    /// The repository that a name without an owner leads to.
    fn owner_of(&self, name: &str) -> Option<&str> {
        let names = self.0.keys().map(|(repo, _)| repo.as_str());
        names.into_iter().find(|repo| repo.ends_with(&format!("/{name}")))
    }
}

struct Hub {
    endpoint: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves the shelf until the test's process ends; with `status`, that is every answer.
    fn start(shelf: Shelf, status: Option<u16>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(vec![]));
        let (log, own) = (seen.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &shelf, &own, status, &log);
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
    fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn answer(
    stream: TcpStream,
    shelf: &Shelf,
    endpoint: &str,
    status: Option<u16>,
    log: &Mutex<Vec<String>>,
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
    log.lock().unwrap().push(path.to_string());
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_string())
        })
    };
    assert_eq!(header("authorization"), Some(format!("Bearer {TOKEN}")), "{path}");
    let mut out = reader.into_inner();
    let mut send = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
        );
        // The client may hang up early: it wants the headers only.
        let _ = out.write_all(&[head.as_bytes(), body].concat());
    };
    if let Some(status) = status {
        return send(&format!("{status} Refused"), "", b"");
    }
    if let Some(rest) = path.strip_prefix("/api/datasets/") {
        let (repo, revision) = rest.split_once("/revision/").unwrap();
        if let Some(owner) = shelf.owner_of(repo) {
            let to = format!("Location: /api/datasets/{owner}/revision/{revision}\r\n");
            return send("307 Temporary Redirect", &to, b"");
        }
        return match shelf.0.get(&(repo.into(), revision.into())) {
            None => send("404 Not Found", "", b"{\"error\":\"Repository not found\"}"),
            Some(branch) => {
                let siblings: Vec<_> =
                    branch.keys().map(|path| serde_json::json!({ "rfilename": path })).collect();
                let info = serde_json::json!({
                    "id": repo, "sha": commit(revision), "siblings": siblings, "private": false,
                });
                send("200 OK", "Content-Type: application/json\r\n", info.to_string().as_bytes())
            }
        };
    }
    let rest = path.strip_prefix("/datasets/").or(path.strip_prefix("/blobs/")).unwrap();
    let (repo, rest) = rest.split_once("/resolve/").unwrap();
    let (revision, file) = rest.split_once('/').unwrap();
    let Some(body) = shelf.0.get(&(repo.into(), revision.into())).and_then(|b| b.get(file)) else {
        return send("404 Not Found", "", b"Entry not found");
    };
    let etag = file.replace('/', "-");
    let commit = commit(revision);
    if file.ends_with(".parquet") && path.starts_with("/datasets/") {
        // As the real hub does with large files.
        let headers = format!(
            "X-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nLocation: {endpoint}/blobs/{repo}/resolve/{rest}\r\n"
        );
        return send("302 Found", &headers, b"");
    }
    let range = header("range").unwrap_or_else(|| "bytes=0-".into());
    let (from, to) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse::<usize>().map_or(body.len(), |to| (to + 1).min(body.len()));
    let headers = format!(
        "X-Repo-Commit: {commit}\r\nETag: \"{etag}\"\r\nContent-Range: bytes {from}-{}/{}\r\n",
        to - 1,
        body.len()
    );
    send("206 Partial Content", &headers, &body[from..to]);
}

fn commit(revision: &str) -> String {
    let digit = if revision == "main" { "1" } else { "2" };
    digit.repeat(40)
}

/// A Parquet file with the column `text`.
fn parquet(texts: &[&str]) -> Vec<u8> {
    let schema =
        Arc::new(parse_message_type("message m { required byte_array text (UTF8); }").unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

/// Laid out as the real one is.
fn wikitext() -> Shelf {
    let card = "---\nlicense: cc-by-sa-3.0\nconfigs:\n- config_name: wikitext-103-v1\n  data_files:\n  - split: train\n    path: wikitext-103-v1/train-*\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n    path: wikitext-2-raw-v1/test-*\n  - split: train\n    path: wikitext-2-raw-v1/train-*\n  - split: validation\n    path: wikitext-2-raw-v1/validation-*\n---\n# WikiText\n";
    let repo = "Salesforce/wikitext";
    let file = |config: &str, split: &str| format!("{config}/{split}-00000-of-00001.parquet");
    Shelf::default()
        .put(repo, "main", "README.md", card)
        .put(repo, "main", &file("wikitext-103-v1", "train"), parquet(&["other"]))
        .put(repo, "main", &file("wikitext-2-raw-v1", "train"), parquet(&["", " = Robert = \n"]))
        .put(repo, "main", &file("wikitext-2-raw-v1", "validation"), parquet(&["held"]))
        .put(repo, "main", &file("wikitext-2-raw-v1", "test"), parquet(&["last"]))
}

fn spec(name: &str, config: Option<&str>) -> DataSpec {
    DataSpec {
        dataset_name: Some(name.into()),
        dataset_config: config.map(String::from),
        ..DataSpec::default()
    }
}

/// Places and texts to train on, and to evaluate on.
type Found = (Vec<(String, String)>, Vec<(String, String)>);

fn read(spec: &DataSpec, hub: &HubSettings) -> Result<Found, TrainError> {
    let sources = spec.open_with(hub)?;
    let all = |sources: &[Box<dyn offshoot_trainer::data::source::DataSource>]| {
        let mut found = vec![];
        for source in sources {
            for located in source.records()? {
                match located? {
                    (place, Record::Text(text)) => found.push((place.to_string(), text)),
                    (place, other) => panic!("{place}: {other:?}"),
                }
            }
        }
        Ok::<_, TrainError>(found)
    };
    Ok((all(&sources.train)?, all(&sources.eval)?))
}

fn failed(spec: &DataSpec, hub: &HubSettings) -> (DataSetError, String) {
    let error = read(spec, hub).unwrap_err();
    let text = error.to_string();
    println!("{text}");
    assert!(!text.contains(TOKEN), "{text}");
    match error {
        TrainError::DataSet(error) => (error, text),
        other => panic!("{other}"),
    }
}

#[test]
fn wikitext_as_everybody_types_it_is_fetched_once_and_works_offline() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(wikitext(), None);
    let settings = hub.settings(cache.path());
    let wikitext = spec("wikitext", Some("wikitext-2-raw-v1"));
    let (train, eval) = read(&wikitext, &settings).unwrap();
    let place = "wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet, row";
    let expected =
        [(format!("{place} 1"), "".into()), (format!("{place} 2"), " = Robert = \n".into())];
    assert_eq!(train, expected);
    assert_eq!(eval.len(), 1);
    assert_eq!(eval[0].1, "held");
    let seen = hub.take_seen();
    let asked = |what: &str| seen.iter().any(|path| path.contains(what));
    assert!(asked("/blobs/Salesforce/wikitext"), "{seen:?}");
    // Only what is read: neither the other config nor the other split.
    assert!(!asked("wikitext-103-v1") && !asked("test-00000"), "{seen:?}");

    // Again: one question whether something changed, no file travels.
    assert_eq!(read(&wikitext, &settings).unwrap().0, expected);
    let seen = hub.take_seen();
    assert!(seen.iter().all(|path| path.starts_with("/api/")), "{seen:?}");

    // Offline, and with a hub that is gone.
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert_eq!(read(&wikitext, &offline).unwrap().0, expected);
    assert!(hub.take_seen().is_empty());
    let gone = HubSettings { endpoint: closed_endpoint(), ..settings };
    assert_eq!(read(&wikitext, &gone).unwrap().0, expected);
    let full_name = spec("Salesforce/wikitext", Some("wikitext-2-raw-v1"));
    assert_eq!(
        read(&full_name, &offline).unwrap().1,
        [(
            "Salesforce/wikitext/wikitext-2-raw-v1/validation-00000-of-00001.parquet, row 1".into(),
            "held".into()
        )]
    );

    // What was never fetched is missing, by name.
    let other = DataSpec { eval_split: Some("test".into()), ..wikitext };
    let (error, text) = failed(&other, &offline);
    assert!(matches!(error, DataSetError::NotCached { .. }));
    assert!(text.contains("wikitext-2-raw-v1/test-00000-of-00001.parquet"), "{text}");
}

#[test]
fn configs_and_splits_that_are_not_there_are_named() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(wikitext(), None);
    let settings = hub.settings(cache.path());
    let (_, text) = failed(&spec("wikitext", None), &settings);
    let expected = "the data set wikitext: it has several configs; choose one with --dataset-config: \"wikitext-103-v1\", \"wikitext-2-raw-v1\"";
    assert_eq!(text, expected);
    let (_, text) = failed(&spec("wikitext", Some("wikitext-2")), &settings);
    assert!(text.contains("there is no config \"wikitext-2\""), "{text}");
    let all = DataSpec { train_split: "all".into(), ..spec("wikitext", Some("wikitext-2-raw-v1")) };
    let (_, text) = failed(&all, &settings);
    let expected = "there is no split \"all\"; the splits are \"test\", \"train\", \"validation\"";
    assert!(text.contains(expected), "{text}");
    let offline = HubSettings { offline: true, ..settings };
    let (_, text) = failed(&all, &offline);
    assert!(text.contains(expected), "{text}");
}

#[test]
fn files_without_a_card_are_sorted_by_their_names() {
    let cache = tempfile::tempdir().unwrap();
    let gzip = |text: &str| {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        packed.write_all(text.as_bytes()).unwrap();
        packed.finish().unwrap()
    };
    let shelf = Shelf::default()
        .put("team/notes", "main", "data/train.jsonl.gz", gzip("{\"text\": \"a\"}\n"))
        .put("team/notes", "main", "data/test.jsonl.gz", gzip("{\"text\": \"b\"}\n"))
        .put("team/notes", "main", "README.md", "# No front matter");
    let hub = Hub::start(shelf, None);
    let found = read(&spec("team/notes", None), &hub.settings(cache.path())).unwrap();
    assert_eq!(found.0, [("team/notes/data/train.jsonl.gz:1".into(), "a".into())]);
    assert_eq!(found.1, [("team/notes/data/test.jsonl.gz:1".into(), "b".into())]);
    // A held-out part takes the place of the test split, which is not even fetched.
    let cache = tempfile::tempdir().unwrap();
    hub.take_seen();
    let held = DataSpec { eval_fraction: 0.5, ..spec("team/notes", None) };
    held.open_with(&hub.settings(cache.path())).unwrap();
    assert!(!hub.take_seen().iter().any(|path| path.contains("test.jsonl")));
}

#[test]
fn a_data_set_made_by_a_script_comes_from_the_hubs_conversion() {
    let cache = tempfile::tempdir().unwrap();
    let shelf = Shelf::default()
        .put("team/old", "main", "old.py", "import datasets")
        .put("team/old", "main", "README.md", "---\nlicense: mit\n---\n")
        .put("team/old", CONVERTED, "plain/train/0001.parquet", parquet(&["b"]))
        .put("team/old", CONVERTED, "plain/train/0000.parquet", parquet(&["a"]))
        .put("team/old", CONVERTED, "plain/unsupervised/0000.parquet", parquet(&["c"]))
        .put("team/none", "main", "data.zip", "PK");
    let hub = Hub::start(shelf, None);
    let settings = hub.settings(cache.path());
    for config in [None, Some("plain")] {
        let (train, eval) = read(&spec("team/old", config), &settings).unwrap();
        let texts: Vec<_> = train.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!((texts, eval.len()), (vec!["a", "b"], 0));
    }
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert_eq!(read(&spec("team/old", None), &offline).unwrap().0.len(), 2);
    // With a limit of samples a file is fetched when it is read, and what stands for its content
    // takes no file.
    let cache = tempfile::tempdir().unwrap();
    hub.take_seen();
    let limited = DataSpec { max_train_samples: Some(1), ..spec("team/old", None) };
    let sources = limited.open_with(&hub.settings(cache.path())).unwrap().train;
    let fingerprints: Vec<_> = sources.iter().map(|s| s.fingerprint().unwrap().unwrap()).collect();
    assert_ne!(fingerprints[0], fingerprints[1]);
    assert!(!hub.take_seen().iter().any(|path| path.ends_with(".parquet")));
    assert_eq!(sources[0].records().unwrap().count(), 1);
    let seen = hub.take_seen();
    assert!(
        seen.iter().all(|path| path.ends_with("/0000.parquet")) && !seen.is_empty(),
        "{seen:?}"
    );

    let (error, text) = failed(&spec("team/none", None), &settings);
    assert!(matches!(error, DataSetError::NoData { .. }), "{text}");
    assert!(text.contains("--train-file"), "{text}");
}

#[test]
fn refusals_say_name_endpoint_and_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(wikitext(), None);
    let (error, text) = failed(&spec("no/such", None), &hub.settings(cache.path()));
    assert!(matches!(error, DataSetError::NotFound { .. }), "{text}");
    assert!(text.contains(&hub.endpoint) && text.contains("--train-file"), "{text}");

    for status in [401, 403] {
        let hub = Hub::start(wikitext(), Some(status));
        let (error, text) = failed(&spec("wikitext", None), &hub.settings(cache.path()));
        assert!(matches!(error, DataSetError::Denied { status: s, .. } if s == status), "{text}");
        assert!(text.contains("check the token in HF_TOKEN"), "{text}");
    }
    let hub = Hub::start(wikitext(), Some(503));
    let (error, text) = failed(&spec("wikitext", None), &hub.settings(cache.path()));
    assert!(matches!(error, DataSetError::Failed { .. }) && text.contains("503"), "{text}");

    let gone = HubSettings { endpoint: closed_endpoint(), ..hub.settings(cache.path()) };
    let (error, text) = failed(&spec("wikitext", None), &gone);
    assert!(matches!(error, DataSetError::Unreachable { .. }), "{text}");
    assert!(text.contains("HF_HUB_OFFLINE=1") && text.contains("--train-file"), "{text}");

    let offline = HubSettings { offline: true, ..gone };
    let (error, text) = failed(&spec("wikitext", None), &offline);
    assert!(matches!(error, DataSetError::NotCached { .. }), "{text}");

    let (error, text) = failed(&spec("./texts.jsonl", None), &offline);
    assert!(matches!(error, DataSetError::NotAName { .. }), "{text}");
}

/// An address where nobody listens.
fn closed_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
