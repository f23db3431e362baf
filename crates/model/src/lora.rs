//! LoRA of several segments over one frozen linear layer, `s B A dropout(x)` (arXiv 2106.09685).
//!
//! The base product is one for all rows. What each segment adds to it runs in one of two ways:
//! segment by segment, or with all A and B stacked, where each row keeps only the columns of its own
//! adapter. Stacked, a few products serve any number of segments, but each row is multiplied with
//! every adapter of the batch.

use crate::Segment;
use offshoot_adapters::{AdapterSet, LoraPair};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Deref;
use tch::{Device, Kind, Tensor};

/// How LoRA of several segments is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraMode {
    /// Segment by segment on the CPU, where that was as quick or quicker
    /// (docs/decisions/0004-batches.md); stacked on devices where each product is a launch.
    #[default]
    Auto,
    /// All A and B stacked, unless an adapter of the batch holds values that are not finite.
    Stacked,
    /// Segment by segment. Nothing of one segment meets another's.
    Loop,
}

/// For each segment `s A dropout(x)`, `[n, r]`, where the segment has LoRA here.
pub(crate) type LoraTape = Vec<Option<Tensor>>;

/// One flat float32 gradient `[P]` for each segment with an adapter.
pub(crate) type LoraGradients = Vec<Option<Tensor>>;

/// How LoRA runs in one pass, and what its layers can share.
pub(crate) struct LoraPass {
    mode: LoraMode,
    /// Columns of a stacked product that belong to other segments, bool `[N, R]`, by rows and rank
    /// of each segment.
    others: RefCell<HashMap<Vec<[i64; 3]>, Tensor>>,
}

/// A linear layer as LoRA sees it.
pub(crate) struct LoraLayer<'a> {
    pub path: &'a str,
    pub d_in: i64,
    pub segments: &'a [Segment<'a>],
    pub pass: &'a LoraPass,
}

/// A segment's LoRA pair at one layer.
struct Pair<'a> {
    /// Index among the segments.
    index: usize,
    segment: &'a Segment<'a>,
    adapter: &'a AdapterSet,
    /// Index of the site in the adapter set.
    site: usize,
    matrices: Matrices<'a>,
    scaling: f64,
}

/// A and B in the dtype of the rows.
enum Matrices<'a> {
    Own(&'a LoraPair),
    Rounded(Box<LoraPair>),
}

impl Deref for Matrices<'_> {
    type Target = LoraPair;

    fn deref(&self) -> &LoraPair {
        match self {
            Matrices::Own(pair) => pair,
            Matrices::Rounded(pair) => pair,
        }
    }
}

impl<'a> Pair<'a> {
    fn new(index: usize, segment: &'a Segment<'a>, path: &str, kind: Kind) -> Option<Pair<'a>> {
        let adapter = segment.adapter?;
        let site = adapter.site_index(path)?;
        let own = adapter.pair(site);
        let matrices = if own.a.kind() == kind {
            Matrices::Own(own)
        } else {
            let (a, b) = (own.a.to_kind(kind), own.b.to_kind(kind));
            Matrices::Rounded(Box::new(LoraPair { a_t: a.tr(), b_t: b.tr(), a, b }))
        };
        let scaling = adapter.spec().scaling();
        Some(Pair { index, segment, adapter, site, matrices, scaling })
    }

    fn rank(&self) -> i64 {
        self.adapter.spec().r as i64
    }
}

impl LoraPass {
    pub fn new(mode: LoraMode) -> Self {
        LoraPass { mode, others: RefCell::default() }
    }

    fn is_stacked(&self, pairs: &[Pair], device: Device) -> bool {
        let wanted = match self.mode {
            LoraMode::Stacked => true,
            LoraMode::Loop => false,
            LoraMode::Auto => device != Device::Cpu,
        };
        // Zero times infinity would reach the rows of others.
        wanted && pairs.len() > 1 && pairs.iter().all(|pair| pair.adapter.is_finite())
    }

    /// Bool `[N, R]`: true where a column is not of the row's own segment.
    fn others(&self, pairs: &[Pair], n_rows: i64, device: Device) -> Tensor {
        let key: Vec<[i64; 3]> = pairs
            .iter()
            .map(|pair| [pair.segment.rows.start, pair.segment.n_rows(), pair.rank()])
            .collect();
        let mut known = self.others.borrow_mut();
        let others = known.entry(key).or_insert_with_key(|key| {
            let rank = key.iter().map(|[_, _, r]| r).sum();
            let others = Tensor::ones([n_rows, rank], (Kind::Bool, device));
            let mut column = 0;
            for &[start, n, r] in key {
                let _ = others.narrow(0, start, n).narrow(1, column, r).fill_(0);
                column += r;
            }
            others
        });
        others.shallow_clone()
    }
}

impl LoraLayer<'_> {
    fn pairs(&self, kind: Kind) -> Vec<Pair<'_>> {
        let segments = self.segments.iter().enumerate();
        segments.filter_map(|(i, segment)| Pair::new(i, segment, self.path, kind)).collect()
    }

    /// The mask `[n, in]` of a segment's rows, if it drops anything.
    pub fn mask(&self, segment: &Segment, like: &Tensor) -> Option<Tensor> {
        let p = segment.adapter?.spec().lora_dropout;
        let key = segment.dropout?;
        (p > 0.0).then(|| key.mask(self.path, [segment.n_rows(), self.d_in], p, like))
    }

    /// Adds every segment's LoRA of `x` `[N, in]` to `y` `[N, out]`.
    pub fn forward(&self, x: &Tensor, y: &mut Tensor) -> LoraTape {
        let mut tape: LoraTape = self.segments.iter().map(|_| None).collect();
        let pairs = self.pairs(x.kind());
        if self.pass.is_stacked(&pairs, x.device()) {
            self.forward_stacked(x, y, &pairs, &mut tape);
            return tape;
        }
        for pair in &pairs {
            let x = self.dropped(pair.segment, pair.segment.of(x));
            let h = x.mm(&pair.matrices.a_t).g_mul_scalar_(pair.scaling); // [n, r]
            let _ = pair.segment.of(y).addmm_(&h, &pair.matrices.b_t);
            tape[pair.index] = Some(h);
        }
        tape
    }

    fn forward_stacked(&self, x: &Tensor, y: &mut Tensor, pairs: &[Pair], tape: &mut LoraTape) {
        let (a, b) = stacked(pairs);
        let mut h = self.all_dropped(x, pairs).mm(&a.tr()); // [N, R]
        self.keep_own(&mut h, pairs);
        let _ = y.addmm_(&h, &b.tr());
        let mut column = 0;
        for pair in pairs {
            let own = pair.segment.of(&h).narrow(1, column, pair.rank());
            // A copy: a view would keep everybody's columns.
            tape[pair.index] = Some(own.copy());
            column += pair.rank();
        }
    }

    /// Writes the gradients of A and B of every segment, and adds LoRA's share of the gradient by
    /// `x` to `grad_x` if there is one. `x` `[N, in]` as the forward saw it, `grad` `[N, out]` by its
    /// result.
    pub fn backward(
        &self,
        x: &Tensor,
        grad: &Tensor,
        tape: &LoraTape,
        gradients: &LoraGradients,
        mut grad_x: Option<&mut Tensor>,
    ) {
        let pairs = self.pairs(x.kind());
        let stacked_grad_h = self
            .pass
            .is_stacked(&pairs, x.device())
            .then(|| self.backward_stacked(grad, &pairs, &mut grad_x));
        let mut column = 0;
        for pair in &pairs {
            let (Some(h), Some(flat)) = (&tape[pair.index], &gradients[pair.index]) else {
                continue;
            };
            let (x, grad) = (pair.segment.of(x), pair.segment.of(grad));
            let mask = self.mask(pair.segment, &x);
            let grad_h = match &stacked_grad_h {
                Some(all) => pair.segment.of(all).narrow(1, column, pair.rank()),
                None => grad.mm(&pair.matrices.b).g_mul_scalar_(pair.scaling), // [n, r]
            };
            column += pair.rank();
            let (grad_a, grad_b) = pair.adapter.views(flat, pair.site);
            product_into(&grad_b, &grad.tr(), h); // h has the scaling
            match &mask {
                None => product_into(&grad_a, &grad_h.tr(), &x),
                Some(mask) => product_into(&grad_a, &grad_h.tr(), &(x * mask)),
            }
            if let (Some(grad_x), None) = (&mut grad_x, &stacked_grad_h) {
                let mut rows = pair.segment.of(grad_x);
                let _ = match &mask {
                    None => rows.addmm_(&grad_h, &pair.matrices.a),
                    Some(mask) => rows.g_add_(&grad_h.mm(&pair.matrices.a).g_mul_(mask)),
                };
            }
        }
    }

    /// The gradient `[N, R]` by the stacked `A dropout(x)`; its share goes into `grad_x`.
    fn backward_stacked(
        &self,
        grad: &Tensor,
        pairs: &[Pair],
        grad_x: &mut Option<&mut Tensor>,
    ) -> Tensor {
        let (a, b) = stacked(pairs);
        let mut grad_h = grad.mm(&b); // [N, R]
        self.keep_own(&mut grad_h, pairs);
        if let Some(grad_x) = grad_x {
            if pairs.iter().any(|pair| self.drops(pair.segment)) {
                let by_dropped = grad_h.mm(&a); // [N, in]
                let _ = grad_x.g_add_(&self.all_dropped(&by_dropped, pairs));
            } else {
                let _ = grad_x.addmm_(&grad_h, &a);
            }
        }
        grad_h
    }

    /// Zero in the columns of other segments, scaled in those of the row's own. Set, not multiplied:
    /// zero times infinity is not zero.
    fn keep_own(&self, h: &mut Tensor, pairs: &[Pair]) {
        let _ = h.masked_fill_(&self.pass.others(pairs, h.size()[0], h.device()), 0.0);
        let first = pairs[0].scaling;
        if pairs.iter().all(|pair| pair.scaling == first) {
            let _ = h.g_mul_scalar_(first);
            return;
        }
        let columns = pairs.iter().flat_map(|p| (0..p.rank()).map(|_| p.scaling as f32));
        let columns = Tensor::from_slice(&columns.collect::<Vec<_>>());
        let _ = h.g_mul_(&columns.to_device(h.device()).to_kind(h.kind()));
    }

    fn drops(&self, segment: &Segment) -> bool {
        let p = segment.adapter.map_or(0.0, |adapter| adapter.spec().lora_dropout);
        p > 0.0 && segment.dropout.is_some()
    }

    /// `x` `[n, in]` of one segment behind its dropout.
    fn dropped(&self, segment: &Segment, x: Tensor) -> Tensor {
        match self.mask(segment, &x) {
            Some(mask) => x * mask,
            None => x,
        }
    }

    /// `x` `[N, in]` of all segments, each behind its own dropout.
    fn all_dropped(&self, x: &Tensor, pairs: &[Pair]) -> Tensor {
        if !pairs.iter().any(|pair| self.drops(pair.segment)) {
            return x.shallow_clone();
        }
        let all = x.copy();
        for pair in pairs {
            if let Some(mask) = self.mask(pair.segment, x) {
                let _ = pair.segment.of(&all).g_mul_(&mask);
            }
        }
        all
    }
}

/// A `[R, in]` and B `[out, R]` of all pairs.
fn stacked(pairs: &[Pair]) -> (Tensor, Tensor) {
    let a: Vec<&Tensor> = pairs.iter().map(|pair| &pair.matrices.a).collect();
    let b: Vec<&Tensor> = pairs.iter().map(|pair| &pair.matrices.b).collect();
    (Tensor::cat(&a, 0), Tensor::cat(&b, 1))
}

/// `place = a b`, where `place` may be wider than the factors.
fn product_into(place: &Tensor, a: &Tensor, b: &Tensor) {
    if place.kind() == a.kind() {
        let _ = a.mm_out(place, b);
    } else {
        place.shallow_clone().copy_(&a.mm(b));
    }
}
