//! What generation promises: the text of the uncut model, token by token what Transformers and PEFT
//! generate, wherever the layers run, with one row of hidden states each way for each token, and
//! whatever the server forgets in between.

use offshoot_client::{Client, ClientError, ClientOptions, Retry, WireDType};
use offshoot_model::ModelConfig;
use offshoot_model::weights::Checkpoint;
use offshoot_server::ServerConfig;
use offshoot_tests::child::{self, Child};
use offshoot_tests::proxy::Proxy;
use offshoot_tests::{TestServer, fixture, server_config};
use offshoot_trainer::TrainError;
use offshoot_trainer::adapter::{Adapter, Visit, VisitOptions};
use offshoot_trainer::generate::{
    Decoder, EndReason, GenerateOptions, Generated, Request, Sampling, WholeModel, end_ids,
};
use offshoot_trainer::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind};

/// Longer prompts come to the server in several frames.
const MAX_TOKENS_AT_ONCE: usize = 8;

/// What Transformers and PEFT have generated; see make_generations.py.
struct Case {
    model: String,
    with_adapter: bool,
    prompt: Vec<u32>,
    options: GenerateOptions,
    ids: Vec<u32>,
    end: EndReason,
    text: Option<String>,
}

impl Case {
    fn read_all() -> Vec<Case> {
        let text = std::fs::read_to_string(fixture("generations.json")).unwrap();
        let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
        cases.iter().map(Case::parse).collect()
    }

    fn parse(case: &Value) -> Case {
        let ids = |field: &str| {
            let list = case[field].as_array().unwrap();
            list.iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>()
        };
        let repetition_penalty = case["repetition_penalty"].as_f64().unwrap();
        Case {
            model: case["model"].as_str().unwrap().into(),
            with_adapter: case["adapter"].as_bool().unwrap(),
            prompt: ids("prompt"),
            options: GenerateOptions {
                max_new_tokens: case["max_new_tokens"].as_u64().unwrap() as usize,
                sampling: Sampling { repetition_penalty, ..Sampling::greedy() },
                ..GenerateOptions::default()
            },
            ids: ids("ids"),
            end: match case["ended"].as_bool().unwrap() {
                true => EndReason::Eos,
                false => EndReason::Length,
            },
            text: case["text"].as_str().map(String::from),
        }
    }

    fn assert_generated(&self, found: &Generated, way: &str) {
        let Case { model, with_adapter, prompt, .. } = self;
        let what = format!("{model}, adapter {with_adapter}, {} tokens, {way}", prompt.len());
        assert_eq!(found.ids, self.ids, "{what}");
        assert_eq!(found.end, self.end, "{what}");
        assert_eq!(found.n_prompt, prompt.len());
        if let Some(text) = &self.text {
            // Half a character at the end is left out.
            let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
            assert_eq!(&found.text, whole, "{what}");
        }
    }

    /// The tokens that ran: the last one drawn did not.
    fn ran(&self) -> Vec<u32> {
        let mut ids = [&self.prompt[..], &self.ids].concat();
        if self.end == EndReason::Length {
            ids.pop();
        }
        ids
    }

    /// How many of them a decoder need not run that was shown `before`.
    fn n_shared(&self, before: &[u32]) -> usize {
        let same = before.iter().zip(&self.prompt).take_while(|(a, b)| a == b).count();
        same.min(self.prompt.len() - 1)
    }
}

/// A model of the fixtures.
struct Model {
    checkpoint: Checkpoint,
    config: ModelConfig,
    adapter: Option<Adapter>,
    tokenizer: Option<Tokenizer>,
    end_ids: Vec<u32>,
}

impl Model {
    fn load(name: &str, with_adapter: bool) -> Model {
        let dir = fixture(name);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let config = ModelConfig::from_json(checkpoint.config()).unwrap();
        let adapter = with_adapter
            .then(|| Adapter::read(&dir.join("adapter")).unwrap().fit(&config).unwrap());
        let tokenizer =
            dir.join("tokenizer.json").is_file().then(|| Tokenizer::load(&checkpoint).unwrap());
        let end_ids = end_ids(&checkpoint, tokenizer.as_ref()).unwrap();
        Model { checkpoint, config, adapter, tokenizer, end_ids }
    }

    fn request<'a>(&'a self, prompt: &'a [u32], options: &'a GenerateOptions) -> Request<'a> {
        let tokenizer = self.tokenizer.as_ref();
        Request { prompt, options, end_ids: &self.end_ids, tokenizer }
    }

    fn whole(&self) -> WholeModel {
        let adapter = self.adapter.as_ref();
        let place = (Kind::Float, Device::Cpu);
        WholeModel::load(&self.checkpoint, &self.config, adapter, place).unwrap()
    }

    async fn visit(&self, client: &Client) -> Visit {
        let options = VisitOptions {
            client,
            checkpoint: &self.checkpoint,
            config: &self.config,
            adapter: self.adapter.as_ref(),
            name: "generation",
            wire_dtype: WireDType::F32,
            kind: Kind::Float,
            device: Device::Cpu,
        };
        Visit::begin(options).await.unwrap_or_else(|error| panic!("{error}"))
    }

    async fn generate(
        &self,
        decoder: &mut Decoder<'_>,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Generated, TrainError> {
        let mut pieces = String::new();
        let request = self.request(prompt, options);
        let done = decoder.generate(&request, &mut |piece| pieces += piece).await?;
        assert_eq!(pieces, done.text, "what is given away is the text");
        Ok(done)
    }
}

/// Layers 1 and 2 of a fixture; chunks of a prompt are smaller than most prompts.
fn server_of(model: &str, store: &Path) -> ServerConfig {
    let mut config = server_config(store);
    config.model.name = fixture(model).display().to_string();
    config.limits.max_tokens_per_microbatch = MAX_TOKENS_AT_ONCE;
    config
}

async fn connect(endpoint: &str) -> Client {
    let retry = Retry {
        first_delay: Duration::from_millis(2),
        max_delay: Duration::from_millis(50),
        max_elapsed: Duration::from_secs(60),
    };
    let options = ClientOptions { retry, ..ClientOptions::default() };
    Client::connect_with(endpoint, options).await.unwrap()
}

#[test]
fn child_process() {
    child::serve_if_asked();
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_equals_transformers_on_this_machine() {
    for case in Case::read_all() {
        let model = Model::load(&case.model, case.with_adapter);
        let whole = model.whole();
        let mut decoder = Decoder::whole(&whole);
        let found = model.generate(&mut decoder, &case.prompt, &case.options).await.unwrap();
        case.assert_generated(&found, "whole");
        assert_eq!((found.traffic.sent_bytes, found.traffic.received_bytes), (0, 0));
        decoder.remember(false);
        let found = model.generate(&mut decoder, &case.prompt, &case.options).await.unwrap();
        case.assert_generated(&found, "whole, without a cache");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_equals_transformers_through_a_server_with_one_row_a_token_each_way() {
    let cases = Case::read_all();
    for name in ["gpt2", "llama", "qwen2", "qwen3", "gemma", "tiny_text"] {
        let store = tempfile::tempdir().unwrap();
        let server = TestServer::start_with(server_of(name, store.path())).await;
        let client = connect(&server.endpoint()).await;
        let mut n_cases = 0;
        for with_adapter in [false, true] {
            let mine: Vec<&Case> = cases
                .iter()
                .filter(|case| case.model == name && case.with_adapter == with_adapter)
                .collect();
            if mine.is_empty() {
                continue;
            }
            let model = Model::load(name, with_adapter);
            let mut visit = model.visit(&client).await;
            let row = 4 * model.config.hidden_size as u64;
            let mut decoder = Decoder::visiting(&visit.model, &mut visit.session, &client);
            // One after the other with one decoder: each goes back to what it shares with the last.
            let mut before = Vec::new();
            for case in &mine {
                let found =
                    model.generate(&mut decoder, &case.prompt, &case.options).await.unwrap();
                case.assert_generated(&found, "split");
                let bytes = row * (case.ran().len() - case.n_shared(&before)) as u64;
                assert_eq!(found.traffic.sent_bytes, bytes, "{name}: one row a token there");
                assert_eq!(found.traffic.received_bytes, bytes, "{name}: one row a token back");
                before = case.ran();
            }
            decoder.close().await.unwrap();
            n_cases += mine.len();
            visit.end(Ok(())).await.unwrap();
        }
        assert!(n_cases >= 3, "{name}");
        assert!(client.list_sessions().await.unwrap().is_empty(), "no session stays behind");
        server.drain().await;
    }
}

/// The llama case that goes through most different tokens.
fn restless_case() -> Case {
    let different = |case: &Case| case.ids.iter().collect::<std::collections::BTreeSet<_>>().len();
    let cases = Case::read_all().into_iter().filter(|case| case.model == "llama");
    cases.filter(|case| case.with_adapter).max_by_key(different).unwrap()
}

/// Generates the first `n` tokens of the case, lets `meanwhile` happen, and generates the rest.
async fn with_a_break(
    case: &Case,
    model: &Model,
    decoder: &mut Decoder<'_>,
    n: usize,
    meanwhile: impl AsyncFnOnce(),
) -> Generated {
    let mut options = GenerateOptions { max_new_tokens: n, ..case.options.clone() };
    let first = model.generate(decoder, &case.prompt, &options).await.unwrap();
    assert_eq!(first.ids, case.ids[..n]);
    meanwhile().await;
    let text: Vec<u32> = case.prompt.iter().chain(&first.ids).copied().collect();
    options.max_new_tokens = case.options.max_new_tokens - n;
    let mut rest = model.generate(decoder, &text, &options).await.unwrap();
    rest.ids = [first.ids, rest.ids].concat();
    rest.n_prompt = case.prompt.len();
    rest
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_forgot_is_shown_again() {
    let case = restless_case();
    let model = Model::load(&case.model, true);
    let store = tempfile::tempdir().unwrap();
    let server = TestServer::start_with(server_of("llama", store.path())).await;
    let client = connect(&server.endpoint()).await;
    let Visit { model: split, session } = model.visit(&client).await;
    let mut decoder = Decoder::split(&split, &session);
    let row = 4 * model.config.hidden_size as u64;
    let found = with_a_break(&case, &model, &mut decoder, 12, async || {
        session.drop_cache(1).await.unwrap();
    })
    .await;
    case.assert_generated(&found, "the cache was dropped");
    // One row found the cache gone, then all came again.
    let after = (case.prompt.len() + case.ids.len() - 1) as u64;
    assert_eq!(found.traffic.sent_bytes, row * (after + 1));
    assert_eq!(found.traffic.received_bytes, row * after);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_changes_no_text() {
    let case = restless_case();
    let model = Model::load(&case.model, true);
    let store = tempfile::tempdir().unwrap();
    let first = Child::start(store.path());
    let proxy = Proxy::start(first.address()).await.unwrap();
    let client = connect(&proxy.endpoint()).await;
    let mut visit = model.visit(&client).await;
    let mut decoder = Decoder::visiting(&visit.model, &mut visit.session, &client);
    let mut second = None;
    let found = with_a_break(&case, &model, &mut decoder, 9, async || {
        first.kill();
        let child = Child::start(store.path());
        proxy.set_upstream(Some(child.address()));
        second = Some(child);
    })
    .await;
    case.assert_generated(&found, "the server was killed");
    drop(decoder);
    visit.end(Ok(())).await.unwrap();
    assert!(client.list_sessions().await.unwrap().is_empty());
    assert!(second.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_lent_a_session_is_told_that_the_server_was_killed() {
    let case = restless_case();
    let model = Model::load(&case.model, true);
    let store = tempfile::tempdir().unwrap();
    let first = Child::start(store.path());
    let proxy = Proxy::start(first.address()).await.unwrap();
    let client = connect(&proxy.endpoint()).await;
    let visit = model.visit(&client).await;
    let mut decoder = Decoder::split(&visit.model, &visit.session);
    let options = GenerateOptions { max_new_tokens: 3, ..case.options.clone() };
    model.generate(&mut decoder, &case.prompt, &options).await.unwrap();
    first.kill();
    let second = Child::start(store.path());
    proxy.set_upstream(Some(second.address()));
    let error = model.generate(&mut decoder, &case.prompt, &options).await.unwrap_err();
    assert!(matches!(error, TrainError::Client(ClientError::RolledBack { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_texts_at_once_do_not_meet() {
    let cases: Vec<Case> =
        Case::read_all().into_iter().filter(|case| case.model == "llama").collect();
    let store = tempfile::tempdir().unwrap();
    let mut config = server_of("llama", store.path());
    // All that waits goes into one batch.
    config.limits.max_tokens_per_batch = 4096;
    let server = TestServer::start_with(config).await;
    let endpoint = server.endpoint();
    let threads: Vec<_> = cases
        .into_iter()
        .map(|case| {
            let endpoint = endpoint.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    let client = connect(&endpoint).await;
                    let model = Model::load(&case.model, case.with_adapter);
                    let mut visit = model.visit(&client).await;
                    let mut decoder = Decoder::visiting(&visit.model, &mut visit.session, &client);
                    for _ in 0..3 {
                        let found = model
                            .generate(&mut decoder, &case.prompt, &case.options)
                            .await
                            .unwrap();
                        case.assert_generated(&found, "beside others");
                    }
                    visit.end(Ok(())).await.unwrap();
                });
            })
        })
        .collect();
    assert!(threads.len() >= 6);
    for thread in threads {
        tokio::task::spawn_blocking(|| thread.join()).await.unwrap().unwrap();
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_ends_where_the_context_ends() {
    let model = Model::load("gpt2", false);
    let whole = model.whole();
    let mut decoder = Decoder::whole(&whole);
    assert_eq!(decoder.context(), 64);
    let options = GenerateOptions {
        // No end token before that.
        min_new_tokens: 50,
        sampling: Sampling::greedy(),
        ..GenerateOptions::default()
    };
    let prompt: Vec<u32> = (3..63).collect();
    let found = model.generate(&mut decoder, &prompt, &options).await.unwrap();
    // Four positions are left, and the last one is still asked what follows it.
    assert_eq!((found.ids.len(), found.end), (5, EndReason::Context));
    let too_long: Vec<u32> = (3..68).collect();
    let error = model.generate(&mut decoder, &too_long, &options).await.unwrap_err().to_string();
    assert!(error.contains("it has 65 tokens") && error.contains("take 64"), "{error}");
    let error = model.generate(&mut decoder, &[], &options).await.unwrap_err().to_string();
    assert!(error.contains("the prompt cannot be used: it is empty"), "{error}");
    let error = model.generate(&mut decoder, &[97], &options).await.unwrap_err().to_string();
    assert!(error.contains("token 97"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_and_end_tokens_end_a_text() {
    let model = Model::load("tiny_text", false);
    let tokenizer = model.tokenizer.as_ref().unwrap();
    let prompt = tokenizer.encode("How do I reset").unwrap();
    let whole = model.whole();
    let mut decoder = Decoder::whole(&whole);
    let free = GenerateOptions {
        min_new_tokens: 50,
        sampling: Sampling { temperature: 1.0, seed: 5, ..Sampling::default() },
        ..GenerateOptions::default()
    };
    let text = model.generate(&mut decoder, &prompt, &free).await.unwrap().text;
    // A stop string of three characters from the middle, wherever tokens begin and end.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let options = GenerateOptions { stop: vec![stop.clone()], ..free.clone() };
    let found = model.generate(&mut decoder, &prompt, &options).await.unwrap();
    assert_eq!(found.end, EndReason::Stop);
    assert_eq!(found.text, text[..text.find(&stop).unwrap()]);

    // The seed decides the text.
    assert_eq!(model.generate(&mut decoder, &prompt, &free).await.unwrap().text, text);
    let other = Sampling { seed: 6, ..free.sampling.clone() };
    let other = GenerateOptions { sampling: other, ..free.clone() };
    assert_ne!(model.generate(&mut decoder, &prompt, &other).await.unwrap().text, text);

    // Any of several end tokens ends it, but not before its time.
    let drawn = model.generate(&mut decoder, &prompt, &free).await.unwrap().ids;
    let end_ids = [319, drawn[0]];
    let request =
        |options| Request { prompt: &prompt, options, end_ids: &end_ids, tokenizer: None };
    let soon = GenerateOptions { min_new_tokens: 0, ..free.clone() };
    let found = decoder.generate(&request(&soon), &mut |_| {}).await.unwrap();
    assert_eq!((found.end, found.ids.len()), (EndReason::Eos, 0));
    let found = decoder.generate(&request(&free), &mut |_| {}).await.unwrap();
    assert_eq!((found.end, found.ids.len()), (EndReason::Length, 50));
    assert!(!found.ids.iter().any(|id| end_ids.contains(id)));
}
