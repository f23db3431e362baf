use anyhow::{Context, bail};
use tch::{Cuda, Device};

/// The device that an option names. For CUDA this must come before anything else that uses
/// libtorch.
pub fn device(text: &str) -> anyhow::Result<Device> {
    let device = match text {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => 0,
        _ => text
            .strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .with_context(|| format!("--device is {text:?}, expected cpu, cuda or cuda:N"))?,
    };
    load_cuda()?;
    let count = Cuda::device_count();
    if device as i64 >= count {
        bail!("--device is {text:?}, but there are {count} GPUs, counted from 0");
    }
    Ok(Device::Cuda(device))
}

fn load_cuda() -> anyhow::Result<()> {
    if let Err(reason) = offshoot_model::host::load_cuda() {
        bail!(
            "CUDA was asked for, but libtorch's CUDA part cannot be loaded ({reason}). Put the lib folder of a CUDA build of libtorch 2.11 first on LD_LIBRARY_PATH (a CUDA wheel of PyTorch has it as torch/lib), or use --device cpu"
        );
    }
    if !Cuda::is_available() {
        bail!(
            "libtorch has CUDA, but finds no GPU: the NVIDIA driver is missing or too old for it, or CUDA_VISIBLE_DEVICES hides the GPU. nvidia-smi tells; or use --device cpu"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_name() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        for wrong in ["tpu", "cuda:", "cuda:x", "CPU"] {
            let error = device(wrong).unwrap_err().to_string();
            assert!(error.contains("expected cpu, cuda or cuda:N"), "{error}");
        }
    }
}
