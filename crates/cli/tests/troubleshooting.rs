//! Every message that docs/troubleshooting.md quotes is one that the program really prints, and each
//! is provoked here. In the page `…` stands for what differs from case to case.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fixture(name: &str) -> String {
    root().join("tests/fixtures").join(name).display().to_string()
}

fn offshoot(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.args(line.split_whitespace()).env("OMP_NUM_THREADS", "1");
    // Not the user's.
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

/// A server process that ends with the test.
struct Server {
    child: Child,
    port: u16,
    _store: TempDir,
}

impl Server {
    fn start(model: &str, more: &str) -> Server {
        let store = tempfile::tempdir().unwrap();
        let mut command = offshoot(&format!("serve --threads 1 --log error --port 0 {more}"));
        command.args(["--model-name", model, "--store-dir"]).arg(store.path());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim_end().rsplit(':').next().unwrap().parse().unwrap();
        Server { child, port, _store: store }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with texts, and what a run in it says to stderr.
struct Case(TempDir);

impl Case {
    fn new() -> Case {
        let case = Case(tempfile::tempdir().unwrap());
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        case.write("good.txt", &texts.join("\n\n"));
        case
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).unwrap();
    }

    /// In this folder, against the server at `port`.
    fn command(port: u16, more: &str) -> Command {
        let model = fixture("tiny_text");
        offshoot(&format!("train --model-name {model} --server 127.0.0.1:{port} {more}"))
    }

    fn trains(&self, port: u16, more: &str) {
        let output = Self::command(port, more).current_dir(self.0.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command must fail.
    fn train(&self, port: u16, more: &str) -> String {
        self.fails(&mut Self::command(port, more))
    }

    fn fails(&self, command: &mut Command) -> String {
        let output = command.current_dir(self.0.path()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "it should have failed: {command:?} {text}");
        text.trim_end().to_string()
    }
}

/// The `error:` lines of the page's code blocks.
fn quoted() -> Vec<String> {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let lines = page.lines().map(str::trim);
    lines.filter(|line| line.starts_with("error: ")).map(String::from).collect()
}

/// Whether a text reads like a quotation with `…` for what differs.
fn reads_like(text: &str, quotation: &str) -> bool {
    let mut pieces = quotation.split('…');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, inner)) = pieces.split_last() else { return rest.is_empty() };
    for piece in inner {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn unused_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn connection(case: &Case, said: &mut Vec<String>) {
    said.push(case.train(unused_port(), "--train-file good.txt --output-dir a"));
    // Something else listens there.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in other.incoming() {
            use std::io::Write;
            let _ = stream.and_then(|mut s| s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        }
    });
    said.push(case.train(port, "--train-file good.txt --output-dir a"));
}

fn mismatches(case: &Case, said: &mut Vec<String>) {
    let server = Server::start(&fixture("tiny_text"), "--split-point-1 1 --split-point-2 3");
    let run = "--train-file good.txt --output-dir b";
    said.push(case.train(server.port, &format!("{run} --split-point-1 0")));
    let other = Server::start(&fixture("llama"), "--split-point-1 1 --split-point-2 3");
    said.push(case.train(other.port, run));
    said.push(case.train(server.port, &format!("{run} --learning-rate 1e30 --warmup-steps 0")));
    case.trains(server.port, "--train-file good.txt --output-dir c --max-steps 1");
    let run = "--train-file good.txt --output-dir c --max-steps 2";
    said.push(case.train(server.port, run));
    said.push(case.train(server.port, "--train-file good.txt --output-dir none --resume latest"));
    said.push(case.train(server.port, &format!("{run} --resume latest --lora-rank 4")));
}

fn memory(case: &Case, said: &mut Vec<String>) {
    let model = fixture("tiny_text");
    let cut = "--split-point-1 1 --split-point-2 3 --port 0 --store-dir st";
    let line = format!("serve --model-name {model} {cut} --memory-limit 1KB --log error");
    said.push(case.fails(&mut offshoot(&line)));
    let server = Server::start(
        &fixture("tiny_text"),
        "--split-point-1 1 --split-point-2 3 --memory-limit 1MB",
    );
    let run = "--train-file good.txt --output-dir e --batch-size 30 --lora-rank 128";
    said.push(case.train(server.port, run));
}

fn data(case: &Case, said: &mut Vec<String>) {
    let server = Server::start(&fixture("tiny_text"), "--split-point-1 1 --split-point-2 3");
    case.write("empty.txt", "\n");
    case.write("bad.jsonl", "{\"text\": \"a b\"}\n{\"text\": \n");
    case.write("columns.csv", "title,body\nA,B\n");
    case.write("talk.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yes\"}]}\n");
    for file in ["missing.txt", "empty.txt", "bad.jsonl", "columns.csv"] {
        said.push(case.train(server.port, &format!("--train-file {file} --output-dir d")));
    }
    // A base model, as many are: without a chat template.
    fs::create_dir(case.0.path().join("base")).unwrap();
    for entry in fs::read_dir(fixture("tiny_text")).unwrap() {
        let (from, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
        if name == "tokenizer_config.json" {
            case.write("base/tokenizer_config.json", "{}");
        } else {
            fs::copy(from, case.0.path().join("base").join(name)).unwrap();
        }
    }
    let line = format!("train --model-name base --server 127.0.0.1:{}", server.port);
    let line = format!("{line} --train-file talk.jsonl --output-dir d");
    said.push(case.fails(&mut offshoot(&line)));
}

#[test]
fn the_page_quotes_what_the_program_says() {
    let case = Case::new();
    let mut said = Vec::new();
    for provoke in [connection, mismatches, memory, data] {
        provoke(&case, &mut said);
    }
    let quoted = quoted();
    let mut wrong = Vec::new();
    for text in &said {
        let last = text.lines().last().unwrap_or_default();
        if !quoted.iter().any(|quotation| reads_like(last, quotation)) {
            wrong.push(format!("said, but not in the page:\n{last}"));
        }
    }
    for quotation in &quoted {
        if !said.iter().any(|text| reads_like(text.lines().last().unwrap_or_default(), quotation)) {
            wrong.push(format!("in the page, but not said:\n{quotation}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n\n"));
}
