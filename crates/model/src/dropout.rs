use tch::{Kind, Tensor};

/// Names the dropout masks of one microbatch. A mask is a function of this key, the module's path
/// and the place of the element in the microbatch's own rows: the backward, a recomputed forward
/// and a resumed run see the same one, whoever else is in the batch and wherever the model is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    /// The session's seed.
    pub seed: u64,
    /// Another one for each microbatch.
    pub microbatch: u64,
}

impl DropoutKey {
    /// The mask of shape `[n_rows, width]` that multiplies the LoRA input of the module at `path`: 0
    /// with probability `p`, else 1 / (1 - p), in the dtype and on the device of `like`.
    pub fn mask(&self, path: &str, shape: [i64; 2], p: f64, like: &Tensor) -> Tensor {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"offshoot dropout").update(&self.seed.to_le_bytes());
        hasher.update(&self.microbatch.to_le_bytes()).update(path.as_bytes());
        let mut state = u64::from_le_bytes(
            hasher.finalize().as_bytes()[..8].try_into().expect("a hash has 32 bytes"),
        );
        // 16 random bits decide one element.
        let threshold = (p * 65536.0).round() as u16;
        let n = (shape[0] * shape[1]) as usize;
        let mut keep = Vec::with_capacity(n + 3);
        while keep.len() < n {
            let mut bits = split_mix(&mut state);
            for _ in 0..4 {
                keep.push(u8::from(bits as u16 >= threshold));
                bits >>= 16;
            }
        }
        let mask = Tensor::from_data_size(&keep[..n], &shape, Kind::Uint8);
        mask.to_device(like.device()).to_kind(like.kind()) * (1.0 / (1.0 - p))
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_mask_is_replayable_and_has_its_rate() {
        let key = DropoutKey { seed: 3, microbatch: 8 };
        let like = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let mask = key.mask("a", [400, 301], 0.1, &like);
        assert!(mask.equal(&key.mask("a", [400, 301], 0.1, &like)));
        assert!(!mask.equal(&key.mask("b", [400, 301], 0.1, &like)));
        let next = DropoutKey { microbatch: 9, ..key };
        assert!(!mask.equal(&next.mask("a", [400, 301], 0.1, &like)));
        let dropped = mask.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((dropped - 0.1).abs() < 0.005, "{dropped}");
        let mean = mask.mean(Kind::Float).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.005, "{mean}");
    }
}
