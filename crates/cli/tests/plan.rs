//! `offshoot plan` as a user runs it, against what a real server then lets in and reports.

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ClientError, ClientOptions, ErrorCode, ForwardInput, HostTensor,
    LoraConfig, MemoryReport, Microbatch, OpenSession, Retry, Session, WireDType,
};
use offshoot_server::{RunningServer, Server, ServerConfig};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const N_TOKENS: usize = 16;
const RANK: u32 = 16;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn offshoot(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.arg("plan").args(args).env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1");
    command.output().unwrap()
}

/// Of layers 1 and 2 of the tiny llama, with two microbatches of 16 tokens in flight.
fn plan(more: &[&str]) -> Value {
    let model = fixture("llama").display().to_string();
    let mut args = vec!["--model", &model, "--split-point-1=1", "--split-point-2=3", "--json"];
    args.extend(["--rank=16", "--tokens-per-microbatch=16", "--max-tokens-per-microbatch=16"]);
    args.extend(["--wire-dtype=f32", "--microbatches=3", "--microbatches-in-flight=2"]);
    args.extend(more);
    let output = offshoot(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(plan: &Value, path: &str) -> u64 {
    plan.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {plan:#}"))
}

/// A server with the plan's budget and a client of it.
struct Planned {
    server: RunningServer,
    client: Client,
    hidden_size: usize,
    _store: tempfile::TempDir,
}

impl Planned {
    async fn start(plan: &Value) -> Planned {
        let store = tempfile::tempdir().unwrap();
        let mut config = ServerConfig::default();
        config.listen.port = 0;
        config.model.name = fixture("llama").display().to_string();
        (config.model.split_point_1, config.model.split_point_2) = (1, 3);
        config.model.n_threads = Some(1);
        config.store.dir = store.path().into();
        config.limits.memory_bytes = Some(number(plan, "/memory/budget_bytes"));
        config.limits.max_tokens_per_microbatch = N_TOKENS;
        // Each job alone, and nobody leaves for another's sake.
        config.limits.max_tokens_per_batch = 1;
        config.limits.admission_wait_seconds = 0.05;
        config.session.turn_seconds = 3600.0;
        config.session.idle_seconds = 3600.0;
        let server = Server::start(config).await.unwrap();
        let retry = Retry { max_elapsed: Duration::from_millis(200), ..Retry::default() };
        let options = ClientOptions { retry, ..ClientOptions::default() };
        let address = server.local_addr().to_string();
        let client = Client::connect_with(&address, options).await.unwrap();
        let hidden_size = client.describe().await.unwrap().hidden_size;
        Planned { server, client, hidden_size, _store: store }
    }

    async fn memory(&self) -> MemoryReport {
        self.client.describe().await.unwrap().memory
    }

    async fn open(&self, seed: u64) -> Result<Session, ClientError> {
        let server = self.client.describe().await?;
        let request = OpenSession {
            name: "planned".into(),
            fingerprint: server.fingerprint,
            split_point_1: server.split_point_1,
            split_point_2: server.split_point_2,
            lora: LoraConfig { r: RANK, lora_alpha: 16.0, ..LoraConfig::default() },
            adamw: ADAMW_DEFAULTS,
            seed,
            wire_dtype: WireDType::F32,
            initial_adapter: Vec::new(),
        };
        self.client.open(request).await
    }

    async fn forward(
        &self,
        session: &Session,
        key: u64,
    ) -> Result<(HostTensor, Microbatch), ClientError> {
        let values: Vec<f32> =
            (0..N_TOKENS * self.hidden_size).map(|i| (i as f32 + key as f32).sin()).collect();
        let shape = vec![N_TOKENS, self.hidden_size];
        let input = ForwardInput {
            hidden: HostTensor::from_f32(&values, shape, WireDType::F32),
            seq_lens: vec![N_TOKENS as u32],
            position_ids: Vec::new(),
            want_input_grad: true,
            dropout_key: key,
        };
        let (output, microbatch, _) = session.forward(input).await?;
        Ok((output, microbatch))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_sessions_train_at_once_as_planned_and_take_the_bytes_that_it_says() {
    let roomy = plan(&["--memory-limit=1GiB", "--sessions=5"]);
    let needed = number(&roomy, "/needed_budget_bytes").to_string();
    let plan = plan(&["--memory-limit", &needed, "--sessions=5"]);
    assert_eq!(number(&plan, "/most/full_tapes"), 5, "{plan:#}");
    assert_eq!(plan["chosen"]["tapes"], "full", "{plan:#}");
    let bytes = |kind: &str| number(&plan, &format!("/chosen/bytes/{kind}"));

    let planned = Planned::start(&plan).await;
    let mut sessions = Vec::new();
    for seed in 0..5 {
        sessions.push(planned.open(seed).await.unwrap());
    }
    let mut open = Vec::new();
    for (key, session) in sessions.iter().flat_map(|session| [session, session]).enumerate() {
        open.push(planned.forward(session, key as u64).await.unwrap());
    }
    // The engine counts a batch when its answers have been sent.
    let mut memory = planned.memory().await;
    for _ in 0..1000 {
        if memory.open_microbatches == 10 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        memory = planned.memory().await;
    }
    println!("{:#}\n{memory:?}", plan["chosen"]);
    let peak = memory.peak.unwrap();
    assert_eq!(memory.weights_bytes, bytes("weights"));
    assert_eq!(memory.adapter_bytes, bytes("adapters"));
    assert_eq!(memory.tape_bytes, bytes("tapes"), "all of them are full");
    assert_eq!(peak.workspace_bytes, bytes("workspace"));
    assert_eq!(memory.open_microbatches, 10);
    assert!(peak.total_bytes <= number(&plan, "/memory/budget_bytes"));

    // What travels: hidden states and gradients of three microbatches in a step, both ways.
    let (output, microbatch) = open.pop().unwrap();
    let step = 3 * 2 * output.n_bytes() as u64;
    assert_eq!(number(&plan, "/network/up_bytes_per_step"), step);
    assert_eq!(number(&plan, "/network/down_bytes_per_step"), step);
    microbatch.backward(output).await.unwrap();

    // There is no room for one more beside them; there is once the others' microbatches are done.
    let Err(error) = planned.open(5).await else { panic!("five were planned") };
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{error}");
    for (output, microbatch) in open {
        microbatch.backward(output).await.unwrap();
    }
    let sixth = planned.open(5).await.unwrap();
    let (output, microbatch) = planned.forward(&sixth, 20).await.unwrap();
    microbatch.backward(output).await.unwrap();
    for session in sessions.into_iter().chain([sixth]) {
        session.close(true).await.unwrap();
    }
    assert_eq!(planned.server.drain(Duration::from_secs(60)).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_adapters_are_on_the_device_than_planned() {
    let roomy = plan(&["--memory-limit=1GiB", "--sessions=1"]);
    let needed = number(&roomy, "/needed_budget_bytes");
    let more = needed + 3 * number(&roomy, "/session/adapter_bytes");
    let plan = plan(&["--memory-limit", &more.to_string()]);
    let most = number(&plan, "/most/on_device");
    assert!(most > number(&plan, "/most/full_tapes"), "{plan:#}");

    let planned = Planned::start(&plan).await;
    let mut sessions = Vec::new();
    for seed in 0..most {
        let session = planned.open(seed).await.unwrap();
        // Who has trained keeps its place for its turn.
        let (output, microbatch) = planned.forward(&session, seed).await.unwrap();
        microbatch.backward(output).await.unwrap();
        sessions.push(session);
    }
    assert_eq!(u64::from(planned.memory().await.sessions_on_device), most);
    let Err(error) = planned.open(most).await else { panic!("there is no room for one more") };
    assert_eq!(error.code(), Some(ErrorCode::Exhausted), "{error}");
    assert_eq!(u64::from(planned.memory().await.sessions_on_device), most);
    for session in sessions {
        session.close(true).await.unwrap();
    }
    assert_eq!(planned.server.drain(Duration::from_secs(60)).await, 0);
}

#[test]
fn a_plan_needs_no_weights_and_says_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    std::fs::copy(fixture("llama").join("config.json"), &config).unwrap();
    let model = config.display().to_string();
    let text = |args: &[&str]| {
        let output = offshoot(&[&["--model", &model], args].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let many = text(&["--memory-limit=16MiB", "--sessions=20", "--tokens-per-microbatch=512"]);
    println!("{many}");
    for part in [
        "the trunk is layers 1 to 3, f32 on cpu",
        "limits.memory_bytes = 16777216",
        "20 sessions that train at the same time",
        "What limits first: tapes",
        "For 20 sessions at full speed, any one of:",
        "--tokens-per-microbatch ",
    ] {
        assert!(many.contains(part), "{part} is not in\n{many}");
    }
    let small = text(&["--memory-limit=10KiB"]);
    assert!(small.contains("The trunk's weights do not fit"), "{small}");
    let gpu = text(&["--gpu-memory=1GiB", "--dtype=bf16", "--rank=300", "--host-memory=1GiB"]);
    assert!(gpu.contains("bf16 on cuda") && gpu.contains("for what the ledger does not"), "{gpu}");
    assert!(gpu.contains("limits.max_rank = 300"), "{gpu}");
    let in_host = "idle in the host's memory";
    assert!(gpu.contains(in_host) && !many.contains(in_host), "on the CPU it is the same memory");

    let refused = |args: &[&str], expected: &str| {
        let output = offshoot(args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(expected), "{error}");
    };
    refused(&["--model", &model], "--gpu-memory");
    refused(&["--model", &model, "--memory-limit=1GiB", "--rank=0"], "expected at least 1");
    refused(&["--model", &model, "--memory-limit=1GiB", "--target-modules=x"], "q_proj");
    refused(&["--model", &model, "--memory-limit=1GiB", "--split-point-2=9"], "split points");
    refused(&["--model", "no/such", "--memory-limit=1GiB"], "no/such");
    // Its weights are not here.
    refused(&["--model", &model, "--memory-limit=1GiB", "--measure"], "--measure");
}

#[test]
fn a_step_is_measured_on_the_real_trunk() {
    let plan = plan(&["--memory-limit=1GiB", "--sessions=3", "--measure", "--measure-seconds=0.2"]);
    let float = |path: &str| plan.pointer(path).and_then(Value::as_f64).unwrap();
    assert_eq!(number(&plan, "/time/measured/together_sessions"), 3);
    let (alone, each) = (float("/time/measured/alone_step_seconds"), float("/time/step_seconds"));
    assert!(alone > 0.0 && each >= alone, "{plan:#}");
    let rate = float("/network/up_mbit_per_second") * 1e6 / 8.0;
    let bytes = number(&plan, "/network/up_bytes_per_step") as f64;
    assert!((rate * each / bytes - 1.0).abs() < 1e-6, "{plan:#}");
}
