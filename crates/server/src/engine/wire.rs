//! Between bytes on the host and tensors on the device. One copy each way when no dtype changes.

use offshoot_proto::{HostTensor, WireDType};
use tch::{Device, Kind, Tensor};

fn kind_of(dtype: WireDType) -> Kind {
    match dtype {
        WireDType::F32 => Kind::Float,
        WireDType::Bf16 => Kind::BFloat16,
    }
}

/// Same shape, as `kind` on `device`.
pub(super) fn upload(tensor: &HostTensor, kind: Kind, device: Device) -> Tensor {
    let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
    // libtorch does not check the length; HostTensor did. The copy also aligns the bytes, which
    // lie anywhere in a message.
    let host = Tensor::from_data_size(tensor.data(), &shape, kind_of(tensor.dtype()));
    host.to_device(device).to_kind(kind)
}

/// Same shape, rounded to `dtype`, in host memory.
pub(super) fn download(tensor: &Tensor, dtype: WireDType) -> HostTensor {
    let host = tensor.to_kind(kind_of(dtype)).to_device(Device::Cpu).contiguous();
    let shape: Vec<usize> = host.size().iter().map(|&n| n as usize).collect();
    let mut bytes = vec![0; host.numel() * dtype.size()];
    host.copy_data_u8(&mut bytes, host.numel());
    HostTensor::new(dtype, shape, bytes.into()).expect("the bytes are those of the shape")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_to_the_device_and_back() {
        let values = [1.5, -2.0, 0.0, 3.25, 1e-3, 7.0];
        for dtype in WireDType::ALL {
            let sent = HostTensor::from_f32(&values, vec![2, 3], dtype);
            for kind in [Kind::Float, Kind::BFloat16] {
                let there = upload(&sent, kind, Device::Cpu);
                assert_eq!((there.size(), there.kind()), (vec![2, 3], kind));
                let exact = dtype == WireDType::Bf16 || kind == Kind::Float;
                if exact {
                    assert_eq!(download(&there, dtype), sent);
                }
            }
        }
        // A view that is not contiguous comes back in its own order.
        let there = upload(
            &HostTensor::from_f32(&values, vec![2, 3], WireDType::F32),
            Kind::Float,
            Device::Cpu,
        );
        assert_eq!(
            download(&there.tr(), WireDType::F32).to_f32(),
            [1.5, 3.25, -2.0, 1e-3, 0.0, 7.0]
        );
    }
}
