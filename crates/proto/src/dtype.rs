use crate::{TensorError, v1};

/// Element type of a tensor on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireDType {
    /// Loses nothing.
    F32,
    /// 8 bits of precision, the range of f32.
    Bf16,
    /// 11 bits of precision for values down to 2^-29 of the largest, by a scale for each tensor.
    F16,
    /// Whole numbers up to 127, by a scale for each 64 neighbours; outlier channels in bf16.
    Int8,
}

impl WireDType {
    /// Every dtype that this version speaks.
    pub const ALL: [WireDType; 4] =
        [WireDType::F32, WireDType::Bf16, WireDType::F16, WireDType::Int8];

    /// Bytes of one element, without what an int8 tensor has beside its elements.
    pub fn size(self) -> usize {
        match self {
            WireDType::F32 => 4,
            WireDType::Bf16 | WireDType::F16 => 2,
            WireDType::Int8 => 1,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            WireDType::F32 => "f32",
            WireDType::Bf16 => "bf16",
            WireDType::F16 => "f16",
            WireDType::Int8 => "int8",
        }
    }

    pub fn to_proto(self) -> v1::DType {
        match self {
            WireDType::F32 => v1::DType::DtypeF32,
            WireDType::Bf16 => v1::DType::DtypeBf16,
            WireDType::F16 => v1::DType::DtypeF16,
            WireDType::Int8 => v1::DType::DtypeInt8,
        }
    }

    /// From the number in a message.
    pub fn from_proto(value: i32) -> Result<Self, TensorError> {
        match v1::DType::try_from(value) {
            Ok(v1::DType::DtypeF32) => Ok(WireDType::F32),
            Ok(v1::DType::DtypeBf16) => Ok(WireDType::Bf16),
            Ok(v1::DType::DtypeF16) => Ok(WireDType::F16),
            Ok(v1::DType::DtypeInt8) => Ok(WireDType::Int8),
            Ok(v1::DType::DtypeUnspecified) | Err(_) => Err(TensorError::UnknownDType { value }),
        }
    }
}
