//! Between bytes on the host and tensors on the device. Nothing is copied where dtype and device
//! are the same on both sides; otherwise the conversion is the copy.

use offshoot_model::host;
use offshoot_proto::{HostTensor, Payload, Rounding, WireDType};
use tch::{Device, Kind, Tensor};

/// Same shape, as `kind` on `device`. It may share the memory of the bytes: not to be changed in
/// place.
pub(super) fn upload(tensor: &HostTensor, kind: Kind, device: Device) -> Tensor {
    let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
    let there = match tensor.payload() {
        Payload::F32(bytes) => host::tensor_over(bytes.clone(), &shape, Kind::Float),
        Payload::Bf16(bytes) => host::tensor_over(bytes.clone(), &shape, Kind::BFloat16),
        Payload::F16 { .. } | Payload::Int8(_) => host::tensor_of(tensor.to_f32(), &shape),
    };
    there.to_device(device).to_kind(kind)
}

/// Same shape, rounded to `dtype`, in host memory, with what the rounding has cost. It may share the
/// memory of the tensor: that is not to be changed any more.
pub(super) fn download(tensor: &Tensor, dtype: WireDType) -> HostTensor {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    let payload = match dtype {
        WireDType::F32 => Payload::F32(host::bytes_of(tensor, Kind::Float)),
        WireDType::Bf16 => Payload::Bf16(host::bytes_of(tensor, Kind::BFloat16)),
        WireDType::F16 | WireDType::Int8 => {
            return HostTensor::from_f32(host::floats_of(tensor).as_ref(), shape, dtype);
        }
    };
    let sent = HostTensor::new(shape, payload).expect("the bytes are those of the shape");
    match (dtype, tensor.kind(), sent.shape()) {
        (WireDType::Bf16, Kind::Float, &[n_rows, width]) => {
            let stride = Rounding::stride(n_rows);
            let exact = host::floats_of(&tensor.slice(0, None, None, stride as i64));
            sent.measured(stride, |i| &exact.as_ref()[i * width..][..width])
        }
        _ => sent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_to_the_device_and_back() {
        // One magnitude: what int8 can hold exactly.
        let values = [1.5, -1.5, 0.0, 1.5, -1.5, 1.5];
        for dtype in WireDType::ALL {
            let sent = HostTensor::from_f32(&values, vec![2, 3], dtype);
            for kind in [Kind::Float, Kind::BFloat16] {
                let there = upload(&sent, kind, Device::Cpu);
                assert_eq!((there.size(), there.kind()), (vec![2, 3], kind));
                let back = download(&there, dtype);
                assert_eq!(back.dtype(), dtype);
                for (back, value) in back.to_f32().iter().zip(values) {
                    assert!((back - value).abs() < 1e-6, "{dtype:?} {kind:?}: {back} {value}");
                }
            }
        }
    }

    #[test]
    fn a_view_comes_back_in_its_own_order() {
        let values: Vec<f32> = (0..6).map(|i| i as f32 * 0.25).collect();
        let sent = HostTensor::from_f32(&values, vec![2, 3], WireDType::F32);
        let there = upload(&sent, Kind::Float, Device::Cpu);
        for dtype in [WireDType::F32, WireDType::Bf16, WireDType::F16] {
            let back = download(&there.tr(), dtype);
            assert_eq!(back.shape(), [3, 2]);
            assert_eq!(back.to_f32(), [0.0, 0.75, 0.25, 1.0, 0.5, 1.25]);
        }
    }

    #[test]
    fn rounding_is_measured_where_something_is_lost() {
        let there = Tensor::randn([300, 80], (Kind::Float, Device::Cpu));
        let error = |tensor: &Tensor, dtype| download(tensor, dtype).rounding().relative_error();
        assert_eq!(error(&there, WireDType::F32), 0.0);
        assert_eq!(error(&there.to_kind(Kind::BFloat16), WireDType::Bf16), 0.0);
        for (dtype, least, most) in [
            (WireDType::Bf16, 1e-3, 3e-3),
            (WireDType::F16, 1e-4, 4e-4),
            (WireDType::Int8, 3e-3, 1e-2),
        ] {
            let error = error(&there, dtype);
            assert!((least..most).contains(&error), "{dtype:?}: {error}");
        }
    }
}
