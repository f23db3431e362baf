//! The time of a step, on this machine: the engine with the real trunk, without network and clients.

use anyhow::{Context, ensure};
use offshoot_client::{HostTensor, WireDType};
use offshoot_server::direct::{Adapter, DirectEngine, DirectSession, Input};
use offshoot_server::forecast::Demand;
use offshoot_server::{Error, LimitsConfig, TrunkConfig};
use serde::Serialize;
use std::time::{Duration, Instant};

/// More sessions share batches that are no better used.
const MOST_SESSIONS: u64 = 8;

/// What is run.
pub struct Work<'a> {
    pub trunk: TrunkConfig,
    pub demand: &'a Demand,
    pub wire_dtype: WireDType,
    /// Of one step.
    pub microbatches: u64,
    pub sessions: u64,
    pub time: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    pub device: String,
    /// The trunk's part of one session's step, alone on the device.
    pub alone_step_seconds: f64,
    pub alone_tokens_per_second: f64,
    /// Of so many sessions that train at the same time.
    pub together_sessions: u64,
    pub together_tokens_per_second: f64,
}

/// Loads the trunk and trains on it, half of the time alone and half of it together.
pub fn measure(work: &Work) -> anyhow::Result<Measured> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start threads")?.block_on(run(work))
}

async fn run(work: &Work<'_>) -> anyhow::Result<Measured> {
    let n_tokens = work.demand.n_tokens as usize;
    let limits = LimitsConfig { max_tokens_per_microbatch: n_tokens, ..LimitsConfig::default() };
    let engine = DirectEngine::start(work.trunk.clone(), &limits).await?;
    let trunk = engine.trunk();
    ensure!(
        n_tokens <= limits.max_tokens_per_batch,
        "--tokens-per-microbatch is {n_tokens}, more than the {} tokens of a batch",
        limits.max_tokens_per_batch
    );
    // Sequences as long as the model was made for, and the rest.
    let longest = trunk.max_positions.min(n_tokens).max(1);
    let mut seq_lens = vec![longest; n_tokens / longest];
    seq_lens.extend(Some(n_tokens % longest).filter(|rest| *rest > 0));
    // What they are makes no difference for the time.
    let values: Vec<f32> =
        (0..n_tokens * trunk.hidden_size).map(|i| (i as f32 * 0.618).sin()).collect();
    let hidden = HostTensor::from_f32(&values, vec![n_tokens, trunk.hidden_size], work.wire_dtype);
    let input = Input { hidden, seq_lens, train: true, want_input_grad: trunk.layers.start > 0 };

    let mut sessions = vec![open(&engine, work, 0).await.context("one session")?];
    let step_tokens = work.microbatches as f64 * n_tokens as f64;
    let alone = per_step(&mut sessions, &input, work).await?;
    for seed in 1..work.sessions.min(MOST_SESSIONS) {
        match open(&engine, work, seed).await {
            Ok(session) => sessions.push(session),
            // As many as this machine has memory for.
            Err(Error::NoRoom { .. }) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let together = match sessions.len() {
        1 => alone,
        _ => per_step(&mut sessions, &input, work).await?,
    };
    Ok(Measured {
        device: trunk.device.clone(),
        alone_step_seconds: alone,
        alone_tokens_per_second: step_tokens / alone,
        together_sessions: sessions.len() as u64,
        together_tokens_per_second: sessions.len() as f64 * step_tokens / together,
    })
}

async fn open(engine: &DirectEngine, work: &Work<'_>, seed: u64) -> Result<DirectSession, Error> {
    let (lora, wire_dtype) = (work.demand.lora.clone(), work.wire_dtype);
    engine.open(Adapter { lora, seed, wire_dtype }).await
}

/// Seconds until all sessions have taken a step, in half of the time; at least one step is taken.
async fn per_step(
    sessions: &mut [DirectSession],
    input: &Input,
    work: &Work<'_>,
) -> Result<f64, Error> {
    // Memory and kernels come with the first microbatch.
    microbatch(sessions, input).await?;
    let begun = Instant::now();
    for n_steps in 1u32.. {
        for _ in 0..work.microbatches {
            microbatch(sessions, input).await?;
        }
        for session in sessions.iter_mut() {
            session.step(1e-6)?.done().await?;
        }
        if begun.elapsed() >= work.time / 2 {
            return Ok(begun.elapsed().as_secs_f64() / f64::from(n_steps));
        }
    }
    unreachable!("the time is over before the numbers are")
}

/// One of each session, at the same time.
async fn microbatch(sessions: &mut [DirectSession], input: &Input) -> Result<(), Error> {
    let mut forwards = Vec::new();
    for session in sessions.iter_mut() {
        forwards.push(session.forward(input.clone())?);
    }
    let mut backwards = Vec::new();
    for (session, forward) in sessions.iter_mut().zip(forwards) {
        backwards.push((session, forward.done().await?.hidden));
    }
    let mut gradients = Vec::new();
    for (session, grad) in backwards {
        gradients.push(session.backward(grad)?);
    }
    for gradient in gradients {
        gradient.done().await?;
    }
    Ok(())
}
