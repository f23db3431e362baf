//! Between the session's host tensors and those of the client's layers. Nothing is copied where
//! dtype and device are the same on both sides; otherwise the conversion is the copy.

use crate::{TrainError, WireErrors};
use offshoot_client::{Client, HostTensor, Payload, Rounding, Session, WireDType};
use offshoot_model::host;
use tch::{Kind, Tensor};

/// Any tensor, rounded to `dtype`, in host memory, with what the rounding has cost. It may share the
/// memory of the tensor: that is not to be changed any more.
pub(crate) fn to_wire(tensor: &Tensor, dtype: WireDType) -> HostTensor {
    let _guard = tch::no_grad_guard();
    let shape: Vec<usize> = tensor.size().into_iter().map(|n| n as usize).collect();
    let payload = match dtype {
        WireDType::F32 => Payload::F32(host::bytes_of(tensor, Kind::Float)),
        WireDType::Bf16 => Payload::Bf16(host::bytes_of(tensor, Kind::BFloat16)),
        WireDType::F16 | WireDType::Int8 => {
            return HostTensor::from_f32(host::floats_of(tensor).as_ref(), shape, dtype);
        }
    };
    let sent = HostTensor::new(shape, payload).expect("bytes were counted from the shape");
    match (dtype, tensor.kind(), sent.shape()) {
        (WireDType::Bf16, Kind::Float, &[n_rows, width]) => {
            let stride = Rounding::stride(n_rows);
            let exact = host::floats_of(&tensor.slice(0, None, None, stride as i64));
            sent.measured(stride, |i| &exact.as_ref()[i * width..][..width])
        }
        _ => sent,
    }
}

/// On the CPU, in f32 or bf16. It may share the memory of the bytes: not to be changed in place.
pub(crate) fn host_to_tensor(tensor: &HostTensor) -> Tensor {
    let shape: Vec<i64> = tensor.shape().iter().map(|&n| n as i64).collect();
    match tensor.payload() {
        Payload::F32(bytes) => host::tensor_over(bytes.clone(), &shape, Kind::Float),
        Payload::Bf16(bytes) => host::tensor_over(bytes.clone(), &shape, Kind::BFloat16),
        Payload::F16 { .. } | Payload::Int8(_) => host::tensor_of(tensor.to_f32(), &shape),
    }
}

/// The same, checked to be `[N, H]`.
pub(crate) fn receive(tensor: &HostTensor, expected: [usize; 2]) -> Result<Tensor, TrainError> {
    let found = tensor.shape();
    if found != expected {
        return Err(TrainError::Answer {
            problem: format!(
                "a tensor of shape {found:?} came, expected {expected:?}; is the server of the same version?"
            ),
        });
    }
    Ok(host_to_tensor(tensor))
}

impl WireErrors {
    /// From both sides. What the server has sent counts since the session is on its device.
    pub(crate) async fn of(session: &Session, client: &Client) -> Result<Self, TrainError> {
        let listed = client.list_sessions().await?;
        let listed = listed.into_iter().find(|listed| listed.id == *session.id());
        let received = listed.and_then(|listed| listed.wire_error).unwrap_or_default();
        let sent = session.wire_error();
        Ok(WireErrors {
            hidden_sent: sent.hidden,
            hidden_received: received.hidden,
            gradients_sent: sent.gradients,
            gradients_received: received.gradients,
        })
    }
}

impl std::fmt::Display for WireErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let WireErrors { hidden_sent, hidden_received, gradients_sent, gradients_received } = self;
        write!(
            f,
            "relative error by rounding: hidden states {hidden_sent:.1e} there, {hidden_received:.1e} \
             back; gradients {gradients_sent:.1e} there, {gradients_received:.1e} back"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_survive_the_wire() {
        let tensor = Tensor::from_slice(&[1.0f32, -1.0, 0.0, 1.0, 1.0, -1.0]).view([3, 2]);
        for dtype in WireDType::ALL {
            // A transposed view is not contiguous.
            let sent = to_wire(&tensor.tr(), dtype);
            assert_eq!((sent.dtype(), sent.shape()), (dtype, &[2, 3][..]));
            let came = receive(&sent, [2, 3]).unwrap().to_kind(Kind::Float);
            assert!(came.allclose(&tensor.tr(), 1e-6, 0.0, false), "{dtype:?}");
            assert!(receive(&sent, [3, 2]).is_err());
        }
    }
}
