//! Who reads: tables of the vocabulary, and a linear map.

use crate::data::Batch;
use offshoot_model::{Part, Rows};
use tch::{Kind, Tensor};

/// Guesses for each row, the likeliest first.
pub(super) const N_GUESSES: i64 = 10;
/// Scores that exist at one time (64 MiB of float32).
const CHUNK_ELEMENTS: i64 = 16 << 20;
/// Of the ridge, in means of the diagonal.
const PENALTY: f64 = 1e-3;

/// One vector for each token that could have been sent, float32 `[V, H]`.
pub(super) struct Vocabulary {
    table: Tensor,
    /// `[V]`: one over the length of each vector, and of each without the mean.
    by_length: [Tensor; 2],
    /// `[H]`.
    mean: Tensor,
    /// `[T, H]`: what a learned position adds, against position 0.
    positions: Option<Tensor>,
}

impl Vocabulary {
    /// What each token is at position 0 before the first layer: the embedding as the family scales it,
    /// with the position that it begins with. `longest`: tokens of the longest sequence.
    pub fn of(part: &Part, longest: usize) -> Self {
        let v = part.config().vocab_size;
        let device = part.device();
        let ids = Tensor::arange(v, (Kind::Int64, device));
        let table = part.embed(&ids, &Rows::new(&vec![1; v as usize], None, device));
        let positions = part.config().rope.is_none().then(|| {
            let same = Tensor::zeros([longest as i64], (Kind::Int64, device));
            let at = part.embed(&same, &Rows::new(&[longest], None, device)).to_kind(Kind::Float);
            &at - at.narrow(0, 0, 1)
        });
        Vocabulary { positions, ..Self::from_table(&table) }
    }

    /// `[V, H]` of any dtype.
    pub fn from_table(table: &Tensor) -> Self {
        let table = table.to_kind(Kind::Float);
        let mean = table.mean_dim([0i64].as_slice(), false, Kind::Float);
        let one_over_length = |table: &Tensor| {
            table.norm_scalaropt_dim(2, [1i64].as_slice(), false).clamp_min(1e-30).reciprocal()
        };
        let by_length = [one_over_length(&table), one_over_length(&(&table - &mean))];
        Vocabulary { table, by_length, mean, positions: None }
    }

    /// `[n, H]` of tokens.
    pub fn rows(&self, ids: &[i64]) -> Tensor {
        self.table.index_select(0, &Tensor::from_slice(ids).to_device(self.table.device()))
    }

    /// Hidden states `[N, H]`, float32, less what learned positions have added: whoever holds the
    /// model knows it.
    pub fn without_positions(&self, hidden: &Tensor, batch: &Batch) -> Tensor {
        let hidden = hidden.to_kind(Kind::Float);
        match &self.positions {
            None => hidden,
            Some(positions) => {
                let rows = Rows::new(&batch.seq_lens, None, hidden.device());
                hidden - positions.index_select(0, rows.positions())
            }
        }
    }

    /// int64 `[n, 10]`: the tokens whose vectors have the highest cosine with rows `[n, H]`; `centred`:
    /// after both have lost their mean.
    pub fn nearest(&self, rows: &Tensor, centred: bool) -> Tensor {
        let rows = match centred {
            true => rows - rows.mean_dim([0i64].as_slice(), true, Kind::Float),
            false => rows.shallow_clone(),
        };
        let (v, n) = (self.table.size()[0], rows.size()[0]);
        let step = (CHUNK_ELEMENTS / v).max(1);
        let guesses = (0..n).step_by(step as usize).map(|start| {
            let rows = rows.narrow(0, start, step.min(n - start));
            let mut scores = rows.matmul(&self.table.tr());
            if centred {
                let _ = scores.g_sub_(&rows.mv(&self.mean).unsqueeze(1));
            }
            let _ = scores.g_mul_(&self.by_length[usize::from(centred)]);
            scores.topk(N_GUESSES.min(v), 1, true, true).1
        });
        Tensor::cat(&guesses.collect::<Vec<_>>(), 0)
    }
}

/// Sums from which a least-squares map is solved, so that no row need be kept. Float64.
#[derive(Default)]
pub(super) struct NormalEquations {
    n: i64,
    /// `[H]`, `[H']`, `[H, H]`, `[H, H']`.
    sums: Option<[Tensor; 4]>,
}

/// `rows -> (rows - from) W + to`, float32.
pub(super) struct Linear {
    weight: Tensor,
    from: Tensor,
    to: Tensor,
}

impl NormalEquations {
    /// Rows `[n, H]` and what is to be read from them, `[n, H']`.
    pub fn add(&mut self, rows: &Tensor, targets: &Tensor) {
        self.n += rows.size()[0];
        let (x, y) = (rows.to_kind(Kind::Double), targets.to_kind(Kind::Double));
        let sum = |t: &Tensor| t.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        let new = [sum(&x), sum(&y), x.tr().matmul(&x), x.tr().matmul(&y)];
        match &mut self.sums {
            None => self.sums = Some(new),
            Some(sums) => {
                for (sum, new) in sums.iter_mut().zip(&new) {
                    let _ = sum.g_add_(new);
                }
            }
        }
    }

    /// The ridge regression on centred values, with a penalty of a thousandth of the mean variance.
    /// Panics if there was no row.
    pub fn solve(self) -> Linear {
        let [x, y, xx, xy] = self.sums.expect("a text for the reader has a row");
        let n = self.n as f64;
        let (from, to) = (x / n, y / n);
        let gram = xx - from.outer(&from) * n;
        let xy = xy - from.outer(&to) * n;
        let penalty = PENALTY * gram.diagonal(0, 0, 1).mean(Kind::Double).double_value(&[]);
        // Rows that are all the same have nothing to solve.
        let _ = gram.diagonal(0, 0, 1).g_add_scalar_(penalty.max(1e-12));
        let weight = Tensor::linalg_solve(&gram, &xy, true);
        let [weight, from, to] = [weight, from, to].map(|t| t.to_kind(Kind::Float));
        Linear { weight, from, to }
    }
}

impl Linear {
    /// `[n, H] -> [n, H']`.
    pub fn read(&self, rows: &Tensor) -> Tensor {
        (rows - &self.from).matmul(&self.weight) + &self.to
    }
}
