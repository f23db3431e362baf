//! How many bytes a pass takes, from shapes alone: exact for tapes, measured for the workspace
//! (benches/README.md, "memory").

use crate::layout::Layout;
use crate::{Family, ModelConfig, Part, TapeSize, compute_kind};
use offshoot_adapters::AdapterSet;
use std::ops::Range;
use tch::{Device, Kind};

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

/// What the bytes of some layers' passes follow from. A [`Part`] has it of itself; without weights it
/// is that of the part that would be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shapes {
    n_blocks: u64,
    /// H, F.
    hidden: u64,
    mlp: u64,
    /// A D, K D.
    queries: u64,
    keys: u64,
    /// Of an element of the rows.
    element: u64,
    /// What a full tape keeps of one row in one block, LoRA apart.
    block: u64,
    /// The largest weight in the dtype of the rows, where that is wider than its own.
    widened: u64,
}

impl Shapes {
    /// Of these layers with weights in `weights`, as [`Part::load`] would hold them there.
    pub fn new(config: &ModelConfig, layers: Range<usize>, weights: Kind, device: Device) -> Self {
        let rows = compute_kind(weights, device);
        let element = rows.elt_size_in_bytes() as u64;
        let (layout, c) = (Layout::of(config.family), config);
        let (hidden, mlp) = (c.hidden_size as u64, c.intermediate_size as u64);
        let queries = (c.n_heads * c.head_dim) as u64;
        let keys = (c.n_kv_heads * c.head_dim) as u64;
        // Queries and keys before the head norms.
        let raw = if c.family == Family::Qwen3 { queries + keys } else { 0 };
        let activations = if layout.modules.gate.is_some() { 2 * mlp } else { mlp };
        let log_sums = 4 * c.n_heads as u64;
        // x, x_mid; q, k, v, attended; what the activation product takes.
        let kept = 2 * hidden + 2 * queries + 2 * keys + raw + activations;
        let linears = layout.linears().into_iter().map(|name| c.linear_size(&layout.modules, name));
        let largest = linears.map(|(d_in, d_out)| (d_in * d_out) as u64).max().unwrap_or(0);
        Shapes {
            n_blocks: layers.len() as u64,
            hidden,
            mlp,
            queries,
            keys,
            element,
            block: if layers.is_empty() { 0 } else { kept * element + log_sums },
            widened: if layers.is_empty() || weights == rows { 0 } else { largest * element },
        }
    }

    /// Bytes of a tape of `n_tokens` rows of one segment, whose adapter has `ranks`: the sum of the
    /// ranks at all its sites.
    pub fn tape_bytes(&self, n_tokens: u64, size: TapeSize, ranks: u64) -> u64 {
        let input = self.hidden * self.element;
        n_tokens
            * match size {
                TapeSize::Full => self.n_blocks * self.block + ranks * self.element,
                TapeSize::Blocks => self.n_blocks * input,
                TapeSize::Input => input.min(self.n_blocks * input),
            }
    }

    /// Bytes beside weights, adapters and tapes while `n_tokens` rows run.
    pub fn workspace_bytes(&self, n_tokens: u64, work: Work) -> u64 {
        let [wide, narrow] = match work {
            Work::Forward => FORWARD_ROWS,
            Work::Backward(_) => BACKWARD_ROWS,
        };
        let rows = (wide * self.mlp + narrow * self.hidden) * self.element;
        let again = match work {
            Work::Forward | Work::Backward(TapeSize::Full) => 0,
            Work::Backward(TapeSize::Blocks) => self.block,
            Work::Backward(TapeSize::Input) => {
                self.block + self.n_blocks * self.hidden * self.element
            }
        };
        n_tokens * (rows + again) + self.widened
    }

    /// Bytes beside the workspace while `n_tokens` rows of a sequence run that has `n_keys` tokens with
    /// them: which row sees which key, and one block's keys and values in the attention's dtype, once
    /// for each query head where a kernel wants that.
    pub fn prefix_bytes(&self, n_tokens: u64, n_keys: u64) -> u64 {
        let mask = if n_tokens == 1 || n_tokens == n_keys { 0 } else { 2 * 4 * n_tokens * n_keys };
        let heads = if n_tokens == 1 { self.keys } else { self.queries };
        mask + 2 * 4 * n_keys * heads
    }

    /// Bytes of a cache with room for `capacity` tokens.
    pub fn cache_bytes(&self, capacity: u64) -> u64 {
        self.n_blocks * 2 * self.keys * capacity * self.element
    }
}

impl Part {
    /// What its bytes follow from.
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// Bytes of a tape of `n_tokens` rows of one segment.
    pub fn tape_bytes(&self, n_tokens: u64, size: TapeSize, adapter: Option<&AdapterSet>) -> u64 {
        self.shapes.tape_bytes(n_tokens, size, adapter.map_or(0, AdapterSet::ranks))
    }

    /// Bytes beside weights, adapters and tapes while `n_tokens` rows run.
    pub fn workspace_bytes(&self, n_tokens: u64, work: Work) -> u64 {
        self.shapes.workspace_bytes(n_tokens, work)
    }

    /// The same for rows behind others of their sequence: see [`Shapes::prefix_bytes`].
    pub fn prefix_bytes(&self, n_tokens: u64, n_keys: u64) -> u64 {
        self.shapes.prefix_bytes(n_tokens, n_keys)
    }

    /// Bytes of a cache with room for `capacity` tokens.
    pub fn cache_bytes(&self, capacity: u64) -> u64 {
        self.shapes.cache_bytes(capacity)
    }
}
