//! Rows of whole numbers with one scale for each block of 64 neighbours, and outlier channels beside
//! them in bf16 (the layout is in `trunk.proto`). After "LLM.int8()" (arXiv 2208.07339), which found
//! that a few channels of hidden states stand far above the others, and that these, left in a block,
//! take its resolution from all their neighbours.

use crate::TensorError;
use crate::halves::{extend_from_bf16, magnitude_bits, to_bf16_bytes};
use bytes::Bytes;

/// A channel whose largest magnitude is more than so many times the median channel's is an outlier:
/// in a block with it the others would have at most 127 / 6, some 21, steps.
const OUTLIER_RATIO: f32 = 6.0;
/// Scales are below this, so that no stored number times a scale is infinite.
const SCALE_LIMIT: f32 = f32::from_bits((127 + 121) << 23);
/// Added to a number and taken off again, this rounds it; the sum's lowest bits are the result.
const ROUNDING: f32 = 1.5 * (1 << 23) as f32;

/// `[N, H]` in int8: numbers, scales and outliers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Int8Rows {
    /// i8, `[N, H]`.
    pub numbers: Bytes,
    /// f32, `[N, ceil(H / 64)]`.
    pub scales: Bytes,
    /// Increasing.
    pub outlier_channels: Vec<u32>,
    /// bf16, `[N, outlier channels]`.
    pub outlier_values: Bytes,
}

/// The most outlier channels of H.
pub fn max_outliers(width: usize) -> usize {
    (width / 32).max(1)
}

impl Int8Rows {
    /// Channels that share a scale.
    pub const BLOCK: usize = 64;

    /// Rounds `values`, `[N, width]`. A block with a value that is not finite gets a scale that is
    /// not finite.
    pub(crate) fn quantise(values: &[f32], width: usize) -> Self {
        let channels = outliers(values, width);
        let n_rows = values.len().checked_div(width).unwrap_or(0);
        let mut numbers = Vec::with_capacity(values.len());
        let mut scales = Vec::with_capacity(n_rows * width.div_ceil(Self::BLOCK));
        let mut kept = Vec::with_capacity(n_rows * channels.len());
        let mut rest = Vec::with_capacity(width);
        for row in values.chunks_exact(width.max(1)) {
            rest.clear();
            rest.extend_from_slice(row);
            for &channel in &channels {
                kept.push(row[channel]);
                rest[channel] = 0.0;
            }
            for block in rest.chunks(Self::BLOCK) {
                scales.push(quantise_block(block, &mut numbers));
            }
        }
        let scales: Vec<u8> = scales.iter().flat_map(|scale: &f32| scale.to_le_bytes()).collect();
        Int8Rows {
            numbers: numbers.into(),
            scales: scales.into(),
            outlier_channels: channels.iter().map(|&channel| channel as u32).collect(),
            outlier_values: to_bf16_bytes(&kept).into(),
        }
    }

    /// Lengths, scales and channels against `[n_rows, width]`. Values of outliers may still be
    /// other than finite.
    pub(crate) fn check(&self, n_rows: usize, width: usize) -> Result<(), TensorError> {
        let length = |part, expected, found| match expected == found {
            true => Ok(()),
            false => Err(TensorError::PartLength { part, n_rows, width, expected, found }),
        };
        let channels = &self.outlier_channels;
        let limit = max_outliers(width);
        if channels.len() > limit {
            return Err(TensorError::TooManyOutliers { found: channels.len(), limit, width });
        }
        let too_large = || TensorError::TooLarge { shape: vec![n_rows, width] };
        let of_scales =
            n_rows.checked_mul(4 * width.div_ceil(Self::BLOCK)).ok_or_else(too_large)?;
        length("block_scales", of_scales, self.scales.len())?;
        let of_outliers = n_rows.checked_mul(2 * channels.len()).ok_or_else(too_large)?;
        length("outlier_values", of_outliers, self.outlier_values.len())?;
        let fits =
            |i: usize| (channels[i] as usize) < width && (i == 0 || channels[i - 1] < channels[i]);
        if let Some(index) = (0..channels.len()).position(|i| !fits(i)) {
            let found = channels[index.saturating_sub(1)..=index].to_vec();
            return Err(TensorError::OutlierChannels { found, width });
        }
        let is_scale = |scale: f32| (0.0..SCALE_LIMIT).contains(&scale);
        match self.scales().position(|scale| !is_scale(scale)) {
            Some(index) => Err(TensorError::BlockScale {
                index,
                found: self.scales().nth(index).unwrap_or(f32::NAN),
            }),
            None => Ok(()),
        }
    }

    /// Of all blocks, row after row.
    pub fn scales(&self) -> impl Iterator<Item = f32> {
        self.scales.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    /// Appends row `row`, `width` values.
    pub(crate) fn extend_row(&self, row: usize, width: usize, out: &mut Vec<f32>) {
        let start = out.len();
        let numbers = &self.numbers[row * width..][..width];
        let scales = self.scales.as_chunks::<4>().0;
        let scales = &scales[row * width.div_ceil(Self::BLOCK)..];
        for (block, scale) in numbers.chunks(Self::BLOCK).zip(scales) {
            let scale = f32::from_le_bytes(*scale);
            out.extend(block.iter().map(|&number| f32::from(number as i8) * scale));
        }
        let n_outliers = self.outlier_channels.len();
        let mut kept = Vec::with_capacity(n_outliers);
        extend_from_bf16(&self.outlier_values[2 * row * n_outliers..][..2 * n_outliers], &mut kept);
        for (&channel, value) in self.outlier_channels.iter().zip(kept) {
            out[start + channel as usize] = value;
        }
    }
}

/// Channels far above the median one, at most [`max_outliers`], increasing. The median, since the
/// outliers themselves would lift a mean.
fn outliers(values: &[f32], width: usize) -> Vec<usize> {
    let mut largest = vec![0; width];
    for row in values.chunks_exact(width.max(1)) {
        for (largest, &value) in largest.iter_mut().zip(row) {
            *largest = magnitude_bits(value).max(*largest);
        }
    }
    if width < 2 {
        return Vec::new();
    }
    let mut order = largest.clone();
    let (_, &mut median, _) = order.select_nth_unstable(width / 2);
    let threshold = magnitude_bits(OUTLIER_RATIO * f32::from_bits(median));
    let mut channels: Vec<usize> = (0..width).filter(|&c| largest[c] > threshold).collect();
    channels.sort_by_key(|&channel| std::cmp::Reverse(largest[channel]));
    channels.truncate(max_outliers(width));
    channels.sort_unstable();
    channels
}

/// Appends a block's numbers; gives its scale.
fn quantise_block(block: &[f32], numbers: &mut Vec<u8>) -> f32 {
    let largest = block.iter().fold(0, |largest, &value| magnitude_bits(value).max(largest));
    let largest = f32::from_bits(largest);
    let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
    // Below the smallest normal number there is no inverse.
    if scale.is_nan() || scale < f32::MIN_POSITIVE {
        numbers.resize(numbers.len() + block.len(), 0);
        return if scale.is_nan() { scale } else { 0.0 };
    }
    let scale = scale.min(SCALE_LIMIT.next_down());
    let inverse = 1.0 / scale;
    let round = |value: &f32| {
        let number = (value * inverse).clamp(-127.0, 127.0);
        (number + ROUNDING).to_bits() as u8
    };
    numbers.extend(block.iter().map(round));
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(rows: &Int8Rows, n_rows: usize, width: usize) -> Vec<f32> {
        let mut out = Vec::new();
        for row in 0..n_rows {
            rows.extend_row(row, width, &mut out);
        }
        out
    }

    /// Magnitudes from 0.5 to 1.5, both signs.
    fn waves(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (1.0 + 0.5 * (i as f32 * 0.7).sin()) * if i % 3 == 0 { -1.0 } else { 1.0 })
            .collect()
    }

    #[test]
    fn every_value_is_within_half_a_step() {
        // The last block has 6 channels.
        let (n, width) = (5, 70);
        for size in [1e-30, 1e-9, 1.0, 1e9, 1e37] {
            let values: Vec<f32> = waves(n * width).iter().map(|value| value * size).collect();
            let rows = Int8Rows::quantise(&values, width);
            rows.check(n, width).unwrap();
            assert!(rows.outlier_channels.is_empty());
            assert_eq!(rows.scales().count(), n * 2);
            for (value, came) in values.iter().zip(back(&rows, n, width)) {
                // No block's largest is above 1.5.
                assert!((value - came).abs() <= 0.5001 * 1.5 * size / 127.0, "{value} {came}");
            }
        }
    }

    #[test]
    fn blocks_of_zeros_have_scale_zero_and_come_back_as_zeros() {
        let mut values = waves(3 * 128);
        values[128..192].fill(0.0);
        values[192..256].fill(-1e-38);
        let rows = Int8Rows::quantise(&values, 128);
        rows.check(3, 128).unwrap();
        let scales: Vec<f32> = rows.scales().collect();
        assert_eq!(scales[2..4], [0.0, 0.0]);
        assert!(scales[0] > 0.0 && scales[4] > 0.0);
        assert_eq!(back(&rows, 3, 128)[128..256], [0.0; 128]);
    }

    #[test]
    fn outlier_channels_leave_their_neighbours_alone() {
        let (n, width) = (4, 128);
        let mut values = waves(n * width);
        let plain = Int8Rows::quantise(&values, width);
        for row in 0..n {
            values[row * width + 5] *= 300.0;
            values[row * width + 90] *= 40.0;
        }
        let rows = Int8Rows::quantise(&values, width);
        rows.check(n, width).unwrap();
        assert_eq!(rows.outlier_channels, [5, 90]);
        let (came, without) = (back(&rows, n, width), back(&plain, n, width));
        for (i, (&came, &value)) in came.iter().zip(&values).enumerate() {
            let outlier = [5, 90].contains(&(i % width));
            let error = if outlier { value.abs() / 256.0 } else { 0.5001 * 1.5 / 127.0 };
            assert!((came - value).abs() <= error, "{i}: {value} {came}");
            // A block's scale may be that of its largest other value.
            assert!(outlier || (came - without[i]).abs() <= 1.5 / 127.0);
        }
    }

    #[test]
    fn outliers_are_bounded_and_a_tensor_of_equals_has_none() {
        let width = 64;
        assert!(Int8Rows::quantise(&[7.5; 128], width).outlier_channels.is_empty());
        assert!(Int8Rows::quantise(&[0.0; 128], width).outlier_channels.is_empty());
        // All but one are far above nothing: the largest two travel alone.
        let values: Vec<f32> = (0..width).map(|c| if c < 40 { 0.0 } else { c as f32 }).collect();
        let rows = Int8Rows::quantise(&values, width);
        assert_eq!(rows.outlier_channels, [62, 63]);
        assert_eq!(max_outliers(width), 2);
        rows.check(1, width).unwrap();
        assert_eq!(back(&rows, 1, width)[62..], [62.0, 63.0]);
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = waves(256);
            values[200] = bad;
            // The channel becomes an outlier.
            let rows = Int8Rows::quantise(&values, 128);
            assert_eq!(rows.outlier_channels, [72]);
            assert!(!back(&rows, 2, 128)[200].is_finite());
            // More bad channels than outliers: blocks.
            values[128..140].fill(bad);
            let rows = Int8Rows::quantise(&values, 128);
            assert!(rows.check(2, 128).is_err());
            assert_eq!(rows.scales().position(|scale| !scale.is_finite()), Some(2));
        }
        let rows = Int8Rows::quantise(&[f32::MAX, f32::MIN, 1e38, 0.0], 4);
        rows.check(1, 4).unwrap();
        assert!(back(&rows, 1, 4).iter().all(|value| value.is_finite()));
    }
}
