//! Any tensor of the wire: what is taken has the lengths that it says, comes back from its own
//! message unchanged, and its values can be rounded to every dtype and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_proto::{HostTensor, WireDType, v1};
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok(message) = v1::Tensor::decode(bytes) else { return };
    let Ok(tensor) = HostTensor::from_proto(Some(message)) else { return };
    let again = HostTensor::from_proto(Some(tensor.clone().into_proto()));
    assert_eq!(again.as_ref(), Ok(&tensor));
    let values = tensor.to_f32();
    let n: usize = tensor.shape().iter().product();
    assert_eq!(values.len(), n);
    for dtype in WireDType::ALL {
        if dtype == WireDType::Int8 && tensor.shape().len() != 2 {
            continue;
        }
        let sent = HostTensor::from_f32(&values, tensor.shape().to_vec(), dtype);
        assert!(sent.rounding().relative_error() >= 0.0);
        let back = sent.to_f32();
        assert_eq!(back.len(), n);
        if dtype == WireDType::F32 {
            assert!(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        let finite = values.iter().all(|value| value.is_finite());
        match HostTensor::from_proto(Some(sent.clone().into_proto())) {
            Ok(came) => assert_eq!(came, sent),
            // Only a block with a value that is not finite makes a tensor that is refused.
            Err(error) => assert!(!finite && dtype == WireDType::Int8, "{dtype:?}: {error}"),
        }
    }
});
