//! `offshoot tenant` as an operator uses it, a server that lives with its file, and logs that hold no
//! token.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_offshoot");

fn offshoot(dir: &Path, line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(line.split_whitespace()).current_dir(dir).env("OMP_NUM_THREADS", "1");
    command.env_remove("OFFSHOOT_TOKEN").env_remove("RUST_LOG");
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

/// stdout of a command that must be fine.
fn fine(dir: &Path, line: &str) -> String {
    let output = offshoot(dir, line).output().unwrap();
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{line}: {err}");
    out
}

/// stderr of one that must not.
fn refused(dir: &Path, line: &str) -> String {
    let output = offshoot(dir, line).output().unwrap();
    let (out, err) = texts(&output);
    assert!(!output.status.success() && out.is_empty(), "{line}: {out}");
    err
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

fn list(dir: &Path) -> Vec<Value> {
    serde_json::from_str(&fine(dir, "tenant list --json")).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn tenants_are_added_rotated_revoked_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, file) = (dir.path(), dir.path().join("tenants.toml"));
    assert!(refused(dir, "tenant list").contains("offshoot tenant add"));
    let line = "tenant add blue --weight 2 --sessions 8 --adapter-bytes 2GiB --open-bytes 4GiB \
                --tokens-per-second 20000 --tokens-per-microbatch 8192 --rank 64 --stored-sessions 100 \
                --expires 90d";
    let token = fine(dir, line);
    let token = token.strip_suffix('\n').unwrap();
    assert!(token.starts_with("ofs_") && token.lines().count() == 1, "only the token is on stdout");
    assert_eq!(mode(&file), 0o600);
    let text = fs::read_to_string(&file).unwrap();
    assert!(!text.contains(token), "the file holds hashes only");

    let rows = list(dir);
    let blue = &rows[0];
    assert_eq!((blue["name"].as_str(), blue["weight"].as_u64()), (Some("blue"), Some(2)));
    assert_eq!(blue["quotas"]["adapter_bytes"].as_u64(), Some(2 << 30));
    assert_eq!(blue["quotas"]["stored_sessions"].as_u64(), Some(100));
    assert!(blue["tokens"][0]["expires"].is_string());
    assert!(token.contains(blue["tokens"][0]["id"].as_str().unwrap()));

    // Comments, mode and links stay.
    fs::write(&file, format!("# Ours.\n{text}")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink(&file, dir.join("link.toml")).unwrap();
    let second = fine(dir, "tenant rotate blue --expires-old 1h --tenants link.toml");
    assert_ne!(second.trim(), token);
    assert!(fs::symlink_metadata(dir.join("link.toml")).unwrap().is_symlink());
    assert_eq!(mode(&file), 0o640);
    assert!(fs::read_to_string(&file).unwrap().starts_with("# Ours.\n"));
    let tokens = list(dir)[0]["tokens"].as_array().unwrap().clone();
    assert!(tokens[0]["expires"].is_string() && tokens[1]["expires"].is_null(), "{tokens:?}");

    assert!(refused(dir, "tenant add blue").contains("is there already"));
    assert!(refused(dir, "tenant add Blue").contains("a to z"));
    assert!(refused(dir, "tenant add grey --weight 1001").contains("1 to 1000"));
    assert!(refused(dir, "tenant rotate grey").contains("there is blue"));
    let id = tokens[0]["id"].as_str().unwrap();
    assert_eq!(fine(dir, &format!("tenant revoke blue --token {id}")), "");
    assert!(refused(dir, &format!("tenant revoke blue --token {id}")).contains("it has"));
    assert_eq!(fine(dir, "tenant revoke blue"), "");
    fine(dir, "tenant add red");
    fine(dir, "tenant add ops --operator");
    assert!(fine(dir, "tenant list").contains("operator; "));
    assert_eq!(list(dir).iter().filter(|row| row["is_operator"] == true).count(), 1);
    fine(dir, "tenant remove ops");
    assert!(fine(dir, "tenant list").contains("no token"));
    fine(dir, "tenant remove blue");
    assert_eq!(list(dir).len(), 1);

    // The settings of a server say where the file is.
    fs::write(dir.join("server.toml"), "[access]\ntenants = \"other.toml\"\n").unwrap();
    fs::create_dir(dir.join("sub")).unwrap();
    let output = offshoot(&dir.join("sub"), "tenant add green --config ../server.toml").output();
    let (_, told) = texts(&output.unwrap());
    let other = fs::canonicalize(dir).unwrap().join("other.toml");
    assert!(told.contains(other.to_str().unwrap()), "{told}");
    assert!(fine(dir, "tenant list --tenants other.toml").contains("green"));

    for (end, expected) in
        [("0d", "before it begins"), ("2020-01-01", "before it begins"), ("90", "such as 90d")]
    {
        let error = refused(dir, &format!("tenant add z --expires {end}"));
        assert!(error.contains(expected), "{error}");
    }
    fine(dir, "tenant add yellow --expires 2120-06-30");
    assert!(fine(dir, "tenant list").contains("(until 2120-06-30T00:00:00Z)"));
    fs::write(&file, "[[tenants]]\nnam = 1\n").unwrap();
    let error = refused(dir, "tenant add blue");
    assert!(error.contains("mend it first") && error.contains("line 2"), "{error}");
    let left = fs::read_dir(dir)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("new-"));
    assert_eq!(left.count(), 0, "nothing half done is left");
}

struct Server {
    process: Child,
    port: u16,
}

impl Server {
    fn start(dir: &Path, log: &Path, more: &str) -> Server {
        let model = format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"));
        let line = format!(
            "serve --split-point-1 1 --split-point-2 3 --threads 1 --port 0 --log trace {more}"
        );
        let mut command = offshoot(dir, &line);
        command.args(["--model-name", &model]);
        command.stderr(fs::File::create(log).unwrap()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let port = ready.trim_end().rsplit(':').next().unwrap().parse();
        Server { port: port.expect("it says where it is"), process }
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Until it is so.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A run of two steps with this token: whether it is let in, and what it logs at the finest level.
fn train(dir: &Path, port: u16, token: Option<&str>, output: &str) -> (bool, String) {
    let model = format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"));
    let line = format!(
        "train --server-host 127.0.0.1 --server-port {port} --max-steps 2 --batch-size 1 \
         --train-file train.txt --output-dir {output} --log trace"
    );
    let mut command = offshoot(dir, &line);
    command.args(["--model-name", &model]);
    if let Some(token) = token {
        command.env("OFFSHOOT_TOKEN", token);
    }
    let output = command.output().unwrap();
    let (out, err) = texts(&output);
    (output.status.success(), out + &err)
}

#[test]
fn a_server_lives_with_its_tenants_file_and_no_log_holds_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("train.txt"), "A leaf falls.\n\nAnother one stays.\n\nSnow.").unwrap();
    let token = fine(dir, "tenant add blue").trim().to_string();
    let log: PathBuf = dir.join("server.log");
    let server = Server::start(dir, &log, "--tenants tenants.toml --audit-log audit.jsonl");
    let (is_in, first) = train(dir, server.port, Some(&token), "first");
    assert!(is_in, "{first}");
    let (is_in, second) = train(dir, server.port, None, "second");
    assert!(!is_in && second.contains("OFFSHOOT_TOKEN"), "{second}");

    // A new tenant gets in without a restart; a hang-up is not the end.
    let red = fine(dir, "tenant add red").trim().to_string();
    server.signal("-HUP");
    until("red gets in", || train(dir, server.port, Some(&red), "red").0);
    fine(dir, "tenant revoke blue");
    until("blue is out", || !train(dir, server.port, Some(&token), "late").0);

    fs::rename(dir.join("audit.jsonl"), dir.join("audit.1")).unwrap();
    train(dir, server.port, Some(&red), "again");
    until("the audit log is begun again", || dir.join("audit.jsonl").exists());
    server.signal("-TERM");
    drop(server);

    let secret = |token: &str| token.rsplit('_').next().unwrap().to_string();
    let mut texts = vec![("client", first), ("refused client", second)];
    for name in ["server.log", "audit.1", "audit.jsonl", "tenants.toml"] {
        texts.push((name, fs::read_to_string(dir.join(name)).unwrap()));
    }
    for (name, text) in &texts {
        assert!(text.len() > 100, "{name} says something");
        for token in [&token, &red] {
            // The secret's end too: it may have a "_".
            let tail = &token[token.len() - 20..];
            assert!(!text.contains(&secret(token)) || secret(token).len() < 8, "{name}");
            assert!(!text.contains(tail), "{name} holds a token");
        }
    }
    let audit = fs::read_to_string(dir.join("audit.1")).unwrap();
    assert!(audit.contains("\"tenant\":\"blue\"") && audit.contains("refused_authentication"));
}

#[test]
fn a_server_says_when_everybody_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let server = Server::start(dir.path(), &log, "");
    drop(server);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("the server is open"), "{text}");
    let line = "serve --split-point-2 3 --model-name none --host 0.0.0.0";
    let error = refused(dir.path(), line);
    assert!(error.contains("without access.tenants") && error.contains("offshoot tenant add"));
    let error = refused(dir.path(), &format!("{line} --tenants t.toml"));
    assert!(error.contains("without TLS tokens could be read"), "{error}");
}
