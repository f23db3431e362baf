//! The check that every value is a number, on bytes as they come from and go to the wire.

use offshoot_proto::{HostTensor, Int8Rows, Payload};

/// Index of the first value that is infinite or NaN; of an int8 tensor, of the first value of the
/// first such block, or of the first such outlier.
pub fn first_bad(tensor: &HostTensor) -> Option<usize> {
    match tensor.payload() {
        Payload::F32(bytes) => first_bad_f32(bytes),
        Payload::Bf16(bytes) => {
            const EXPONENT: u16 = 0x7f80;
            first(bytes.as_chunks::<2>().0, |bytes| {
                u16::from_le_bytes(*bytes) & EXPONENT == EXPONENT
            })
        }
        Payload::F16 { stored, scale_exponent } => {
            // With the largest scale, 2^15 and more are infinite in f32.
            let limit = if *scale_exponent > 112 { 0x7800 } else { 0x7c00 };
            first(stored.as_chunks::<2>().0, |bytes| u16::from_le_bytes(*bytes) & 0x7fff >= limit)
        }
        Payload::Int8(rows) => {
            let width = tensor.shape().last().copied().unwrap_or(0);
            first_bad_int8(rows, width)
        }
    }
}

fn first_bad_f32(bytes: &[u8]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    first(bytes.as_chunks::<4>().0, |bytes| u32::from_le_bytes(*bytes) & EXPONENT == EXPONENT)
}

/// Numbers are finite, and so is each times its scale if that is: what can be bad is a scale or an
/// outlier.
fn first_bad_int8(rows: &Int8Rows, width: usize) -> Option<usize> {
    const EXPONENT: u16 = 0x7f80;
    let of_block = |block: usize| {
        let blocks = width.div_ceil(Int8Rows::BLOCK);
        block / blocks * width + block % blocks * Int8Rows::BLOCK
    };
    let of_outlier = |outlier: usize| {
        let channels = &rows.outlier_channels;
        outlier / channels.len() * width + channels[outlier % channels.len()] as usize
    };
    let values = rows.outlier_values.as_chunks::<2>().0;
    let outlier = first(values, |bytes| u16::from_le_bytes(*bytes) & EXPONENT == EXPONENT);
    let block = first_bad_f32(&rows.scales).map(of_block);
    block.into_iter().chain(outlier.map(of_outlier)).min()
}

/// Asks every value of a block, which the compiler turns into vector instructions, and searches only
/// a block that has one.
fn first<T>(values: &[T], is_bad: impl Fn(&T) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    for (i, block) in values.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, value| any | is_bad(value)) {
            return block.iter().position(is_bad).map(|at| i * BLOCK + at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_proto::WireDType;

    #[test]
    fn the_first_value_that_is_no_number_is_found() {
        for dtype in WireDType::ALL {
            let mut values = vec![1.0; 100 * 100];
            values[17] = -f32::MAX / 4.0;
            let check =
                |values: &[f32]| first_bad(&HostTensor::from_f32(values, vec![100, 100], dtype));
            assert_eq!(check(&values), None);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[9_064] = bad;
                assert_eq!(check(&values), Some(9_064), "{dtype:?}");
            }
        }
    }

    #[test]
    fn the_first_bad_block_or_outlier_of_int8_is_found() {
        let width = 100;
        let index = |bad: &[usize]| {
            let mut values = vec![1.0; 3 * width];
            for &index in bad {
                values[index] = f32::NAN;
            }
            first_bad(&HostTensor::from_f32(&values, vec![3, width], WireDType::Int8))
        };
        // Three channels can be outliers; with more, the block of the others tells.
        assert_eq!(index(&[140, 250]), Some(140));
        assert_eq!(index(&[170, 171, 172, 173]), Some(164));
        assert_eq!(index(&[299, 298, 297, 101]), Some(101));
    }

    #[test]
    fn what_a_scale_makes_infinite_is_found() {
        let payload = |scale_exponent| Payload::F16 {
            stored: half(0x7800).into_iter().chain(half(0x77ff)).collect::<Vec<u8>>().into(),
            scale_exponent,
        };
        let check = |exponent| first_bad(&HostTensor::new(vec![1, 2], payload(exponent)).unwrap());
        assert_eq!((check(112), check(113)), (None, Some(0)));
    }

    fn half(bits: u16) -> [u8; 2] {
        bits.to_le_bytes()
    }
}
