//! The check that every value is a number, on bytes as they come from and go to the wire.

use offshoot_proto::{HostTensor, WireDType};

/// Index of the first value that is infinite or NaN.
pub fn first_bad(tensor: &HostTensor) -> Option<usize> {
    match tensor.dtype() {
        WireDType::F32 => {
            const EXPONENT: u32 = 0x7f80_0000;
            let (values, _) = tensor.data().as_chunks::<4>();
            first(values, |bytes| u32::from_le_bytes(*bytes) & EXPONENT == EXPONENT)
        }
        WireDType::Bf16 => {
            const EXPONENT: u16 = 0x7f80;
            let (values, _) = tensor.data().as_chunks::<2>();
            first(values, |bytes| u16::from_le_bytes(*bytes) & EXPONENT == EXPONENT)
        }
    }
}

/// Counts block by block, which the compiler turns into vector instructions, and searches only a
/// block that has one.
fn first<T>(values: &[T], is_bad: impl Fn(&T) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    for (i, block) in values.chunks(BLOCK).enumerate() {
        if block.iter().map(|value| u32::from(is_bad(value))).sum::<u32>() > 0 {
            return block.iter().position(is_bad).map(|at| i * BLOCK + at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_no_number_is_found() {
        for dtype in WireDType::ALL {
            let mut values = vec![1.0; 10_000];
            values[17] = -f32::MAX / 4.0;
            let check = |values: &[f32]| {
                first_bad(&HostTensor::from_f32(values, vec![values.len()], dtype))
            };
            assert_eq!(check(&values), None);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[9_000] = bad;
                assert_eq!(check(&values), Some(9_000));
            }
        }
    }
}
