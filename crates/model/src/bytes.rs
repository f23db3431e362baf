//! How many bytes a pass takes, from shapes alone: exact for tapes, measured for the workspace
//! (benches/README.md, "memory").

use crate::block::Mlp;
use crate::{Part, TapeSize};
use offshoot_adapters::AdapterSet;

/// Of what a workspace is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Forward,
    /// Of tapes of at least this size.
    Backward(TapeSize),
}

/// Rows `[N, F]` and `[N, H]` that a pass takes where it takes most: those that are alive at once, and
/// the gaps that they leave in the process's memory, which are as large on the CPU.
const FORWARD_ROWS: [u64; 2] = [9, 14];
const BACKWARD_ROWS: [u64; 2] = [9, 12];

impl Part {
    /// Bytes of a tape of `n_tokens` rows of one segment.
    pub fn tape_bytes(&self, n_tokens: u64, size: TapeSize, adapter: Option<&AdapterSet>) -> u64 {
        let (n_blocks, element) = (self.blocks.len() as u64, self.element_bytes());
        let input = self.config.hidden_size as u64 * element;
        n_tokens
            * match size {
                TapeSize::Full => {
                    let ranks = adapter.map_or(0, |set| set.sites().len() * set.spec().r) as u64;
                    n_blocks * self.block_bytes() + ranks * element
                }
                TapeSize::Blocks => n_blocks * input,
                TapeSize::Input => input.min(n_blocks * input),
            }
    }

    /// Bytes beside weights, adapters and tapes while `n_tokens` rows run.
    pub fn workspace_bytes(&self, n_tokens: u64, work: Work) -> u64 {
        let [wide, narrow] = match work {
            Work::Forward => FORWARD_ROWS,
            Work::Backward(_) => BACKWARD_ROWS,
        };
        let (h, f) = (self.config.hidden_size as u64, self.config.intermediate_size as u64);
        let rows = (wide * f + narrow * h) * self.element_bytes();
        let again = match work {
            Work::Forward | Work::Backward(TapeSize::Full) => 0,
            Work::Backward(TapeSize::Blocks) => self.block_bytes(),
            Work::Backward(TapeSize::Input) => {
                self.block_bytes() + self.blocks.len() as u64 * h * self.element_bytes()
            }
        };
        n_tokens * (rows + again) + self.widened_bytes()
    }

    /// Bytes beside the workspace while `n_tokens` rows of a sequence run that has `n_keys` tokens with
    /// them: which row sees which key, and one block's keys and values in the attention's dtype, once
    /// for each query head where a kernel wants that.
    pub fn prefix_bytes(&self, n_tokens: u64, n_keys: u64) -> u64 {
        let c = &self.config;
        let mask = if n_tokens == 1 || n_tokens == n_keys { 0 } else { 2 * 4 * n_tokens * n_keys };
        let heads = if n_tokens == 1 { c.n_kv_heads } else { c.n_heads };
        mask + 2 * 4 * n_keys * (heads * c.head_dim) as u64
    }

    /// What a full tape keeps of one row in one block, LoRA apart.
    fn block_bytes(&self) -> u64 {
        let Some(block) = self.blocks.first() else { return 0 };
        let c = &self.config;
        let (h, f) = (c.hidden_size as u64, c.intermediate_size as u64);
        let q = (c.n_heads * c.head_dim) as u64;
        let k = (c.n_kv_heads * c.head_dim) as u64;
        let raw = if block.head_norms.is_some() { q + k } else { 0 };
        let mlp = match block.mlp {
            Mlp::Gated { .. } => 2 * f,
            Mlp::Plain { .. } => f,
        };
        let log_sums = 4 * c.n_heads as u64;
        // x, x_mid; q, k, v, attended; what the activation product takes.
        (2 * h + 2 * q + 2 * k + raw + mlp) * self.element_bytes() + log_sums
    }

    /// The largest weight in the dtype of the rows, where that is wider than its own.
    fn widened_bytes(&self) -> u64 {
        let linears = self.blocks.iter().flat_map(|block| block.linears());
        let widened = linears.filter(|linear| linear.weight.kind() != self.kind());
        let largest = widened.map(|linear| (linear.d_in() * linear.d_out()) as u64).max();
        largest.unwrap_or(0) * self.element_bytes()
    }

    fn element_bytes(&self) -> u64 {
        self.kind().elt_size_in_bytes() as u64
    }
}
