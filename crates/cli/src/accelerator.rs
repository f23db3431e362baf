use anyhow::{Context, bail};
use std::ffi::CStr;
use tch::{Cuda, Device};

const CUDA_LIBRARY: &CStr = c"libtorch_cuda.so";

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

/// Loads the part of libtorch that knows CUDA. This program is linked against the CPU part only, so
/// that one binary serves both; loading the rest makes its operators known.
fn load_cuda() -> anyhow::Result<()> {
    // SAFETY: libtorch_cuda's initialisers register operators and do nothing else; the name is a
    // C string, and the message is copied before the next dl* call.
    let missing = unsafe {
        let library = libc::dlopen(CUDA_LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL);
        if library.is_null() {
            let message = libc::dlerror();
            let unknown = || "no reason given".to_string();
            Some(if message.is_null() {
                unknown()
            } else {
                CStr::from_ptr(message).to_string_lossy().into_owned()
            })
        } else {
            None
        }
    };
    if let Some(reason) = missing {
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
