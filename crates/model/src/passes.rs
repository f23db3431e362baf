//! Forward and backward of a part over packed rows of any segments.

use crate::block::{BlockTape, Pass};
use crate::cache::{Past, PastOfBlock};
use crate::lora::{LoraGradients, LoraMode, LoraPass};
use crate::tape::{Kept, SegmentTape};
use crate::{KvCache, Part, Rows, Segment, Tape, TapeSize};
use tch::{Kind, Tensor};

/// The gradients of one backward.
pub struct Backward {
    /// `[N, H]` by the part's input, if it was wanted.
    pub input: Option<Tensor>,
    /// For each segment a flat float32 gradient `[P]` of its adapter; empty `[0]` without one.
    pub lora: Vec<Tensor>,
}

/// What becomes of a segment's rows in a forward.
#[derive(Clone, Copy)]
pub enum Way<'a> {
    /// Nothing is kept.
    Evaluate,
    /// A tape is kept for the backward.
    Train(TapeSize),
    /// They are the next rows of one sequence, behind those that the cache holds.
    Extend(&'a KvCache),
}

/// Below this share of a batch's rows a full tape copies its rows instead of keeping the whole batch
/// in memory.
const VIEW_SHARE: f64 = 0.75;

/// What a pass through all blocks begins with.
struct PassInput<'a> {
    /// `[N, H]`.
    x: &'a Tensor,
    rows: &'a Rows,
    segments: &'a [Segment<'a>],
    past: Option<&'a Past<'a>>,
}

/// A tape while its forward runs.
enum Recording {
    Full(Vec<SegmentTape>),
    Blocks(Vec<Kept>),
    Input(Option<Kept>),
}

impl Part {
    /// Sets how LoRA of several segments is computed; [`LoraMode::Auto`] unless said otherwise.
    pub fn set_lora_mode(&mut self, mode: LoraMode) {
        self.lora_mode = mode;
    }

    /// `[N, H] -> [N, H]` through all blocks, and for each segment whose `keep` says so what
    /// [`Part::backward`] needs of it. None: evaluation, nothing is kept.
    pub fn forward(
        &self,
        x: &Tensor,
        rows: &Rows,
        segments: &[Segment],
        keep: &[Option<TapeSize>],
    ) -> (Tensor, Vec<Option<Tape>>) {
        let ways = keep.iter().map(|keep| keep.map_or(Way::Evaluate, Way::Train));
        self.forward_mixed(x, rows, segments, &ways.collect::<Vec<_>>())
    }

    /// `[N, H] -> [N, H]`, each segment in its way. Positions in `rows` of a segment with a cache go
    /// on from the cache's length, as [`Rows::after`] makes them; its room must be there. What is
    /// written there counts after [`KvCache::advance`].
    pub fn forward_mixed(
        &self,
        x: &Tensor,
        rows: &Rows,
        segments: &[Segment],
        ways: &[Way],
    ) -> (Tensor, Vec<Option<Tape>>) {
        assert_eq!(segments.len(), ways.len(), "one way for each segment");
        let caches = ways.iter().map(|way| match way {
            Way::Extend(cache) => Some(*cache),
            Way::Evaluate | Way::Train(_) => None,
        });
        let past = Past::new(rows, segments, caches.collect());
        let keep = ways.iter().map(|way| match way {
            Way::Train(size) => Some(*size),
            Way::Evaluate | Way::Extend(_) => None,
        });
        let keep: Vec<Option<TapeSize>> = keep.collect();
        let full_rows: i64 = segments
            .iter()
            .zip(&keep)
            .filter(|(_, keep)| **keep == Some(TapeSize::Full))
            .map(|(segment, _)| segment.n_rows())
            .sum();
        let views = full_rows as f64 >= VIEW_SHARE * rows.n_tokens() as f64;
        let mut recordings: Vec<Option<Recording>> =
            keep.iter().map(|keep| keep.map(Recording::new)).collect();
        let input = PassInput { x, rows, segments, past: past.as_ref() };
        let y = self.run(&input, |x, tape| {
            for (i, (segment, recording)) in segments.iter().zip(&mut recordings).enumerate() {
                if let Some(recording) = recording {
                    recording.add(x, &tape, Place { index: i, segment, views });
                }
            }
        });
        let tapes = recordings.into_iter().zip(segments);
        (y, tapes.map(|(recording, segment)| Some(recording?.finish(segment))).collect())
    }

    /// The same for one segment, keeping everything that its backward needs.
    pub fn forward_train(&self, x: &Tensor, rows: &Rows, segment: &Segment) -> (Tensor, Tape) {
        let segments = std::slice::from_ref(segment);
        let (y, mut tapes) = self.forward(x, rows, segments, &[Some(TapeSize::Full)]);
        (y, tapes.pop().flatten().expect("one tape was asked for"))
    }

    /// `[N, H] -> [N, H]` through all blocks, keeping nothing.
    pub fn forward_eval(&self, x: &Tensor, rows: &Rows, segments: &[Segment]) -> Tensor {
        self.run(&PassInput { x, rows, segments, past: None }, |_, _| {})
    }

    /// `[N, H] -> [N, H]` without dropout: of each segment with a cache the next rows of its
    /// sequence, which the cache holds afterwards; the others are evaluated. Positions in `rows` go
    /// on from the caches' lengths, as [`Rows::after`] makes them.
    pub fn forward_cached(
        &self,
        x: &Tensor,
        rows: &Rows,
        segments: &[Segment],
        caches: &mut [Option<&mut KvCache>],
    ) -> Tensor {
        let ways: Vec<Way> =
            caches.iter().map(|c| c.as_deref().map_or(Way::Evaluate, Way::Extend)).collect();
        let (y, _) = self.forward_mixed(x, rows, segments, &ways);
        for (cache, segment) in caches.iter_mut().zip(segments) {
            if let Some(cache) = cache {
                cache.advance(segment.n_rows());
            }
        }
        y
    }

    /// `each` gets every block's input and tape.
    fn run(&self, input: &PassInput, mut each: impl FnMut(&Tensor, BlockTape)) -> Tensor {
        let &PassInput { x, rows, segments, past } = input;
        let rope = self.rope_tables(rows);
        let lora = LoraPass::new(self.lora_mode);
        let pass = Pass { rows, segments, lora, rope: rope.as_ref() };
        let mut x = x.shallow_clone();
        for (i, block) in self.blocks.iter().enumerate() {
            let past = past.map(|past| PastOfBlock { past, block: i });
            let (y, tape) = block.forward(&x, &pass, past);
            each(&x, tape);
            x = y;
        }
        x
    }

    /// Gradients by LoRA, and by the input if `want_input`, from the gradient `[N, H]` by the
    /// output. `tapes` are those of the segments in their order, of any forwards and sizes; rows and
    /// segments are what the forwards had, packed as this batch packs them.
    pub fn backward(
        &self,
        tapes: &[&Tape],
        grad: &Tensor,
        rows: &Rows,
        segments: &[Segment],
        want_input: bool,
    ) -> Backward {
        assert_eq!(segments.len(), tapes.len(), "one tape for each segment");
        let gradients: LoraGradients =
            segments.iter().map(|s| s.adapter.map(|adapter| adapter.new_gradient())).collect();
        let inputs = self.block_inputs(tapes, rows, segments);
        let rope = self.rope_tables(rows);
        let lora = LoraPass::new(self.lora_mode);
        let pass = Pass { rows, segments, lora, rope: rope.as_ref() };
        // A copy, since the blocks add to it in place.
        let mut grad = Some(grad.copy());
        for (i, block) in self.blocks.iter().enumerate().rev() {
            let tape = match tapes.iter().map(|tape| tape.block(i)).collect::<Option<Vec<_>>>() {
                Some(parts) => gather(&parts),
                None => block.forward(&inputs.block(i, tapes), &pass, None).1,
            };
            let by_output = grad.take().expect("only the lowest block returns none");
            grad = block.backward(&tape, by_output, &pass, &gradients, want_input || i > 0);
        }
        let lora = gradients
            .into_iter()
            .map(|flat| flat.unwrap_or_else(|| Tensor::zeros([0], (Kind::Float, self.device()))))
            .collect();
        Backward { input: grad.filter(|_| want_input), lora }
    }

    /// Where blocks have to be computed again: their inputs, from the tapes if all have them, else
    /// by another forward.
    fn block_inputs(&self, tapes: &[&Tape], rows: &Rows, segments: &[Segment]) -> BlockInputs {
        let smallest = tapes.iter().map(|tape| tape.size()).min();
        if smallest != Some(TapeSize::Input) || self.blocks.is_empty() {
            return BlockInputs::Kept;
        }
        let x = BlockInputs::Kept.block(0, tapes);
        let mut inputs = Vec::with_capacity(self.blocks.len());
        let input = PassInput { x: &x, rows, segments, past: None };
        let _ = self.run(&input, |x, _| inputs.push(x.shallow_clone()));
        BlockInputs::Computed(inputs)
    }

    fn rope_tables(&self, rows: &Rows) -> Option<crate::rope::RopeTables> {
        self.config.rope.as_ref().map(|rope| rope.tables(rows.positions()))
    }
}

/// Where the inputs of blocks come from that are computed again.
enum BlockInputs {
    Kept,
    /// `[N, H]` for each block.
    Computed(Vec<Tensor>),
}

impl BlockInputs {
    fn block(&self, block: usize, tapes: &[&Tape]) -> Tensor {
        match self {
            BlockInputs::Computed(inputs) => inputs[block].shallow_clone(),
            BlockInputs::Kept => {
                let kept = tapes.iter().map(|tape| {
                    tape.block_input(block).expect("a tape of more than the first input has all")
                });
                Kept::gather(&kept.collect::<Vec<_>>())
            }
        }
    }
}

/// What one block saved of all segments, in their order.
fn gather(parts: &[&SegmentTape]) -> BlockTape {
    let lists: Vec<Vec<&Kept>> = parts.iter().map(|part| part.values.list()).collect();
    let mut i = 0;
    let saved = parts[0].values.map(|_| {
        let all: Vec<&Kept> = lists.iter().map(|list| list[i]).collect();
        i += 1;
        Kept::gather(&all)
    });
    let n_linears = parts[0].lora.len();
    let of_linear = |linear: usize| {
        parts.iter().map(|part| part.lora[linear].as_ref().map(Tensor::shallow_clone)).collect()
    };
    BlockTape { saved, lora: (0..n_linears).map(of_linear).collect() }
}

/// Which rows of a batch a recording is of.
struct Place<'a> {
    /// Of the segment.
    index: usize,
    segment: &'a Segment<'a>,
    /// Whether full tapes are views.
    views: bool,
}

impl Recording {
    fn new(size: TapeSize) -> Self {
        match size {
            TapeSize::Full => Recording::Full(Vec::new()),
            TapeSize::Blocks => Recording::Blocks(Vec::new()),
            TapeSize::Input => Recording::Input(None),
        }
    }

    fn add(&mut self, x: &Tensor, tape: &BlockTape, place: Place) {
        let rows = &place.segment.rows;
        match self {
            Recording::Full(blocks) => {
                let keep = if place.views { Kept::view } else { Kept::copy };
                let values = tape.saved.map(|value| keep(value, rows));
                let own = |lora: &Vec<Option<Tensor>>| {
                    lora[place.index].as_ref().map(Tensor::shallow_clone)
                };
                blocks.push(SegmentTape { values, lora: tape.lora.iter().map(own).collect() });
            }
            Recording::Blocks(inputs) => inputs.push(Kept::copy(x, rows)),
            Recording::Input(first) => {
                first.get_or_insert_with(|| Kept::copy(x, rows));
            }
        }
    }

    fn finish(self, segment: &Segment) -> Tape {
        let n = segment.n_rows();
        match self {
            Recording::Full(blocks) => Tape::full(n, blocks),
            Recording::Blocks(inputs) => Tape::blocks(n, inputs),
            // A part without layers keeps nothing.
            Recording::Input(first) => {
                first.map_or(Tape::blocks(n, Vec::new()), |x| Tape::input(n, x))
            }
        }
    }
}
