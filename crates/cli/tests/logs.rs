//! Logs as JSON, and the id by which an operator finds what a user was refused.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

fn offshoot(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.args(line.split_whitespace()).env("OMP_NUM_THREADS", "1");
    command.env_remove("OFFSHOOT_TOKEN").env_remove("RUST_LOG");
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

fn model() -> String {
    format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"))
}

/// A server that is killed when the test is over.
struct Server(Child, u16);

impl Server {
    fn start(dir: &Path, more: &str) -> Server {
        let mut command =
            offshoot("serve --split-point-1 1 --split-point-2 3 --threads 1 --port 0");
        command.args(more.split_whitespace()).args(["--model-name", &model(), "--store-dir"]);
        command.arg(dir.join("store")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim_end().rsplit(':').next().unwrap().parse();
        let mut server = Server(child, 0);
        server.1 = port.unwrap_or_else(|_| panic!("it does not start: {}", server.log()));
        server
    }

    /// Ends it; what it has logged.
    fn log(&mut self) -> String {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let mut log = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What has no room for any adapter.
const SMALL: &str = "--memory-limit 1MB";

/// stderr of a run that such a server refuses.
fn refused(dir: &Path, port: u16, more: &str) -> String {
    fs::write(dir.join("train.txt"), "The trunk has a branch.\n\nThe branch has leaves.").unwrap();
    let mut command = offshoot(&format!("train --server 127.0.0.1:{port} --lora-rank 128 {more}"));
    command.args(["--model-name", &model(), "--train-file"]).arg(dir.join("train.txt"));
    let output = command.arg("--output-dir").arg(dir.join("run")).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    text
}

/// Between "(request " and ")".
fn quoted_id(text: &str) -> &str {
    let (_, behind) = text.rsplit_once("(request ").unwrap_or_else(|| panic!("no id: {text}"));
    behind.split_once(')').unwrap().0
}

fn objects(log: &str) -> Vec<Value> {
    let object = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(value["timestamp"].is_string() && value["level"].is_string(), "{line}");
        assert!(value["message"].is_string() && value["target"].is_string(), "{line}");
        value
    };
    log.lines().map(object).collect()
}

#[test]
fn a_user_quotes_an_id_and_the_operator_finds_it_in_a_log_of_objects() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &format!("{SMALL} --log-format json"));
    let text = refused(dir.path(), server.1, "");
    let id = quoted_id(&text);
    assert_eq!(id.len(), 8, "{text}");
    let log = server.log();
    let lines = objects(&log);
    assert!(lines.iter().any(|line| line["message"] == "ready"), "{log}");
    let line = lines.iter().find(|line| line["request"] == id);
    let line = line.unwrap_or_else(|| panic!("{id} is not in {log}"));
    assert_eq!((&line["label"], &line["level"]), (&"no_room".into(), &"INFO".into()), "{line}");
    let message = line["message"].as_str().unwrap();
    assert!(message.starts_with("refused: no room on the device"), "{line}");
}

#[test]
fn the_error_that_ends_a_command_is_an_object_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &format!("{SMALL} --log warn"));
    let text = refused(dir.path(), server.1, "--log-format json --log error");
    let lines = objects(&text);
    let [line] = lines.as_slice() else { panic!("one line: {text}") };
    assert_eq!(line["level"], "ERROR");
    assert!(line["message"].as_str().unwrap().contains("no room on the device"), "{line}");
    // A filter is one for this log, too: a refusal is no warning.
    assert!(!server.log().contains("refused"));
}
