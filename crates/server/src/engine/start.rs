use crate::config::{ComputeDType, LimitsConfig, LoraBatching, TrunkConfig};
use crate::error::Error;
use crate::host_memory;
use crate::ledger::{BytesKind, Ledger, Reservation};
use offshoot_adapters::{LoraSpec, Site};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{
    LoraMode, ModelConfig, ModelError, Part, PartSpec, Shapes, SplitPoints, TapeSize, Work,
};
use std::ops::Range;
use tch::{Cuda, Device, Kind};

/// What the engine holds, as [`DescribeResponse`](offshoot_proto::v1::DescribeResponse) tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrunkInfo {
    pub model_name: String,
    pub model_type: String,
    pub fingerprint: String,
    /// Of the whole model.
    pub n_layers: usize,
    /// Longest sequence that the model was made for.
    pub max_positions: usize,
    /// The trunk's.
    pub layers: Range<usize>,
    /// H.
    pub hidden_size: usize,
    pub compute_dtype: ComputeDType,
    pub device: String,
    pub lora_modules: Vec<String>,
    pub default_targets: Vec<String>,
    pub weights_bytes: u64,
    /// Trained values of an adapter of rank 1 on every linear layer.
    pub parameters_per_rank: u64,
    /// Every linear layer, in the order of an adapter's flat buffers.
    pub sites: Vec<Site>,
}

impl TrunkInfo {
    /// Where an adapter's LoRA sits, in the order of its flat buffers.
    pub fn sites_of(&self, lora: &LoraSpec) -> impl Iterator<Item = &Site> {
        let targets = &lora.target_modules;
        self.sites.iter().filter(|s| targets.iter().any(|t| offshoot_model::is_target(&s.path, t)))
    }

    /// P, the number of an adapter's trained values.
    pub fn n_parameters(&self, lora: &LoraSpec) -> u64 {
        n_parameters(self.sites_of(lora), lora.r)
    }

    /// What an adapter takes of the device: parameters, gradients and both moments, in float32.
    pub fn adapter_bytes(&self, lora: &LoraSpec) -> u64 {
        adapter_bytes(self.n_parameters(lora))
    }
}

/// Trained values of an adapter of this rank at these sites.
pub(crate) fn n_parameters<'a>(sites: impl Iterator<Item = &'a Site>, r: usize) -> u64 {
    sites.map(|site| r as u64 * (site.d_in + site.d_out) as u64).sum()
}

/// Parameters, gradients and both moments, in float32.
pub(crate) fn adapter_bytes(n_parameters: u64) -> u64 {
    4 * 4 * n_parameters
}

/// `cpu`, `cuda` or `cuda:N`.
pub fn parse_device(text: &str) -> Option<Device> {
    match text {
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(0)),
        _ => text.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
    }
}

pub(crate) fn kind_of(dtype: ComputeDType) -> Kind {
    match dtype {
        ComputeDType::F32 => Kind::Float,
        ComputeDType::Bf16 => Kind::BFloat16,
        ComputeDType::F16 => Kind::Half,
    }
}

fn device(config: &TrunkConfig) -> Result<Device, Error> {
    let unavailable = |cause| Error::Device { device: config.device.clone(), cause };
    let device = parse_device(&config.device).ok_or_else(|| unavailable("unknown name"))?;
    match device {
        Device::Cuda(_) if !Cuda::is_available() => Err(unavailable("libtorch sees no CUDA")),
        Device::Cuda(i) if i as i64 >= Cuda::device_count() => Err(unavailable("no such index")),
        device => Ok(device),
    }
}

/// What the thread begins with.
pub(super) struct Loaded {
    pub part: Part,
    pub trunk: TrunkInfo,
    pub ledger: Ledger,
    /// The part's weights.
    pub weights: Reservation,
}

/// Reads the trunk's layers onto the device and opens the device's ledger, unless there is one.
pub(super) fn load(
    config: &TrunkConfig,
    limits: &LimitsConfig,
    ledger: Option<Ledger>,
) -> Result<Loaded, Error> {
    if let Some(n) = config.n_threads {
        tch::set_num_threads(n.into());
    }
    let device = device(config)?;
    let usual = || Ledger::new(limits.memory_bytes.or_else(|| usual_budget(device)));
    let ledger = ledger.unwrap_or_else(usual);
    let checkpoint = Checkpoint::find(&config.name).map_err(ModelError::from)?;
    let model = ModelConfig::from_json(checkpoint.config())?;
    let split = SplitPoints::new(config.split_point_1, config.split_point_2, model.n_layers)?;
    let layers = split.s1..split.s2;
    let spec = PartSpec { layers: layers.clone(), embed: false, head: false };
    let mut part = Part::load(&checkpoint, &model, spec, kind_of(config.dtype), device)?;
    part.set_lora_mode(match config.lora_batching {
        LoraBatching::Auto => LoraMode::Auto,
        LoraBatching::Stacked => LoraMode::Stacked,
        LoraBatching::Loop => LoraMode::Loop,
    });
    let sites = part.sites(&["all-linear".to_string()])?;
    let trunk = TrunkInfo {
        model_name: checkpoint.name().into(),
        model_type: model.family.name().into(),
        fingerprint: checkpoint.fingerprint(),
        n_layers: model.n_layers,
        max_positions: model.max_positions,
        layers,
        hidden_size: model.hidden_size as usize,
        compute_dtype: config.dtype,
        device: match device {
            Device::Cuda(i) => format!("cuda:{i}"),
            _ => "cpu".into(),
        },
        lora_modules: model.lora_modules().into_iter().map(String::from).collect(),
        default_targets: model.default_targets(),
        weights_bytes: part.weights_bytes(),
        parameters_per_rank: sites.iter().map(|site| (site.d_in + site.d_out) as u64).sum(),
        sites,
    };
    ledger.set_work_room(work_room(part.shapes(), limits));
    let too_large = |short: crate::ledger::Shortage| Error::TrunkTooLarge {
        weights: short.need,
        budget: short.budget,
    };
    let weights = ledger.reserve(BytesKind::Weights, trunk.weights_bytes).map_err(too_large)?;
    Ok(Loaded { part, trunk, ledger, weights })
}

/// So that the largest microbatch can have its turn, whatever sessions are on the device.
pub(crate) fn work_room(shapes: &Shapes, limits: &LimitsConfig) -> u64 {
    let (n_tokens, smallest) = (limits.max_tokens_per_microbatch as u64, TapeSize::Input);
    let work = shapes.workspace_bytes(n_tokens, Work::Backward(smallest));
    work + shapes.tape_bytes(n_tokens, smallest, 0)
}

/// The budget of an operator who names none. The rest is for what the ledger does not count:
/// messages, recorded answers, the allocator's free lists. libtorch tells nothing about an
/// accelerator's memory through its bindings, so there it is unlimited.
fn usual_budget(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => host_memory::available_bytes().map(part_of),
        _ => None,
    }
}

/// The same when the trunk is loaded.
pub(super) fn budget_beside(trunk: &TrunkInfo) -> Option<u64> {
    match parse_device(&trunk.device)? {
        Device::Cpu => Some(part_of(host_memory::available_bytes()? + trunk.weights_bytes)),
        _ => None,
    }
}

fn part_of(available: u64) -> u64 {
    available / 10 * 8
}
