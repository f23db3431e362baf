//! The commands for a running server as an operator and a tenant use them: what they print for people and
//! for programs, and how they end.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

fn model() -> String {
    format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"))
}

fn offshoot(dir: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.args(line.split_whitespace()).current_dir(dir).env("OMP_NUM_THREADS", "1");
    command.env_remove("OFFSHOOT_TOKEN").stdin(Stdio::null());
    // Not the user's.
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

/// A folder with texts and tokens, and a server with two tenants and an operator.
struct Place {
    dir: TempDir,
    server: Child,
    port: u16,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        fs::write(dir.path().join("texts.txt"), texts.join("\n\n")).unwrap();
        for (name, more) in [("blue", "--sessions 8"), ("red", ""), ("ops", "--operator")] {
            let line = format!("tenant add {name} {more} --tenants tenants.toml");
            let output = offshoot(dir.path(), &line).output().unwrap();
            fs::write(dir.path().join(format!("{name}.token")), output.stdout).unwrap();
        }
        let line = "serve --split-point-1 1 --split-point-2 3 --threads 1 --log error --port 0 \
                    --tenants tenants.toml --store-dir store --audit-log audit.jsonl";
        let mut command = offshoot(dir.path(), line);
        command.args(["--model-name", &model()]);
        let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim_end().rsplit(':').next().unwrap().parse().expect("it is ready");
        Place { dir, server, port }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, who: &str, line: &str) -> Output {
        let line = format!("{line} --server 127.0.0.1:{} --token-file {who}.token", self.port);
        offshoot(self.dir.path(), &line).output().unwrap()
    }

    /// stdout of a command that must be fine.
    fn fine(&self, who: &str, line: &str) -> String {
        let output = self.run(who, line);
        let (out, err) = (said(&output.stdout), said(&output.stderr));
        assert!(output.status.success(), "{line}: {err}");
        println!("$ offshoot {line}\n{out}");
        out
    }

    fn json(&self, who: &str, line: &str) -> Value {
        serde_json::from_str(&self.fine(who, &format!("{line} --json"))).unwrap()
    }

    /// stderr of one that must not.
    fn fails(&self, who: &str, line: &str) -> String {
        let output = self.run(who, line);
        assert!(!output.status.success(), "{line}");
        said(&output.stderr)
    }

    fn train(&self, who: &str, more: &str) {
        let line = format!(
            "train --train-file texts.txt --max-steps 2 --quiet --output-dir {who} {more} --model-name {}",
            model()
        );
        self.fine(who, &line);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_server_is_watched_and_managed_from_the_command_line() {
    let place = Place::new();
    place.train("blue", "--share-loss");
    place.train("red", "");

    // What programs read.
    let all = place.json("ops", "sessions list");
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 2);
    let of = |tenant: &str| all.iter().find(|view| view["tenant"] == tenant).unwrap();
    let (blue, red) = (of("blue"), of("red"));
    assert_eq!((&blue["info"]["name"], &blue["info"]["step"]), (&"blue".into(), &2.into()));
    assert_eq!(blue["info"]["lora"]["r"], 8);
    assert!(["parked", "detached"].contains(&blue["info"]["state"].as_str().unwrap()));
    assert!(blue["metering"]["tokens"].as_u64().unwrap() > 0);
    assert_eq!(blue["durable_step"], 2);
    let id = blue["info"]["session_id"].as_str().unwrap();
    let red_id = red["info"]["session_id"].as_str().unwrap();
    // A loss is there only where it was shared, and only while the session is live.
    assert!(red["shared_loss"].is_null());

    // A tenant has its own, and names it by a beginning.
    let own = place.json("blue", "sessions list");
    assert_eq!(own.as_array().unwrap().len(), 1);
    let shown = place.json("blue", &format!("sessions show {}", &id[..6]));
    assert_eq!(shown["info"]["session_id"], id);
    let snapshots = shown["snapshots"].as_array().unwrap();
    assert!(snapshots[0]["is_head"] == true && snapshots.len() > 1);
    let text = place.fine("blue", &format!("sessions show {id}"));
    for part in [
        "step          2, durable 2",
        "rank 8",
        "tokens",
        "the session goes on from here",
        "opened",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let error = place.fails("blue", &format!("sessions show {red_id}"));
    assert!(error.contains("no session has an id"), "{error}");
    assert!(place.fine("ops", "sessions list --tenant red").contains(&red_id[..8]));

    // Top, without a terminal, once.
    let text = place.fine("ops", "top --sort name");
    for part in
        ["offshoot ", "serving", "layers 1..3 of 4", "memory", "session", "blue", "red", "queue"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let top = place.json("ops", "top");
    assert_eq!((&top["is_operator"], &top["server"]["health"]), (&true.into(), &"serving".into()));
    assert!(top["server"]["trunk"]["wire_dtypes"].as_array().unwrap().contains(&"bf16".into()));
    assert!(!place.fine("blue", "top").contains("red"));

    // Tenants with use and quotas.
    let tenants = place.json("ops", "tenants");
    let names: Vec<_> =
        tenants.as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["blue", "ops", "red"]);
    assert_eq!(tenants[0]["quotas"][0]["limit"], 8);
    let text = place.fine("ops", "tenants");
    assert!(text.contains("operator") && text.contains(" of 8"), "{text}");
    assert_eq!(place.json("red", "tenants").as_array().unwrap().len(), 1);

    // Deleting wants to be meant.
    let name = snapshots.last().unwrap()["info"]["snapshot_id"].as_str().unwrap();
    let error = place.fails("blue", &format!("snapshots delete {id} {name}"));
    assert!(error.contains("--yes") && error.contains(name), "{error}");
    place.fine("blue", &format!("snapshots delete {id} {name} --yes"));
    let left = place.json("blue", &format!("snapshots list {id}"));
    assert_eq!(left.as_array().unwrap().len(), snapshots.len() - 1);
    let head = left[0]["info"]["snapshot_id"].as_str().unwrap();
    let error = place.fails("blue", &format!("snapshots delete {id} {head} --yes"));
    assert!(error.contains("goes on from"), "{error}");
    let text = place.fine("ops", &format!("sessions evict {}", &red_id[..8]));
    assert!(text.starts_with("evicted ") && text.contains("(red)"), "{text}");
    let error = place.fails("ops", &format!("sessions delete {id}"));
    assert!(error.contains("--yes") && error.contains("of blue at step 2"), "{error}");
    let done = place.json("ops", &format!("sessions delete {id} --yes"));
    assert_eq!((&done[0]["session_id"], &done[0]["done"]), (&id.into(), &"deleted".into()));
    assert_eq!(place.fine("blue", "sessions list"), "There is no session.\n");

    // Who did that to whom is written down.
    let audit = fs::read_to_string(place.path("audit.jsonl")).unwrap();
    let line = |action: &str| {
        let lines = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut newest = lines.rev();
        newest.find(|line| line["action"] == action && line["outcome"] == "ok").unwrap()
    };
    let forgotten = line("forget");
    assert_eq!((&forgotten["tenant"], &forgotten["owner"]), (&"ops".into(), &"blue".into()));
    assert_eq!(line("delete_snapshot")["snapshot"], name);
    assert_eq!(line("delete_snapshot")["owner"], Value::Null);
}

#[test]
fn health_is_an_exit_status() {
    let place = Place::new();
    // Without a token, as a probe has none.
    let health = |more: &str| {
        let line = format!("health --server-host 127.0.0.1 --server-port {} {more}", place.port);
        offshoot(place.dir.path(), &line).output().unwrap()
    };
    let fine = health("");
    assert_eq!((fine.status.code(), said(&fine.stdout)), (Some(0), "serving\n".into()));
    let fine = health("--json --service offshoot.v1.TrunkService");
    assert!(fine.status.success() && said(&fine.stdout).contains("\"status\": \"serving\""));
    let unknown = health("--service nobody");
    assert_eq!(
        (unknown.status.code(), said(&unknown.stdout)),
        (Some(1), "unknown service\n".into())
    );

    // Where nothing listens; the port was free a moment ago.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let line = format!("health --server 127.0.0.1:{port} --timeout 2s");
    let away = offshoot(place.dir.path(), &line).output().unwrap();
    assert_eq!(away.status.code(), Some(1));
    assert!(said(&away.stderr).contains("no answer from"), "{}", said(&away.stderr));
    let away = offshoot(place.dir.path(), &format!("{line} --json")).output().unwrap();
    let told: Value = serde_json::from_slice(&away.stdout).unwrap();
    assert_eq!((away.status.code(), &told["status"]), (Some(1), &"unreachable".into()));
    // One that speaks something else within TLS.
    let tls = health("--tls-ca /nowhere.pem");
    assert!(!tls.status.success() && said(&tls.stderr).contains("/nowhere.pem"), "{tls:?}");
}
