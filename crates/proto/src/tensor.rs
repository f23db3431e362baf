use crate::halves::{self, SCALE_EXPONENTS};
use crate::int8::Int8Rows;
use crate::{Rounding, WireDType, v1};
use bytes::Bytes;
use std::ops::Range;

/// Of a tensor from the wire; hidden states have two. Longer shapes would fill logs and answers.
const MAX_DIMENSIONS: usize = 8;

/// Why bytes are no tensor.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TensorError {
    #[error(
        "dtype number {value} is unknown; this version speaks f32 (1), bf16 (2), f16 (3) and int8 (4)"
    )]
    UnknownDType { value: i32 },
    #[error("a tensor of shape {shape:?} in {dtype} has {expected} bytes, {found} came")]
    Length { shape: Vec<usize>, dtype: &'static str, expected: usize, found: usize },
    #[error(
        "an int8 tensor of shape [{n_rows}, {width}] has {expected} bytes of {part}, {found} came"
    )]
    PartLength { part: &'static str, n_rows: usize, width: usize, expected: usize, found: usize },
    #[error("a tensor of shape {shape:?} is too large to address")]
    TooLarge { shape: Vec<usize> },
    #[error("a tensor has {found} dimensions, at most {MAX_DIMENSIONS} are taken")]
    Dimensions { found: usize },
    #[error("a tensor of shape {shape:?} has no elements; leave it out of the message")]
    Empty { shape: Vec<u32> },
    #[error("int8 is for tensors of shape [tokens, hidden size], one of shape {shape:?} came")]
    NotRows { shape: Vec<usize> },
    #[error(
        "a tensor in f16 came without scale_exponent; values are stored times 2^-scale_exponent, so \
         that small gradients do not vanish (0 says that they are stored as they are)"
    )]
    ScaleMissing,
    #[error("scale_exponent is {found}, expected -126 to 113")]
    ScaleExponent { found: i32 },
    #[error(
        "block_scales[{index}] is {found:e}, expected a number that is at least 0 and below 2^121; was \
         a block with a value that is not finite rounded?"
    )]
    BlockScale { index: usize, found: f32 },
    #[error("outlier_channels has {found:?} in a row, expected increasing channels below {width}")]
    OutlierChannels {
        /// The first that does not fit, with the one before it.
        found: Vec<u32>,
        width: usize,
    },
    #[error("{found} outlier_channels came, at most {limit} of {width} channels are taken")]
    TooManyOutliers { found: usize, limit: usize, width: usize },
    #[error("{field} came with a tensor in {dtype}, which has no such field")]
    Stray { field: &'static str, dtype: &'static str },
    #[error("a tensor is missing from the message")]
    Missing,
}

/// The bytes of a tensor, by its dtype: row-major, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    F32(Bytes),
    Bf16(Bytes),
    /// value = stored * 2^`scale_exponent`.
    F16 {
        stored: Bytes,
        scale_exponent: i32,
    },
    Int8(Int8Rows),
}

impl Payload {
    pub fn dtype(&self) -> WireDType {
        match self {
            Payload::F32(_) => WireDType::F32,
            Payload::Bf16(_) => WireDType::Bf16,
            Payload::F16 { .. } => WireDType::F16,
            Payload::Int8(_) => WireDType::Int8,
        }
    }

    /// One element for each element of the tensor.
    fn elements(&self) -> &Bytes {
        match self {
            Payload::F32(bytes) | Payload::Bf16(bytes) => bytes,
            Payload::F16 { stored, .. } => stored,
            Payload::Int8(rows) => &rows.numbers,
        }
    }
}

/// A tensor in host memory, its lengths checked against its shape. Cloning is cheap; the bytes are
/// shared.
#[derive(Debug, Clone)]
pub struct HostTensor {
    shape: Vec<usize>,
    payload: Payload,
    /// Against what it was rounded from; nothing for a tensor that came over the wire.
    rounding: Rounding,
}

/// The same bytes of the same shape, wherever they come from.
impl PartialEq for HostTensor {
    fn eq(&self, other: &Self) -> bool {
        self.shape == other.shape && self.payload == other.payload
    }
}

impl HostTensor {
    /// Checks every length and every scale. Elements may be other than finite.
    pub fn new(shape: Vec<usize>, payload: Payload) -> Result<Self, TensorError> {
        let tensor = HostTensor::sized(shape, payload)?;
        match &tensor.payload {
            Payload::F16 { scale_exponent, .. } if !SCALE_EXPONENTS.contains(scale_exponent) => {
                Err(TensorError::ScaleExponent { found: *scale_exponent })
            }
            Payload::Int8(rows) => match tensor.shape[..] {
                [n_rows, width] => rows.check(n_rows, width).map(|()| tensor),
                _ => Err(TensorError::NotRows { shape: tensor.shape }),
            },
            _ => Ok(tensor),
        }
    }

    fn sized(shape: Vec<usize>, payload: Payload) -> Result<Self, TensorError> {
        let (dtype, found) = (payload.dtype(), payload.elements().len());
        let expected = shape
            .iter()
            .try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
            .ok_or_else(|| TensorError::TooLarge { shape: shape.clone() })?;
        if expected != found {
            return Err(TensorError::Length { shape, dtype: dtype.name(), expected, found });
        }
        Ok(HostTensor { shape, payload, rounding: Rounding::default() })
    }

    /// Rounds to `dtype` if that is narrower, and measures what that costs. What is not finite stays
    /// so, or makes its block's scale so. Panics if `shape` does not fit `values`, and for int8 if it
    /// is not `[N, H]`.
    pub fn from_f32(values: &[f32], shape: Vec<usize>, dtype: WireDType) -> Self {
        let payload = match dtype {
            WireDType::F32 => {
                let mut bytes = Vec::with_capacity(4 * values.len());
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                Payload::F32(bytes.into())
            }
            WireDType::Bf16 => Payload::Bf16(halves::to_bf16_bytes(values).into()),
            WireDType::F16 => {
                let (stored, scale_exponent) = halves::to_f16_bytes(values);
                Payload::F16 { stored: stored.into(), scale_exponent }
            }
            WireDType::Int8 => {
                assert_eq!(shape.len(), 2, "int8 is for [N, H]");
                Payload::Int8(Int8Rows::quantise(values, shape[1]))
            }
        };
        let tensor = HostTensor::sized(shape, payload).expect("the shape fits the values");
        if dtype == WireDType::F32 {
            return tensor;
        }
        let (n_rows, width) = tensor.rows();
        let stride = Rounding::stride(n_rows);
        tensor.measured(stride, |row| &values[row * stride * width..][..width])
    }

    /// Measures what rounding has cost: `exact(i)` is what row `i * stride` was rounded from. For
    /// who rounds by other means than [`HostTensor::from_f32`].
    pub fn measured<'a>(mut self, stride: usize, exact: impl Fn(usize) -> &'a [f32]) -> Self {
        let (n_rows, width) = self.rows();
        let mut came = Vec::with_capacity(width);
        for (i, row) in (0..n_rows).step_by(stride).enumerate() {
            came.clear();
            self.extend(row..row + 1, &mut came);
            self.rounding.add(exact(i), &came);
        }
        self
    }

    /// All values, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let (n_rows, width) = self.rows();
        let mut out = Vec::with_capacity(n_rows * width);
        self.extend(0..n_rows, &mut out);
        out
    }

    fn extend(&self, rows: Range<usize>, out: &mut Vec<f32>) {
        let (_, width) = self.rows();
        let size = width * self.dtype().size();
        let of = |bytes: &Bytes| bytes.slice(rows.start * size..rows.end * size);
        match &self.payload {
            Payload::F32(bytes) => halves::extend_from_f32(&of(bytes), out),
            Payload::Bf16(bytes) => halves::extend_from_bf16(&of(bytes), out),
            Payload::F16 { stored, scale_exponent } => {
                halves::extend_from_f16(&of(stored), *scale_exponent, out);
            }
            Payload::Int8(int8) => rows.for_each(|row| int8.extend_row(row, width, out)),
        }
    }

    /// Number and length of the rows: the first dimension and all others.
    fn rows(&self) -> (usize, usize) {
        match self.shape[..] {
            [] => (1, 1),
            [n_rows, ref others @ ..] => (n_rows, others.iter().product()),
        }
    }

    pub fn dtype(&self) -> WireDType {
        self.payload.dtype()
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The elements, without what an int8 tensor has beside them.
    pub fn data(&self) -> &Bytes {
        self.payload.elements()
    }

    /// All that travels.
    pub fn n_bytes(&self) -> usize {
        match &self.payload {
            Payload::Int8(Int8Rows { numbers, scales, outlier_channels, outlier_values }) => {
                numbers.len() + scales.len() + 4 * outlier_channels.len() + outlier_values.len()
            }
            other => other.elements().len(),
        }
    }

    /// What rounding has cost, measured on a sample of the rows.
    pub fn rounding(&self) -> Rounding {
        self.rounding
    }

    pub fn into_proto(self) -> v1::Tensor {
        let dtype = self.dtype().to_proto() as i32;
        let shape = self.shape.iter().map(|&n| n as u32).collect();
        let plain = v1::Tensor { dtype, shape, ..Default::default() };
        match self.payload {
            Payload::F32(data) | Payload::Bf16(data) => v1::Tensor { data, ..plain },
            Payload::F16 { stored, scale_exponent } => {
                v1::Tensor { data: stored, scale_exponent: Some(scale_exponent), ..plain }
            }
            Payload::Int8(Int8Rows { numbers, scales, outlier_channels, outlier_values }) => {
                v1::Tensor {
                    data: numbers,
                    block_scales: scales,
                    outlier_channels,
                    outlier_values,
                    ..plain
                }
            }
        }
    }

    /// Checks dtype, number of dimensions, lengths, scales and outlier channels, and that nothing is
    /// there that the dtype does not use; the bytes are not copied. Every dimension is at least 1, so
    /// that none can be larger than the bytes that came.
    pub fn from_proto(tensor: Option<v1::Tensor>) -> Result<Self, TensorError> {
        let tensor = tensor.ok_or(TensorError::Missing)?;
        let found = tensor.shape.len();
        if found > MAX_DIMENSIONS {
            return Err(TensorError::Dimensions { found });
        }
        if tensor.shape.contains(&0) {
            return Err(TensorError::Empty { shape: tensor.shape });
        }
        let dtype = WireDType::from_proto(tensor.dtype)?;
        let is_int8 = dtype == WireDType::Int8;
        for (field, present, belongs) in [
            ("scale_exponent", tensor.scale_exponent.is_some(), dtype == WireDType::F16),
            ("block_scales", !tensor.block_scales.is_empty(), is_int8),
            ("outlier_channels", !tensor.outlier_channels.is_empty(), is_int8),
            ("outlier_values", !tensor.outlier_values.is_empty(), is_int8),
        ] {
            if present && !belongs {
                return Err(TensorError::Stray { field, dtype: dtype.name() });
            }
        }
        let payload = match dtype {
            WireDType::F32 => Payload::F32(tensor.data),
            WireDType::Bf16 => Payload::Bf16(tensor.data),
            WireDType::F16 => {
                let scale_exponent = tensor.scale_exponent.ok_or(TensorError::ScaleMissing)?;
                Payload::F16 { stored: tensor.data, scale_exponent }
            }
            WireDType::Int8 => Payload::Int8(Int8Rows {
                numbers: tensor.data,
                scales: tensor.block_scales,
                outlier_channels: tensor.outlier_channels,
                outlier_values: tensor.outlier_values,
            }),
        };
        HostTensor::new(tensor.shape.iter().map(|&n| n as usize).collect(), payload)
    }
}

#[cfg(test)]
#[path = "tensor_tests.rs"]
mod tests;
