use crate::block::BlockTape;
use tch::Tensor;

/// What a forward of a range of layers leaves behind for its backward: each block's saved tensors.
/// It is used up by one backward.
pub struct Tape {
    pub(crate) blocks: Vec<BlockTape>,
}

impl Tape {
    /// Bytes that it holds on the device.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(BlockTape::bytes).sum()
    }
}

pub(crate) fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
