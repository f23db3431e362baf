use crate::v1;
use bytes::Bytes;

/// Element type of a tensor on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireDType {
    F32,
    Bf16,
}

impl WireDType {
    /// Every dtype that this version speaks.
    pub const ALL: [WireDType; 2] = [WireDType::F32, WireDType::Bf16];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            WireDType::F32 => 4,
            WireDType::Bf16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            WireDType::F32 => "f32",
            WireDType::Bf16 => "bf16",
        }
    }

    pub fn to_proto(self) -> v1::DType {
        match self {
            WireDType::F32 => v1::DType::DtypeF32,
            WireDType::Bf16 => v1::DType::DtypeBf16,
        }
    }

    /// From the number in a message.
    pub fn from_proto(value: i32) -> Result<Self, TensorError> {
        match v1::DType::try_from(value) {
            Ok(v1::DType::DtypeF32) => Ok(WireDType::F32),
            Ok(v1::DType::DtypeBf16) => Ok(WireDType::Bf16),
            Ok(v1::DType::DtypeUnspecified) | Err(_) => Err(TensorError::UnknownDType { value }),
        }
    }
}

/// Of a tensor from the wire; hidden states have two. Longer shapes would fill logs and answers.
const MAX_DIMENSIONS: usize = 8;

/// Why bytes are no tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("dtype number {value} is unknown; this version speaks f32 (1) and bf16 (2)")]
    UnknownDType { value: i32 },
    #[error("a tensor of shape {shape:?} in {dtype} has {expected} bytes, {found} came")]
    Length { shape: Vec<usize>, dtype: &'static str, expected: usize, found: usize },
    #[error("a tensor of shape {shape:?} is too large to address")]
    TooLarge { shape: Vec<usize> },
    #[error("a tensor has {found} dimensions, at most {MAX_DIMENSIONS} are taken")]
    Dimensions { found: usize },
    #[error("a tensor is missing from the message")]
    Missing,
}

/// A tensor in host memory: row-major, little-endian, its length checked against its shape.
/// Cloning is cheap; the bytes are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostTensor {
    dtype: WireDType,
    shape: Vec<usize>,
    data: Bytes,
}

impl HostTensor {
    pub fn new(dtype: WireDType, shape: Vec<usize>, data: Bytes) -> Result<Self, TensorError> {
        let expected = shape
            .iter()
            .try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
            .ok_or_else(|| TensorError::TooLarge { shape: shape.clone() })?;
        if expected != data.len() {
            let found = data.len();
            return Err(TensorError::Length { shape, dtype: dtype.name(), expected, found });
        }
        Ok(HostTensor { dtype, shape, data })
    }

    /// Rounds to `dtype` if that is narrower. Panics if `shape` does not fit `values`.
    pub fn from_f32(values: &[f32], shape: Vec<usize>, dtype: WireDType) -> Self {
        let data = match dtype {
            WireDType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            WireDType::Bf16 => {
                values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
            }
        };
        HostTensor::new(dtype, shape, data).expect("the shape fits the values")
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            WireDType::F32 => {
                let (values, _) = self.data.as_chunks::<4>();
                values.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            WireDType::Bf16 => {
                let (values, _) = self.data.as_chunks::<2>();
                values.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
        }
    }

    pub fn dtype(&self) -> WireDType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn data(&self) -> &Bytes {
        &self.data
    }

    pub fn into_proto(self) -> v1::Tensor {
        v1::Tensor {
            dtype: self.dtype.to_proto() as i32,
            shape: self.shape.iter().map(|&n| n as u32).collect(),
            data: self.data,
        }
    }

    /// Checks dtype, number of dimensions and length; the bytes are not copied.
    pub fn from_proto(tensor: Option<v1::Tensor>) -> Result<Self, TensorError> {
        let tensor = tensor.ok_or(TensorError::Missing)?;
        let found = tensor.shape.len();
        if found > MAX_DIMENSIONS {
            return Err(TensorError::Dimensions { found });
        }
        let shape = tensor.shape.iter().map(|&n| n as usize).collect();
        HostTensor::new(WireDType::from_proto(tensor.dtype)?, shape, tensor.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_wire() {
        for dtype in WireDType::ALL {
            let values = [0.0, -1.5, 3.25, f32::NEG_INFINITY, 1024.0, 2.0];
            let sent = HostTensor::from_f32(&values, vec![2, 3], dtype);
            let came = HostTensor::from_proto(Some(sent.clone().into_proto())).unwrap();
            assert_eq!(came, sent);
            assert_eq!(came.to_f32(), values);
        }
    }

    #[test]
    fn a_shape_without_end_is_refused_and_not_repeated() {
        let tensor = |n| v1::Tensor { dtype: 1, shape: vec![1; n], data: vec![0; 4].into() };
        assert!(HostTensor::from_proto(Some(tensor(8))).is_ok());
        for n in [9, 1_000_000] {
            let error = HostTensor::from_proto(Some(tensor(n))).unwrap_err();
            let text = format!("a tensor has {n} dimensions, at most 8 are taken");
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn wrong_length_is_named() {
        let error =
            HostTensor::new(WireDType::Bf16, vec![2, 3], Bytes::from(vec![0; 13])).unwrap_err();
        assert_eq!(error.to_string(), "a tensor of shape [2, 3] in bf16 has 12 bytes, 13 came");
        let huge = vec![u32::MAX as usize; 4];
        assert!(matches!(
            HostTensor::new(WireDType::F32, huge, Bytes::new()),
            Err(TensorError::TooLarge { .. })
        ));
    }
}
