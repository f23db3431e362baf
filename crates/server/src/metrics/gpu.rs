//! The GPU that the trunk is on, through NVIDIA's management library. That is loaded when the server runs;
//! without it, or without a GPU, there is nothing to tell.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::error::NvmlError;
use offshoot_proto::v1;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Within this the same values are told again: asking takes the driver's time.
const FRESH: Duration = Duration::from_millis(500);

/// A GPU that answers.
pub struct Gpu {
    nvml: Nvml,
    place: Place,
    last: Mutex<Option<(Instant, v1::DeviceView)>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Index(u32),
    Uuid(String),
}

impl Gpu {
    /// Of a device as the configuration names it; none, if it is no GPU or nobody can tell.
    pub fn of(device: &str) -> Option<Gpu> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let place = place(device, visible.as_deref())?;
        let nvml = match Nvml::init() {
            Ok(nvml) => nvml,
            Err(error) => {
                tracing::warn!(%error, "NVML is not there: nothing is told of the GPU's memory and load");
                return None;
            }
        };
        let gpu = Gpu { nvml, place, last: Mutex::default() };
        if let Err(error) = gpu.look() {
            tracing::warn!(%error, device, "NVML does not know the GPU: nothing is told of it");
            return None;
        }
        Some(gpu)
    }

    /// As it is now. None: it does not answer any more.
    pub fn view(&self) -> Option<v1::DeviceView> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, view)) = &*last
            && at.elapsed() < FRESH
        {
            return Some(view.clone());
        }
        let view = self.look().ok()?;
        *last = Some((Instant::now(), view.clone()));
        Some(view)
    }

    fn look(&self) -> Result<v1::DeviceView, NvmlError> {
        let device = match &self.place {
            Place::Index(index) => self.nvml.device_by_index(*index)?,
            Place::Uuid(uuid) => self.nvml.device_by_uuid(uuid.as_str())?,
        };
        let memory = device.memory_info()?;
        // Not every device tells these.
        let temperature = device.temperature(TemperatureSensor::Gpu).unwrap_or(0);
        let milliwatts = device.power_usage().unwrap_or(0);
        let percent = device.utilization_rates().map_or(0, |rates| rates.gpu);
        Ok(v1::DeviceView {
            name: device.name()?,
            memory_total_bytes: memory.total,
            memory_used_bytes: memory.used,
            utilisation: f64::from(percent) / 100.0,
            temperature_celsius: f64::from(temperature),
            power_watts: f64::from(milliwatts) / 1000.0,
        })
    }
}

/// Where NVML finds a device of CUDA's, which counts those that it may see.
fn place(device: &str, visible: Option<&str>) -> Option<Place> {
    let index: u32 = match device.strip_prefix("cuda")? {
        "" => 0,
        rest => rest.strip_prefix(':')?.parse().ok()?,
    };
    let Some(visible) = visible.filter(|list| !list.is_empty()) else {
        return Some(Place::Index(index));
    };
    let name = visible.split(',').nth(index as usize)?.trim();
    Some(name.parse().map_or_else(|_| Place::Uuid(name.into()), Place::Index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_cudas_is_found_among_those_that_it_sees() {
        assert_eq!(place("cpu", None), None);
        assert_eq!(place("cuda", None), Some(Place::Index(0)));
        assert_eq!(place("cuda:1", None), Some(Place::Index(1)));
        assert_eq!(place("cuda:1", Some("3,2")), Some(Place::Index(2)));
        assert_eq!(place("cuda", Some("GPU-8a")), Some(Place::Uuid("GPU-8a".into())));
        assert_eq!(place("cuda:2", Some("3,2")), None);
    }

    #[test]
    fn without_a_gpu_there_is_nothing_to_tell() {
        assert!(Gpu::of("cpu").is_none());
    }
}
