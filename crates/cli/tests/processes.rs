//! The two commands as processes: what they print, how they end, and that a run whose server or
//! trainer is killed ends with the same numbers as one that nobody disturbed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_offshoot");
const N_STEPS: u64 = 40;

fn model() -> String {
    format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"))
}

fn offshoot(line: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(line.split_whitespace()).env("OMP_NUM_THREADS", "1");
    // Not the user's.
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
}

/// A process that is killed when the test is over.
struct Guard(Child);

impl Guard {
    fn wait(mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }

    fn kill(self) {}
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server; gives it and its port when it is ready. It runs each job alone: which jobs wait
/// together is a matter of time, and products of more rows are rounded in another way.
fn serve(store: &Path, port: u16) -> (Guard, u16) {
    let mut command = offshoot("serve --split-point-1 1 --split-point-2 3 --threads 1 --log warn");
    command.args(["--model-name", &model(), "--port", &port.to_string(), "--store-dir"]).arg(store);
    command.env("OFFSHOOT_LIMITS__MAX_TOKENS_PER_BATCH", "1");
    let mut server = Guard(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address =
        line.trim_end().strip_prefix("ready grpc=127.0.0.1:").expect("it says when ready");
    (server, address.parse().unwrap())
}

/// Texts and output directories.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        fs::write(dir.path().join("train.txt"), texts.join("\n\n")).unwrap();
        fs::write(dir.path().join("eval.txt"), "The last branch has no leaves.").unwrap();
        Place(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn train(&self, port: u16, output: &str, more: &str) -> Command {
        let mut command = offshoot(&format!(
            "train --server-host 127.0.0.1 --server-port {port} --max-steps {N_STEPS} \
             --batch-size 2 --learning-rate 3e-3 --save-interval 5 --eval-interval 4 \
             --wire-dtype f32 {more}"
        ));
        command.args(["--model-name", &model()]);
        for (option, name) in
            [("--train-file", "train.txt"), ("--eval-file", "eval.txt"), ("--output-dir", output)]
        {
            command.arg(option).arg(self.path(name));
        }
        command.stdout(Stdio::null());
        command
    }

    /// Starts a run and returns when it has taken `step` steps.
    fn train_until(&self, port: u16, output: &str, more: &str, step: usize) -> Guard {
        let run = Guard(self.train(port, output, more).spawn().unwrap());
        self.wait_for(output, step);
        run
    }

    fn wait_for(&self, output: &str, step: usize) {
        let began = Instant::now();
        while self.losses(output).len() < step {
            assert!(began.elapsed() < Duration::from_secs(120), "no step {step} in two minutes");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Loss and gradient norm of each step, as `metrics.jsonl` has them.
    fn losses(&self, output: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap_or_default();
        let steps = text.lines().filter_map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            (event["event"] == "step").then(|| format!("{} {}", event["loss"], event["grad_norm"]))
        });
        steps.collect()
    }

    fn adapter(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("adapter/adapter_model.safetensors")).unwrap()
    }

    fn assert_same_runs(&self, found: &str, expected: &str) {
        let (found_losses, expected_losses) = (self.losses(found), self.losses(expected));
        assert_eq!(expected_losses.len(), N_STEPS as usize);
        assert_eq!(found_losses, expected_losses);
        assert!(self.adapter(found) == self.adapter(expected), "the adapters differ");
    }
}

#[test]
fn killed_on_either_side_equals_uninterrupted() {
    let place = Place::new();
    let (server, port) = serve(&place.path("store"), 0);
    let accumulate = "--gradient-accumulation-steps 3 --microbatches-in-flight ";
    let [one, three] = ["1", "3"].map(|n| format!("{accumulate}{n}"));
    assert!(place.train(port, "straight", &one).status().unwrap().success());

    // The server dies in the middle, twice; the trainer goes back to what is durable by itself.
    let run = place.train_until(port, "server-killed", &three, 13);
    server.kill();
    let (server, _) = serve(&place.path("store"), port);
    place.wait_for("server-killed", 22);
    server.kill();
    let (server, _) = serve(&place.path("store"), port);
    assert!(run.wait().success());
    place.assert_same_runs("server-killed", "straight");

    // The trainer dies; its last checkpoint is resumed.
    place.train_until(port, "trainer-killed", &three, 13).kill();
    let resume = format!("{three} --resume latest");
    assert!(place.train(port, "trainer-killed", &resume).status().unwrap().success());
    place.assert_same_runs("trainer-killed", "straight");
    signal(&server.0, "-TERM");
    assert!(server.wait().success());
}

#[test]
fn the_server_may_die_before_the_first_checkpoint() {
    let place = Place::new();
    let (server, port) = serve(&place.path("store"), 0);
    assert!(place.train(port, "straight", "").status().unwrap().success());
    let run = place.train_until(port, "early", "", 2);
    server.kill();
    let (_server, _) = serve(&place.path("store"), port);
    assert!(run.wait().success());
    place.assert_same_runs("early", "straight");
}

#[test]
fn ctrl_c_saves_and_the_run_goes_on_exactly() {
    let place = Place::new();
    let (server, port) = serve(&place.path("store"), 0);
    assert!(place.train(port, "straight", "").status().unwrap().success());
    let run = place.train_until(port, "stopped", "", 7);
    signal(&run.0, "-INT");
    assert_eq!(run.wait().code(), Some(130));
    let n_before = place.losses("stopped").len();
    assert!((7..N_STEPS as usize).contains(&n_before), "{n_before}");
    assert!(place.path("stopped").join(format!("checkpoint_step_{n_before}")).is_dir());
    assert!(place.train(port, "stopped", "--resume latest").status().unwrap().success());
    place.assert_same_runs("stopped", "straight");
    signal(&server.0, "-INT");
    assert!(server.wait().success());
}

fn failure(output: &Output) -> String {
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[test]
fn mistakes_are_said_before_anything_begins() {
    let text = failure(&offshoot("serve --device tpu").output().unwrap());
    for said in ["model.name", "model.split_point_2", "model.device"] {
        assert!(text.contains(said), "{text}");
    }
    let text = failure(
        &offshoot("train --model-name nowhere --train-file t --server-port 1").output().unwrap(),
    );
    assert!(text.contains("no answer from localhost:1"), "{text}");
    let text =
        failure(&offshoot("train --model-name m --train-file t --device cuda").output().unwrap());
    assert!(text.contains("LD_LIBRARY_PATH") || text.contains("driver"), "{text}");
}
