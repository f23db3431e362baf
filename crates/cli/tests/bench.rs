//! `offshoot bench` as a process: what it counts must agree with what it was asked for. No test here
//! looks at a speed.

use serde_json::Value;
use std::process::{Command, Output};

const TRUNK: &str = "--split-point-1 1 --split-point-2 3 --threads 1";

fn bench(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.arg("bench").args(line.split_whitespace()).env("OMP_NUM_THREADS", "1");
    command.output().unwrap()
}

/// Runs it on the tiny llama; gives what it prints and what it writes.
fn measure(line: &str) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bench.json");
    let model = format!("{}/../../tests/fixtures/llama", env!("CARGO_MANIFEST_DIR"));
    let output = bench(&format!("--model {model} {TRUNK} --json {} {line}", file.display()));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let text = String::from_utf8(output.stdout).unwrap();
    (text, serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// What holds whatever was measured: sums, orders, and bounds.
fn assert_consistent(json: &Value) {
    let sessions = json["sessions"].as_array().unwrap();
    let seconds = number(&json["seconds"]);
    let mut n_tokens = 0.0;
    for session in sessions {
        let of_one = number(&session["sequences"]) * number(&session["tokens"]);
        let own = number(&session["n_tokens"]);
        assert_eq!(own, of_one * number(&session["microbatches"]), "{session}");
        let speed = own / number(&session["seconds"]);
        assert!((speed / number(&session["tokens_per_second"]) - 1.0).abs() < 1e-9, "{session}");
        assert!(number(&session["seconds"]) <= seconds, "{session}");
        n_tokens += own;
    }
    let speed = n_tokens / seconds;
    assert!((speed / number(&json["tokens_per_second"]) - 1.0).abs() < 1e-9, "{json}");
    let jain = number(&json["jain_index"]);
    assert!(jain >= 1.0 / sessions.len() as f64 - 1e-9 && jain <= 1.0 + 1e-9, "{jain}");
    for group in json["latency_seconds"].as_object().unwrap().values() {
        for frames in group.as_object().unwrap().values() {
            let part = |name: &str| ["p50", "p99"].map(|p| number(&frames[name][p]));
            for name in ["round_trip", "wire", "queue", "execute"] {
                let [p50, p99] = part(name);
                assert!(p50 <= p99 && p50 >= 0.0, "{name}: {frames}");
                assert!(p99 <= part("round_trip")[1], "{name}: {frames}");
            }
            let batch = number(&frames["mean_batch_jobs"]);
            assert!(batch == 0.0 || batch >= 1.0, "{frames}");
            // No frame is answered without being computed.
            assert!(number(&frames["count"]) == 0.0 || part("execute")[0] > 0.0, "{frames}");
        }
    }
    let (begin, peak) = (&json["memory"]["begin"], &json["memory"]["peak"]);
    for (kind, bytes) in begin.as_object().unwrap() {
        assert!(number(bytes) <= number(&peak[kind]), "{kind}: {json}");
    }
    // What is there at any time was counted by the server.
    for kind in ["adapters", "tapes", "workspace"] {
        let since_start = number(&peak[format!("{kind}_bytes_since_start")]);
        assert!(since_start >= number(&peak[format!("{kind}_bytes")]), "{kind}: {peak}");
        assert!(since_start > 0.0 || kind == "tapes", "{kind}: {peak}");
    }
    assert!(number(&peak["weights_bytes"]) > 0.0 && number(&peak["adapters_bytes"]) > 0.0);
}

/// One field of all sessions.
fn of_sessions(json: &Value, field: &str) -> Vec<f64> {
    json["sessions"].as_array().unwrap().iter().map(|session| number(&session[field])).collect()
}

#[test]
fn a_given_number_of_steps_is_counted_exactly() {
    let line = "--sessions 3 --sequences 2 --tokens 5 --steps 4 --warm-up 1 --accumulate 2";
    let (text, json) = measure(line);
    assert_consistent(&json);
    assert_eq!(of_sessions(&json, "steps"), [4.0; 3]);
    assert_eq!(of_sessions(&json, "microbatches"), [8.0; 3]);
    assert_eq!(of_sessions(&json, "n_tokens"), [80.0; 3]);
    for kind in ["forward", "backward"] {
        assert_eq!(json["latency_seconds"]["all"][kind]["count"], 24, "{json}");
    }
    assert_eq!(json["setting"]["server_in_this_process"], true);
    assert!(number(&json["memory"]["peak"]["tapes_bytes_since_start"]) > 0.0, "{json}");
    for expected in ["24 microbatches", "Jain's fairness index", "execute", "layers 1..3 of 4"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn unlike_sessions_overlap_behind_a_slow_link_beside_idle_ones() {
    let (text, json) = measure(
        "--sessions 3 --sequences 1 --tokens 4 --heavy 2x9 --adapters different --rank 4 \
         --idle-sessions 2 --steps 2 --warm-up 1 --in-flight 3 --accumulate 4 \
         --wire-dtype f32 --latency-ms 1 --bandwidth-mbit 1000",
    );
    assert_consistent(&json);
    assert_eq!(of_sessions(&json, "tokens"), [4.0, 4.0, 4.0, 9.0]);
    assert_eq!(of_sessions(&json, "n_tokens"), [32.0, 32.0, 32.0, 144.0]);
    assert_eq!(of_sessions(&json, "rank"), [4.0, 2.0, 8.0, 4.0]);
    let latencies = &json["latency_seconds"];
    assert_eq!(latencies["others"]["backward"]["count"], 24);
    assert_eq!(latencies["heavy"]["forward"]["count"], 8);
    // There and back.
    assert!(number(&latencies["others"]["forward"]["wire"]["p50"]) >= 2e-3, "{latencies}");
    assert!(number(&json["memory"]["begin"]["adapters_bytes"]) > 0.0);
    assert!(text.contains("one of 2 x 9") && text.contains("backward, heavy"), "{text}");
}

#[test]
fn evaluation_has_no_backward() {
    let (text, json) = measure("--mode eval --sessions 2 --sequences 1 --tokens 3 --seconds 0.2");
    assert_consistent(&json);
    assert_eq!(number(&json["seconds"]), 0.2);
    let microbatches: f64 = of_sessions(&json, "microbatches").iter().sum();
    assert_eq!(number(&json["latency_seconds"]["all"]["forward"]["count"]), microbatches);
    assert_eq!(json["latency_seconds"]["all"]["backward"]["count"], 0);
    assert_eq!(json["memory"]["peak"]["open_microbatches"], 0);
    assert!(!text.contains("\nbackward"), "{text}");
}

#[test]
fn what_the_server_does_not_allow_is_explained() {
    let model = format!("{}/../../tests/fixtures/llama", env!("CARGO_MANIFEST_DIR"));
    for (line, expected) in [
        ("--rank 100000", "--rank is 100000, the server allows"),
        ("--in-flight 1000", "--in-flight is 1000, the server allows"),
        ("--heavy 2x100000", "2 x 100000 are 200000 tokens, the server allows"),
    ] {
        let output = bench(&format!("--model {model} {TRUNK} {line}"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {error}");
        assert!(error.contains(expected), "{line}: {error}");
    }
}
