use crate::block::Saved;
use std::ops::Range;
use tch::Tensor;

/// How much of a forward is kept for its backward. Less is kept the further down; what is missing is
/// computed again, and every size gives the same gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TapeSize {
    /// The input of the first layer.
    Input,
    /// The input of each layer.
    Blocks,
    /// Everything that the backward needs but cheap values (norms, activations).
    Full,
}

impl TapeSize {
    /// From the largest to the smallest.
    pub const ALL: [TapeSize; 3] = [TapeSize::Full, TapeSize::Blocks, TapeSize::Input];
}

/// What a forward of a range of layers leaves behind for the backward of one segment.
///
/// A full tape of a segment that shared its forward with others is a view of the batch's tensors:
/// their memory is given back when the last tape of that forward is gone.
pub struct Tape {
    n_tokens: i64,
    kept: KeptTape,
}

enum KeptTape {
    Full(Vec<SegmentTape>),
    Blocks(Vec<Kept>),
    Input(Kept),
}

/// Some rows of a tensor `[N, ...]`.
pub(crate) struct Kept {
    packed: Tensor,
    start: i64,
    n: i64,
}

/// What one block's forward saved of one segment.
pub(crate) struct SegmentTape {
    pub values: Saved<Kept>,
    /// For each linear layer `s A dropout(x)`, `[n, r]`, where the segment has LoRA there.
    pub lora: Vec<Option<Tensor>>,
}

impl Kept {
    /// A view that keeps the whole of `packed` in memory.
    pub fn view(packed: &Tensor, rows: &Range<i64>) -> Kept {
        let n = rows.end - rows.start;
        Kept { packed: packed.shallow_clone(), start: rows.start, n }
    }

    /// A copy, unless these are all rows.
    pub fn copy(packed: &Tensor, rows: &Range<i64>) -> Kept {
        let view = Kept::view(packed, rows);
        if view.is_whole() {
            return view;
        }
        Kept { packed: view.rows().copy(), start: 0, n: view.n }
    }

    fn is_whole(&self) -> bool {
        self.n == self.packed.size()[0]
    }

    fn rows(&self) -> Tensor {
        self.packed.narrow(0, self.start, self.n)
    }

    fn bytes(&self) -> u64 {
        let per_row: i64 = self.packed.size()[1..].iter().product();
        (self.n * per_row) as u64 * self.packed.kind().elt_size_in_bytes() as u64
    }

    /// The rows of several, one after the other. Without a copy where they are neighbours in one
    /// tensor, as when a backward has the company of its forward.
    pub fn gather(all: &[&Kept]) -> Tensor {
        let neighbours = all.windows(2).all(|pair| {
            pair[0].packed.data_ptr() == pair[1].packed.data_ptr()
                && pair[0].start + pair[0].n == pair[1].start
        });
        match all.first() {
            Some(first) if neighbours => {
                let n = all.iter().map(|kept| kept.n).sum();
                first.packed.narrow(0, first.start, n)
            }
            _ => Tensor::cat(&all.iter().map(|kept| kept.rows()).collect::<Vec<_>>(), 0),
        }
    }
}

impl Tape {
    pub(crate) fn full(n_tokens: i64, blocks: Vec<SegmentTape>) -> Tape {
        Tape { n_tokens, kept: KeptTape::Full(blocks) }
    }

    /// From each block's input.
    pub(crate) fn blocks(n_tokens: i64, inputs: Vec<Kept>) -> Tape {
        Tape { n_tokens, kept: KeptTape::Blocks(inputs) }
    }

    pub(crate) fn input(n_tokens: i64, input: Kept) -> Tape {
        Tape { n_tokens, kept: KeptTape::Input(input) }
    }

    /// Rows of its segment.
    pub fn n_tokens(&self) -> i64 {
        self.n_tokens
    }

    /// What is kept.
    pub fn size(&self) -> TapeSize {
        match &self.kept {
            KeptTape::Full(_) => TapeSize::Full,
            KeptTape::Blocks(_) => TapeSize::Blocks,
            KeptTape::Input(_) => TapeSize::Input,
        }
    }

    /// Bytes of the segment's own rows on the device.
    pub fn bytes(&self) -> u64 {
        match &self.kept {
            KeptTape::Full(blocks) => blocks.iter().map(SegmentTape::bytes).sum(),
            KeptTape::Blocks(inputs) => inputs.iter().map(Kept::bytes).sum(),
            KeptTape::Input(input) => input.bytes(),
        }
    }

    /// Keeps less, if `to` is less, in memory of its own.
    pub fn shrink(&mut self, to: TapeSize) {
        if self.size() <= to {
            return;
        }
        let own = |kept: &Kept| Kept::copy(&kept.packed, &(kept.start..kept.start + kept.n));
        let first = self.block_input(0).map(own);
        self.kept = match (to, first, &self.kept) {
            (TapeSize::Input, Some(first), _) => KeptTape::Input(first),
            (_, _, KeptTape::Full(blocks)) => {
                KeptTape::Blocks(blocks.iter().map(|block| own(block.values.x())).collect())
            }
            // A part without layers keeps nothing.
            _ => return,
        };
    }

    /// The input `[n, H]` of a block. None where it is not kept.
    pub(crate) fn block_input(&self, block: usize) -> Option<&Kept> {
        match &self.kept {
            KeptTape::Full(blocks) => blocks.get(block).map(|tape| tape.values.x()),
            KeptTape::Blocks(inputs) => inputs.get(block),
            KeptTape::Input(input) => (block == 0).then_some(input),
        }
    }

    /// What a block saved. None where it has to be computed again.
    pub(crate) fn block(&self, block: usize) -> Option<&SegmentTape> {
        match &self.kept {
            KeptTape::Full(blocks) => blocks.get(block),
            KeptTape::Blocks(_) | KeptTape::Input(_) => None,
        }
    }
}

impl SegmentTape {
    fn bytes(&self) -> u64 {
        let values: u64 = self.values.list().into_iter().map(Kept::bytes).sum();
        values + self.lora.iter().flatten().map(bytes_of).sum::<u64>()
    }
}

pub(crate) fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
