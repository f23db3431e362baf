//! `offshoot plan`: what fits on a device, before anything is bought or started.

mod args;
mod fit;
mod measure;
mod text;

pub use args::PlanArgs;

use crate::accelerator;
use anyhow::Context;
use args::{DeviceArgs, SessionArgs};
use fit::{Chosen, Most, Question};
use measure::{Measured, Work, measure};
use offshoot_adapters::LoraSpec;
use offshoot_client::{HostTensor, WireDType};
use offshoot_model::weights::find_config;
use offshoot_model::{ModelConfig, TapeSize};
use offshoot_server::forecast::Demand;
use offshoot_server::{LimitsConfig, TrunkConfig};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;
use tch::{Cuda, Device};

/// Of a GPU's memory, for what the ledger does not count: CUDA's own, the allocator's free lists.
const RESERVE: u64 = 10;

/// All that is printed.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    model: Model,
    memory: Memory,
    session: Session,
    most: Most,
    /// With --sessions: those; else as many as fit with full tapes.
    chosen: Chosen,
    network: Network,
    time: Option<Time>,
    /// What of the ledger is full first when sessions come with full tapes.
    first_limit: Option<&'static str>,
    /// limits.memory_bytes with which the sessions that were asked for fit with full tapes.
    needed_budget_bytes: u64,
    /// What else would make them fit so, each alone.
    changes: Vec<String>,
    /// Settings of the server that would have to be raised.
    settings: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Model {
    name: String,
    family: &'static str,
    layers: usize,
    split_point_1: usize,
    split_point_2: usize,
    dtype: &'static str,
    device: String,
}

#[derive(Debug, Clone, Serialize)]
struct Memory {
    gpu_bytes: Option<u64>,
    /// limits.memory_bytes.
    budget_bytes: u64,
    /// Of it, what adapters leave free for microbatches.
    work_room_bytes: u64,
}

#[derive(Debug, Clone, Serialize)]
struct Session {
    lora_rank: usize,
    target_modules: Vec<String>,
    tokens_per_microbatch: u64,
    microbatches: u64,
    microbatches_in_flight: u64,
    parameters: u64,
    /// On the device, in the host's memory, and in each snapshot.
    adapter_bytes: u64,
    /// Of the trunk's part of a snapshot, times as many as are kept.
    most_disk_bytes: u64,
    /// Of one open microbatch.
    full_tape_bytes: u64,
    block_tape_bytes: u64,
    input_tape_bytes: u64,
    workspace_bytes: u64,
    /// While it takes an optimizer step, beside what the ledger counts.
    step_bytes: u64,
    /// Of a sequence that it generates.
    cache_bytes_per_token: u64,
}

/// Of one client.
#[derive(Debug, Clone, Serialize)]
struct Network {
    wire_dtype: &'static str,
    tokens_per_step: u64,
    up_bytes_per_step: u64,
    down_bytes_per_step: u64,
    /// At the measured time of a step, if all train at the same time.
    up_mbit_per_second: Option<f64>,
    down_mbit_per_second: Option<f64>,
}

/// The trunk's part of a step, clients and network apart.
#[derive(Debug, Clone, Serialize)]
struct Time {
    measured: Measured,
    /// Of each of the chosen sessions, if all train at the same time.
    step_seconds: f64,
}

/// Runs the subcommand.
pub fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    args.check()?;
    let plan = Plan::make(&args)?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&plan)?),
        false => print!("{}", plan.text()),
    }
    Ok(ExitCode::SUCCESS)
}

impl Plan {
    fn make(args: &PlanArgs) -> anyhow::Result<Plan> {
        let question = question(args)?;
        let Question { model, trunk, limits, demand, budget } = &question;
        let forecast = question.forecast()?;
        let session = forecast.session(demand)?;
        let most = question.most(args.device.host_memory)?;
        let wanted = args.sessions.sessions.unwrap_or(most.full_tapes.max(1));
        let chosen = question.choose(wanted)?;
        let time = match args.measure {
            true => Some(time(args, &question, &chosen)?),
            false => None,
        };
        let short = most.full_tapes < wanted;
        Ok(Plan {
            model: Model {
                name: args.model.model_name.clone(),
                family: model.family.name(),
                layers: model.n_layers,
                split_point_1: trunk.split_point_1,
                split_point_2: trunk.split_point_2,
                dtype: trunk.dtype.name(),
                device: trunk.device.clone(),
            },
            memory: Memory {
                gpu_bytes: args.device.gpu_memory,
                budget_bytes: *budget,
                work_room_bytes: forecast.work_room_bytes(),
            },
            session: Session {
                lora_rank: demand.lora.r,
                target_modules: demand.lora.target_modules.clone(),
                tokens_per_microbatch: demand.n_tokens,
                microbatches: args.sessions.microbatches,
                microbatches_in_flight: demand.n_open,
                parameters: session.n_parameters,
                adapter_bytes: session.adapter,
                most_disk_bytes: snapshots_kept() * session.adapter,
                full_tape_bytes: session.tape(TapeSize::Full),
                block_tape_bytes: session.tape(TapeSize::Blocks),
                input_tape_bytes: session.tape(TapeSize::Input),
                workspace_bytes: session.workspace(TapeSize::Full),
                step_bytes: session.step(),
                cache_bytes_per_token: forecast.cache_bytes_per_token(),
            },
            most,
            network: network(args, &question, time.as_ref()),
            time,
            first_limit: question.first_limit()?,
            needed_budget_bytes: question.needed_budget(wanted),
            changes: if short { question.changes(wanted) } else { Vec::new() },
            settings: settings(args, limits, wanted),
            chosen,
        })
    }
}

fn question(args: &PlanArgs) -> anyhow::Result<Question> {
    let model = ModelConfig::from_json(&find_config(&args.model.model_name)?)
        .with_context(|| format!("the model {}", args.model.model_name))?;
    let SessionArgs { lora_rank, target_modules, .. } = &args.sessions;
    let lora =
        LoraSpec { r: *lora_rank, target_modules: target_modules.clone(), ..LoraSpec::default() };
    let n_open = args.sessions.microbatches_in_flight.min(args.sessions.microbatches);
    let demand = Demand { lora, n_tokens: args.sessions.tokens_per_microbatch as u64, n_open };
    let DeviceArgs { gpu_memory, memory_limit, device, max_tokens_per_microbatch, .. } =
        &args.device;
    let usual_device = if gpu_memory.is_some() { "cuda" } else { "cpu" };
    // The same at both ends, where there are layers enough.
    let ends = 2.min(model.n_layers.saturating_sub(1) / 2);
    let trunk = TrunkConfig {
        name: args.model.model_name.clone(),
        split_point_1: args.model.split_point_1.unwrap_or(ends),
        split_point_2: args.model.split_point_2.unwrap_or(model.n_layers - ends),
        device: device.clone().unwrap_or_else(|| usual_device.into()),
        dtype: args.model.dtype.into(),
        ..TrunkConfig::default()
    };
    let limits = LimitsConfig {
        max_tokens_per_microbatch: (*max_tokens_per_microbatch).max(demand.n_tokens as usize),
        ..LimitsConfig::default()
    };
    let mut question = Question { model, trunk, limits, demand, budget: 0 };
    let step = question.forecast()?.session(&question.demand)?.step();
    question.budget = match (memory_limit, gpu_memory) {
        (Some(bytes), _) => *bytes,
        (None, gpu) => {
            let gpu = gpu.unwrap_or_default();
            (gpu - gpu / RESERVE).saturating_sub(step)
        }
    };
    Ok(question)
}

/// Of one session, those that it asked for and those that the server takes by itself.
fn snapshots_kept() -> u64 {
    let store = offshoot_server::StoreConfig::default();
    (store.snapshots_kept + store.server_snapshots_kept) as u64
}

fn network(args: &PlanArgs, question: &Question, time: Option<&Time>) -> Network {
    let wire_dtype = WireDType::from(args.sessions.wire_dtype);
    let (n_tokens, hidden) = (question.demand.n_tokens as usize, question.model.hidden_size);
    // Packed as it would be, of some rows.
    let some = n_tokens.min(64);
    let values: Vec<f32> = (0..some * hidden as usize).map(|i| (i as f32).sin()).collect();
    let packed = HostTensor::from_f32(&values, vec![some, hidden as usize], wire_dtype);
    let one = packed.n_bytes() as u64 * n_tokens as u64 / some as u64;
    let microbatches = args.sessions.microbatches;
    // Without layers below the trunk nobody wants the last gradient.
    let back = if question.trunk.split_point_1 > 0 { 2 } else { 1 };
    let (up, down) = (2 * one * microbatches, back * one * microbatches);
    let rate = |bytes: u64| time.map(|time| bytes as f64 * 8.0 / 1e6 / time.step_seconds);
    Network {
        wire_dtype: wire_dtype.name(),
        tokens_per_step: question.demand.n_tokens * microbatches,
        up_bytes_per_step: up,
        down_bytes_per_step: down,
        up_mbit_per_second: rate(up),
        down_mbit_per_second: rate(down),
    }
}

fn time(args: &PlanArgs, question: &Question, chosen: &Chosen) -> anyhow::Result<Time> {
    let device = match &args.device.device {
        Some(device) => device.clone(),
        None => this_machines_device()?,
    };
    accelerator::device(&device)?;
    let work = Work {
        trunk: TrunkConfig { device, ..question.trunk.clone() },
        demand: &question.demand,
        wire_dtype: args.sessions.wire_dtype.into(),
        microbatches: args.sessions.microbatches,
        sessions: chosen.sessions,
        time: Duration::from_secs_f64(args.measure_seconds),
    };
    let measured = measure(&work).context("--measure")?;
    let step_tokens = (question.demand.n_tokens * args.sessions.microbatches) as f64;
    let speed = measured.together_tokens_per_second;
    let together = chosen.sessions.max(1) as f64 * step_tokens / speed;
    let step_seconds = together.max(measured.alone_step_seconds);
    Ok(Time { measured, step_seconds })
}

/// Its GPU, if there is one that can be used.
fn this_machines_device() -> anyhow::Result<String> {
    let usable = offshoot_model::host::load_cuda().is_ok() && Cuda::is_available();
    let device = if usable { Device::Cuda(0) } else { Device::Cpu };
    Ok(if device == Device::Cpu { "cpu" } else { "cuda" }.into())
}

fn settings(args: &PlanArgs, limits: &LimitsConfig, sessions: u64) -> Vec<String> {
    let usual = LimitsConfig::default();
    let SessionArgs { lora_rank, microbatches_in_flight, microbatches, .. } = &args.sessions;
    let in_flight = (*microbatches_in_flight).min(*microbatches);
    let all = [
        ("max_rank", *lora_rank as u64, usual.max_rank as u64),
        ("max_open_microbatches", in_flight, usual.max_open_microbatches as u64),
        ("max_live_sessions", sessions, usual.max_live_sessions as u64),
    ];
    let raised = all.iter().filter(|(_, wanted, usual)| wanted > usual);
    let mut settings: Vec<String> =
        raised.map(|(name, wanted, _)| format!("limits.{name} = {wanted}")).collect();
    let (set, usual) = (limits.max_tokens_per_microbatch, usual.max_tokens_per_microbatch);
    if set != usual {
        settings.push(format!("limits.max_tokens_per_microbatch = {set}"));
    }
    settings
}
