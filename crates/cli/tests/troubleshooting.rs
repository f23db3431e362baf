//! Every message that docs/troubleshooting.md quotes is one that the program really prints, and each
//! is provoked here. In the page `…` stands for what differs from case to case.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const SPLIT: &str = "--split-point-1 1 --split-point-2 3";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fixture(name: &str) -> String {
    root().join("tests/fixtures").join(name).display().to_string()
}

fn offshoot(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.args(line.split_whitespace()).env("OMP_NUM_THREADS", "1").env_remove("OFFSHOOT_TOKEN");
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
        let mut command = offshoot(&format!("serve --threads 1 --port 0 {more}"));
        command.args(["--model-name", model, "--log", "warn", "--store-dir"]).arg(store.path());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim_end().rsplit(':').next().unwrap().parse();
        let mut server = Server { child, port: 0, _store: store };
        match port {
            Ok(port) => server.port = port,
            Err(_) => panic!("the server does not start: {}", server.kill()),
        }
        server
    }

    /// Ends it without a warning, as a crash does. Gives what its log had.
    fn kill(mut self) -> String {
        self.child.kill().unwrap();
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
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

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Against the server at `port`.
    fn command(port: u16, more: &str) -> Command {
        Self::command_at(&format!("127.0.0.1:{port}"), more)
    }

    fn command_at(address: &str, more: &str) -> Command {
        let model = fixture("tiny_text");
        offshoot(&format!("train --model-name {model} --server {address} {more}"))
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

/// The `error:` and `WARN` lines of the page's code blocks.
fn quoted() -> Vec<String> {
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let lines = page.lines().map(str::trim);
    let said = |line: &&str| line.starts_with("error: ") || line.starts_with("… WARN ");
    lines.filter(said).map(String::from).collect()
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
    thread::spawn(move || {
        for stream in other.incoming() {
            use std::io::Write;
            let _ = stream.and_then(|mut s| s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
        }
    });
    said.push(case.train(port, "--train-file good.txt --output-dir a"));
}

fn mismatches(case: &Case, said: &mut Vec<String>) {
    let server = Server::start(&fixture("tiny_text"), SPLIT);
    let run = "--train-file good.txt --output-dir b";
    said.push(case.train(server.port, &format!("{run} --split-point-1 0")));
    let other = Server::start(&fixture("llama"), SPLIT);
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
    let line = format!("serve --model-name {model} {SPLIT} --port 0 --store-dir st --log error");
    said.push(case.fails(&mut offshoot(&format!("{line} --memory-limit 1KB"))));
    let server = Server::start(&model, &format!("{SPLIT} --memory-limit 1MB"));
    let run = "--train-file good.txt --output-dir e --batch-size 30 --lora-rank 128";
    said.push(case.train(server.port, run));
}

fn data(case: &Case, said: &mut Vec<String>) {
    let server = Server::start(&fixture("tiny_text"), SPLIT);
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

/// An issuer of certificates for this machine.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    /// Writes NAME.pem.
    fn new(case: &Case, name: &str) -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        case.write(&format!("{name}.pem"), &ca.pem());
        Ca(ca)
    }

    /// Writes NAME.pem and NAME.key.
    fn issue(&self, case: &Case, name: &str, for_whom: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(vec!["trunk.test".to_string()]).unwrap();
        params.extended_key_usages = vec![for_whom];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        case.write(&format!("{name}.pem"), &cert.pem());
        case.write(&format!("{name}.key"), &key.serialize_pem());
    }
}

/// Mistakes of whoever starts a server that others use.
fn openness(case: &Case, said: &mut Vec<String>) {
    let line = format!("serve --model-name {} {SPLIT} --port 0 --log error", fixture("tiny_text"));
    said.push(case.fails(&mut offshoot(&format!("{line} --host 0.0.0.0"))));
    case.write("mistake.toml", "[[tenants]]\nname = \"blue\"\nweight = 0\n");
    let line = format!("{line} --store-dir mistaken --tenants mistake.toml");
    said.push(case.fails(&mut offshoot(&line)));
    said.push(case.fails(&mut offshoot(&format!("{line} --host 0.0.0.0"))));

    let open = Server::start(&fixture("tiny_text"), SPLIT);
    let run = "--train-file good.txt --output-dir f";
    let address = format!("https://127.0.0.1:{}", open.port);
    said.push(case.fails(&mut Case::command_at(&address, run)));
    said.push(open.kill().trim_end().to_string());
}

/// With TLS, tenants and quotas; and what a run says whose server goes away.
fn tenants(case: &Case, said: &mut Vec<String>) {
    let ca = Ca::new(case, "ca");
    Ca::new(case, "other");
    ca.issue(case, "server", ExtendedKeyUsagePurpose::ServerAuth);
    ca.issue(case, "client", ExtendedKeyUsagePurpose::ClientAuth);
    let add = "tenant add blue --sessions 1 --rank 4 --tenants tenants.toml";
    let added = offshoot(add).current_dir(case.0.path()).output().unwrap();
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    case.write("token", &String::from_utf8(added.stdout).unwrap());
    case.write("old-token", "ofs_aaaa_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
    let option = |option: &str, file: &str| format!("--{option} {}", case.path(file));
    let server = [
        SPLIT.to_string(),
        option("tenants", "tenants.toml"),
        option("tls-cert", "server.pem"),
        option("tls-key", "server.key"),
        option("tls-client-ca", "ca.pem"),
    ];
    let server = Server::start(&fixture("tiny_text"), &server.join(" "));

    let run = "--train-file good.txt --max-offline 1s";
    let blue = format!("{run} --output-dir g --token-file token");
    said.push(case.fails(&mut Case::command_at("trunk.invalid:1", &blue)));
    said.push(case.train(server.port, &blue));
    let shown = "--tls-cert client.pem --tls-key client.key";
    let named = "--tls-name trunk.test";
    said.push(case.train(server.port, &format!("{blue} --tls-ca other.pem {named} {shown}")));
    said.push(case.train(server.port, &format!("{blue} --tls-ca ca.pem {shown}")));
    said.push(case.train(server.port, &format!("{blue} --tls-ca ca.pem {named}")));
    let way = format!("--tls-ca ca.pem {named} {shown}");
    let stranger = format!("{run} {way} --output-dir h");
    said.push(case.train(server.port, &stranger));
    said.push(case.train(server.port, &format!("{stranger} --token-file old-token")));
    said.push(case.train(server.port, &format!("{blue} {way} --lora-rank 8")));

    // While one run has the only session, another one cannot begin.
    let long = "--output-dir long --max-steps 100000 --save-interval 20";
    let mut first =
        Case::command(server.port, &format!("{run} {way} --token-file token --lora-rank 4 {long}"));
    first.current_dir(case.0.path()).stdout(Stdio::null()).stderr(Stdio::piped());
    let first = first.spawn().unwrap();
    let began = Instant::now();
    while !case.0.path().join("long/checkpoint_step_20").exists() {
        assert!(began.elapsed() < Duration::from_secs(120), "no step 20 in two minutes");
        thread::sleep(Duration::from_millis(5));
    }
    said.push(case.train(server.port, &format!("{blue} {way} --lora-rank 4")));
    server.kill();
    let output = first.wait_with_output().unwrap();
    assert!(!output.status.success());
    said.push(String::from_utf8(output.stderr).unwrap().trim_end().to_string());
}

/// What is done to sessions from outside.
fn managing(case: &Case, said: &mut Vec<String>) {
    let server = Server::start(&fixture("tiny_text"), SPLIT);
    case.trains(server.port, "--train-file good.txt --output-dir managed --max-steps 1");
    let place = format!("--server 127.0.0.1:{}", server.port);
    let list = offshoot(&format!("sessions list --json {place}")).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let id = list[0]["info"]["session_id"].as_str().unwrap();
    let snapshots = offshoot(&format!("snapshots list {id} --json {place}")).output().unwrap();
    let snapshots: serde_json::Value = serde_json::from_slice(&snapshots.stdout).unwrap();
    let head = snapshots[0]["info"]["snapshot_id"].as_str().unwrap();
    for line in [
        "sessions show nothing".to_string(),
        format!("sessions delete {id}"),
        format!("sessions pin {id}"),
        format!("snapshots delete {id} {head} --yes"),
    ] {
        let mut command = offshoot(&format!("{line} {place}"));
        said.push(case.fails(command.stdin(Stdio::null())));
    }
}

/// What a client does to what it sends, and what a server could read of it.
fn privacy(case: &Case, said: &mut Vec<String>) {
    let run = "--train-file good.txt --output-dir i --hidden-noise 0.5";
    said.push(case.train(unused_port(), run));
    case.write("short.txt", "One text.");
    let line = format!("leak --model-name {} --train-file short.txt", fixture("tiny_text"));
    said.push(case.fails(&mut offshoot(&line)));
}

/// Collects messages.
type Provoke = fn(&Case, &mut Vec<String>);

fn provoked(case: &Case, provoke: Provoke) -> Vec<String> {
    let mut said = Vec::new();
    provoke(case, &mut said);
    said
}

#[test]
fn the_page_quotes_what_the_program_says() {
    let case = &Case::new();
    // Most of the time is waiting.
    let said: Vec<String> = thread::scope(|scope| {
        let all: [Provoke; 8] =
            [connection, mismatches, memory, data, openness, tenants, managing, privacy];
        let all = all.map(|provoke| scope.spawn(move || provoked(case, provoke)));
        all.into_iter().flat_map(|said| said.join().unwrap()).collect()
    });
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
