use crate::accelerator;
use clap::{Args, ValueEnum};
use offshoot_client::WireDType;
use offshoot_trainer::options::{Checkpointing, ComputeOptions};
use tch::Kind;

#[derive(Args)]
#[command(next_help_heading = "Compute")]
pub struct ComputeArgs {
    /// Where this side's layers run: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Several of them, separated by commas, such as cuda:0,cuda:1: each has a copy of this side's
    /// layers, and the microbatches of a step are dealt to them. Numbers are those of one device.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', conflicts_with = "device")]
    devices: Vec<String>,
    /// Whether this side's layers are computed again in the backward, which takes less memory and
    /// more time and changes no number. auto: on the CPU, where one microbatch would take more than
    /// 128 MiB.
    #[arg(long, value_enum, default_value_t = GradientCheckpointing::Auto)]
    gradient_checkpointing: GradientCheckpointing,
    /// Type of this side's frozen layers. With bf16 they take half the memory, and products run in
    /// bf16 where the device is fast in it (GPUs, CPUs with AMX) and in f32 elsewhere; adapters,
    /// their gradients, the optimizer, norms and the loss are f32 in any case.
    #[arg(long, value_enum, default_value_t = DType::F32)]
    dtype: DType,
    /// The same as --dtype bf16; what bf16 weights with PEFT's f32 adapters are in Transformers.
    #[arg(long, conflicts_with = "dtype")]
    mixed_precision: bool,
    /// Type of what travels, both ways. The errors are relative ones of SmolLM2 cut at layers 2 and
    /// 26; a run ends with its own.
    #[arg(long, value_enum, default_value_t = Wire::Bf16)]
    wire_dtype: Wire,
}

/// dtypes of what travels.
#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
pub enum Wire {
    /// 4 bytes a value, nothing is rounded: to compare with an uncut run
    F32,
    /// 2 bytes, error 0.2%: for most runs
    Bf16,
    /// 2 bytes, error 0.02%; takes more computing to pack: for precision on a slow network
    F16,
    /// 1.1 bytes, error 0.2% to 0.7%: where the network is what a run waits for
    Int8,
}

impl From<Wire> for WireDType {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::F32 => WireDType::F32,
            Wire::Bf16 => WireDType::Bf16,
            Wire::F16 => WireDType::F16,
            Wire::Int8 => WireDType::Int8,
        }
    }
}

/// dtypes of this side's layers.
#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
pub enum DType {
    F32,
    Bf16,
}

impl From<DType> for Kind {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Kind::Float,
            DType::Bf16 => Kind::BFloat16,
        }
    }
}

impl ComputeArgs {
    /// What the trainer takes. A device that this machine or build lacks is an error.
    pub fn into_options(self) -> anyhow::Result<ComputeOptions> {
        let names = if self.devices.is_empty() { vec![self.device] } else { self.devices };
        let bf16 = self.mixed_precision || self.dtype == DType::Bf16;
        Ok(ComputeOptions {
            checkpointing: self.gradient_checkpointing.into(),
            devices: names
                .iter()
                .map(|name| accelerator::device(name))
                .collect::<Result<_, _>>()?,
            kind: if bf16 { Kind::BFloat16 } else { Kind::Float },
            wire_dtype: self.wire_dtype.into(),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum GradientCheckpointing {
    Auto,
    On,
    Off,
}

impl From<GradientCheckpointing> for Checkpointing {
    fn from(wanted: GradientCheckpointing) -> Self {
        match wanted {
            GradientCheckpointing::Auto => Checkpointing::Auto,
            GradientCheckpointing::On => Checkpointing::On,
            GradientCheckpointing::Off => Checkpointing::Off,
        }
    }
}
