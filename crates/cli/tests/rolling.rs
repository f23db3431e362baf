//! `offshoot serve` beside another one on the same store, and how it ends.

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ForwardInput, HostTensor, LoraConfig, Microbatch, OpenSession, Session,
    WireDType,
};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server process and its lines. Dropped, it is killed.
struct Server {
    process: Child,
    lines: mpsc::Receiver<String>,
}

impl Server {
    fn start(store: &Path, more: &str) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
        command.args("serve --split-point-1 1 --split-point-2 3 --threads 1 --port 0".split(' '));
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/llama");
        command.args(["--model-name", model, "--log", "info", "--store-dir"]).arg(store);
        command.args(more.split_whitespace()).env("OMP_NUM_THREADS", "1");
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (say, lines) = mpsc::channel();
        let (out, log) = (process.stdout.take().unwrap(), process.stderr.take().unwrap());
        let also = say.clone();
        std::thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).for_each(|line| drop(say.send(line)));
        });
        std::thread::spawn(move || {
            BufReader::new(log)
                .lines()
                .map_while(Result::ok)
                .for_each(|line| drop(also.send(line)));
        });
        Server { process, lines }
    }

    /// The next line of either kind with this in it.
    fn says(&self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("it never said {part:?}"));
            println!("{line}");
            if line.contains(part) {
                return line;
            }
        }
    }

    fn address(&self) -> String {
        let line = self.says("ready grpc=");
        line.trim_start_matches("ready grpc=").split(' ').next().unwrap().to_string()
    }

    fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    fn ends(mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                self.lines.try_iter().for_each(|line| println!("{line}"));
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A session with an open microbatch.
async fn open(address: &str) -> (Session, Microbatch) {
    let client = Client::connect(address).await.unwrap();
    let server = client.describe().await.unwrap();
    let request = OpenSession {
        name: "roll".into(),
        fingerprint: server.fingerprint,
        split_point_1: server.split_point_1,
        split_point_2: server.split_point_2,
        lora: LoraConfig { r: 2, lora_alpha: 4.0, ..Default::default() },
        adamw: ADAMW_DEFAULTS,
        seed: 1,
        wire_dtype: WireDType::F32,
        initial_adapter: vec![],
    };
    let session = client.open(request).await.unwrap();
    let hidden = vec![0.5; 2 * server.hidden_size];
    let input = ForwardInput {
        hidden: HostTensor::from_f32(&hidden, vec![2, server.hidden_size], WireDType::F32),
        seq_lens: vec![2],
        position_ids: vec![],
        want_input_grad: false,
        dropout_key: 1,
    };
    let (_, microbatch, _) = session.forward(input).await.unwrap();
    (session, microbatch)
}

#[test]
fn a_successor_waits_for_the_store_and_ends_when_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let old = Server::start(&store, "");
    old.address();
    let refused = Server::start(&store, "");
    assert!(refused.says("error: ").contains("in use by another process"));
    assert_eq!(refused.ends().code(), Some(1));

    let waits = "--store-wait-seconds 600";
    let [given_up, next] = [Server::start(&store, waits), Server::start(&store, waits)];
    for waiting in [&given_up, &next] {
        assert!(waiting.says("standby store=").ends_with(store.to_str().unwrap()));
    }
    given_up.terminate();
    assert_eq!(given_up.ends().code(), Some(0));
    old.terminate();
    next.address();
    assert_eq!(old.ends().code(), Some(0));
    next.terminate();
    assert_eq!(next.ends().code(), Some(0));
}

/// Also that it says how far it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_waits_for_no_microbatch_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "--drain-timeout-seconds 100000");
    let (_session, _microbatch) = open(&server.address()).await;
    server.terminate();
    let line = server.says("with_open_microbatches");
    assert!(
        line.contains("sessions_left=1") && line.contains("with_open_microbatches=1"),
        "{line}"
    );
    server.terminate();
    server.says("drained with an open microbatch");
    // What there was of it is saved.
    assert_eq!(server.ends().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_tells_that_something_could_not_be_saved() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "--drain-timeout-seconds 5");
    let (_session, microbatch) = open(&server.address()).await;
    drop(microbatch);
    fs::rename(dir.path().join("blobs"), dir.path().join("elsewhere")).unwrap();
    server.terminate();
    server.says("error: 1 sessions could not be saved");
    assert_eq!(server.ends().code(), Some(3));
}

#[test]
fn a_store_is_backed_up_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let [store, copy] = ["store", "copy"].map(|name| dir.path().join(name));
    let server = Server::start(&store, "");
    server.address();
    let offshoot = |args: &[&str], paths: &[&Path]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
        let output = command.arg("store").args(args).args(paths).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = offshoot(&["backup"], &[&store, &copy]);
    assert!(code == Some(0) && text.contains("0 sessions, 0 snapshots"), "{code:?} {text}");
    let (code, text) = offshoot(&["check"], &[&copy]);
    assert!(code == Some(0) && text.contains("0 damaged"), "{code:?} {text}");
    let (code, text) = offshoot(&["backup"], &[&store, &copy]);
    assert!(code == Some(1) && text.contains("a new folder"), "{code:?} {text}");
    let (code, text) = offshoot(&["check"], &[&dir.path().join("none")]);
    assert!(code == Some(1) && text.contains("no store is there"), "{code:?} {text}");
    server.terminate();
    assert_eq!(server.ends().code(), Some(0));
}
