use crate::Site;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values of A `[r, d_in]` as PEFT draws them: `kaiming_uniform_(a=sqrt(5))`, which is uniform in
/// `[-1/sqrt(d_in), 1/sqrt(d_in))`. They depend on the seed and the site's path only, so that a
/// module starts the same wherever the model is cut. (B starts at zero.)
pub(crate) fn init_a(seed: u64, site: &Site, r: usize) -> Vec<f32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"offshoot lora_A").update(&seed.to_le_bytes()).update(site.path.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    let bound = 1.0 / (site.d_in as f32).sqrt();
    (0..r * site.d_in as usize).map(|_| rng.random_range(-bound..bound)).collect()
}
