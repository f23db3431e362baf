//! f32 to and from the two 16-bit floats, as bytes that may lie anywhere in a message.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Values at a time: in registers and the nearest cache.
const CHUNK: usize = 64;

/// Exponents of a scale: powers of two that f32 can hold, with their inverses.
pub(crate) const SCALE_EXPONENTS: std::ops::RangeInclusive<i32> = -126..=113;

/// Bits of a magnitude; as whole numbers they are ordered like the magnitudes, with infinity and
/// NaN on top.
pub(crate) fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// 2^`exponent`, within [`SCALE_EXPONENTS`] or its negatives.
pub(crate) fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// The exponent with which a tensor travels in f16: its largest magnitude lies in [2^14, 2^15) when
/// stored, so that rounding cannot make it infinite. 0 for zeros; the largest for what is not finite.
fn scale_exponent(largest: f32) -> i32 {
    if largest == 0.0 {
        return 0;
    }
    let exponent = (magnitude_bits(largest) >> 23) as i32 - 127;
    (exponent - 14).clamp(*SCALE_EXPONENTS.start(), *SCALE_EXPONENTS.end())
}

pub(crate) fn to_bf16_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(2 * values.len());
    bytes.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
    bytes
}

/// With the exponent of their scale.
pub(crate) fn to_f16_bytes(values: &[f32]) -> (Vec<u8>, i32) {
    let largest = values.iter().fold(0, |largest, &value| magnitude_bits(value).max(largest));
    let exponent = scale_exponent(f32::from_bits(largest));
    let factor = power_of_two(-exponent);
    let mut bytes = Vec::with_capacity(2 * values.len());
    let (mut scaled, mut halves) = ([0.0; CHUNK], [f16::ZERO; CHUNK]);
    for chunk in values.chunks(CHUNK) {
        let (scaled, halves) = (&mut scaled[..chunk.len()], &mut halves[..chunk.len()]);
        for (scaled, value) in scaled.iter_mut().zip(chunk) {
            *scaled = value * factor;
        }
        halves.convert_from_f32_slice(scaled);
        bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
    }
    (bytes, exponent)
}

/// Appends the values of f32 bytes.
pub(crate) fn extend_from_f32(bytes: &[u8], out: &mut Vec<f32>) {
    out.extend(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)));
}

/// Appends the values of bf16 bytes.
pub(crate) fn extend_from_bf16(bytes: &[u8], out: &mut Vec<f32>) {
    let wide = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    out.extend(bytes.as_chunks::<2>().0.iter().map(wide));
}

/// Appends the values of f16 bytes times 2^`exponent`.
pub(crate) fn extend_from_f16(bytes: &[u8], exponent: i32, out: &mut Vec<f32>) {
    let factor = power_of_two(exponent);
    let (mut halves, mut floats) = ([f16::ZERO; CHUNK], [0.0; CHUNK]);
    for chunk in bytes.as_chunks::<2>().0.chunks(CHUNK) {
        let (halves, floats) = (&mut halves[..chunk.len()], &mut floats[..chunk.len()]);
        for (half, bytes) in halves.iter_mut().zip(chunk) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(floats);
        out.extend(floats.iter().map(|value| value * factor));
    }
}
