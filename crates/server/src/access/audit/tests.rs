use super::*;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn caller(access: &Arc<crate::access::Access>) -> Caller {
    let peer = Some("10.0.0.7:1234".parse().unwrap());
    access.authenticate(&http::HeaderMap::new(), peer).unwrap()
}

fn log() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    (dir, path)
}

#[tokio::test]
async fn a_line_says_who_did_what_and_what_came_of_it() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, path) = log();
    fs::write(&path, "{\"action\":\"before\"}\n").unwrap();
    let audit = Audit::start(Some(&path)).unwrap();
    let caller = caller(&crate::access::Access::start(None, Audit::default()).unwrap());
    let subject = |n| Subject { session: Some("s".into()), snapshot: n, owner: None };
    audit.did(&caller, Action::Export, subject(None), &Ok(()));
    let failed: Result<(), _> = Err(Error::UnknownSession("s".into()));
    audit.did(&caller, Action::Restore, subject(Some("1-step0".into())), &failed);
    for port in 1..=5 {
        let peer = Some(format!("10.0.0.8:{port}").parse().unwrap());
        audit.refused(&Stranger { peer, ..Stranger::default() });
    }
    audit.reloaded(&Ok(3));
    audit.end();
    let lines = lines(&path);
    let shown: Vec<String> = lines
        .iter()
        .map(|line| {
            let keys = ["action", "peer", "session", "snapshot", "outcome", "count"];
            keys.map(|key| line[key].to_string()).join(" ").replace('"', "")
        })
        .collect();
    let expected = [
        "before null null null null null",
        "export 10.0.0.7:1234 s null ok null",
        "restore 10.0.0.7:1234 s 1-step0 unknown_session null",
        "refused_authentication 10.0.0.8:1 null null unauthenticated null",
        "tenants_reloaded null null null ok null",
        "refused_authentication 10.0.0.8 null null unauthenticated 4",
    ];
    assert_eq!(shown, expected);
    for line in &lines[1..] {
        let time = OffsetDateTime::parse(line["time"].as_str().unwrap(), &Rfc3339).unwrap();
        assert_eq!(line["time"].as_str().unwrap().len(), "2026-11-23T02:04:05.678Z".len());
        assert!((OffsetDateTime::now_utc() - time).whole_seconds() < 60);
    }
    let (_dir, fresh) = log();
    Audit::start(Some(&fresh)).unwrap().end();
    assert_eq!(fs::metadata(&fresh).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_log_that_was_moved_away_is_begun_again_and_a_failing_one_stops_nobody() {
    let (dir, path) = log();
    let mut file = LogFile::of_audit(&path).unwrap();
    assert!(file.write_line(b"1".to_vec()));
    fs::rename(&path, dir.path().join("old")).unwrap();
    assert!(file.write_line(b"2".to_vec()));
    assert_eq!(fs::read_to_string(dir.path().join("old")).unwrap(), "1\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
    // Whoever tests this may be root, for whom no mode is a hindrance; a folder is one for everybody.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(!file.write_line(b"3".to_vec()) && !file.write_line(b"4".to_vec()));
    fs::remove_dir(&path).unwrap();
    file.reopen();
    assert!(file.write_line(b"5".to_vec()));
    assert_eq!(fs::read_to_string(&path).unwrap(), "\n5\n");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = Audit::start(Some(&path)).err().unwrap().to_string();
    assert!(error.contains("audit.jsonl"), "{error}");
}

#[tokio::test]
async fn lost_lines_are_counted() {
    let (_dir, path) = log();
    let audit = Audit::start(Some(&path)).unwrap();
    audit.0.as_ref().unwrap().n_lost.store(7, Ordering::Relaxed);
    audit.reloaded(&Ok(0));
    audit.end();
    let lines = lines(&path);
    assert_eq!(
        (lines[1]["action"].as_str(), lines[1]["count"].as_u64()),
        (Some("lines_lost"), Some(7))
    );
}
