//! What can be read at the other end: labels, from the gradients that a server gets.
//!
//! The server knows what it has sent to the top, and holds the public model. It runs the public top
//! and compares the gradient with those that each label would give.

use super::choice::{Choice, batches};
use super::counts::{Baseline, Counts, Recovered};
use super::readers::{N_GUESSES, NormalEquations, Vocabulary};
use super::stages::Stage;
use super::{LeakOptions, Norms, row_norms};
use crate::TrainError;
use crate::data::{Batch, NOT_PREDICTED};
use crate::noise::{Message, MessageKind, Outgoing};
use offshoot_model::{PartSpec, Rows, TapeSize};
use serde::Serialize;
use tch::{Kind, Tensor};

/// Tokens that the linear reader learns from.
const MOST_READER_TOKENS: usize = 6000;
/// Tokens of the vocabulary that are compared at once.
const CHUNK: i64 = 16384;
/// Ticks of progress.
const TICKS: usize = 12;

/// What is read from gradients at one split point.
#[derive(Clone, Debug, Serialize)]
pub struct LabelLeak {
    pub split_point_2: usize,
    /// Labels that were measured.
    pub labels: usize,
    /// L2 norms of rows before clipping, for one token's loss.
    pub norms: Norms,
    /// Without looking at any gradient.
    pub baseline: Baseline,
    /// The label whose gradient at the last layer's output has the highest cosine with the one that
    /// came. Exact if no layer is in the top.
    pub direct: Recovered,
    /// A ridge regression from gradients to what the label has changed in the logits' input, fitted on
    /// text that the reader knows, then the nearest row of the head.
    pub linear: Recovered,
}

pub(super) struct Work<'a> {
    pub options: &'a LeakOptions<'a>,
    pub split_point_2: usize,
    pub choice: &'a Choice,
    pub knows_part: bool,
}

/// Work, for the bar.
pub(super) fn ticks(options: &LeakOptions) -> usize {
    if options.split_point_2.is_some() { TICKS } else { 0 }
}

/// The model around the second split point.
struct Ends {
    below: Stage,
    top: Stage,
    outgoing: Outgoing,
}

/// Rows in which something is predicted.
struct Seen {
    /// `[n, H]`: the gradient by what the trunk gave, as it was sent.
    gradients: Tensor,
    /// `[n]`: its length before it was clipped.
    norms: Tensor,
    /// `[n, H]`: what the public top makes of what the trunk gave.
    hidden: Tensor,
    /// `[n, H]`: what the public head expects, as a mean of its rows.
    expected: Tensor,
    labels: Vec<i64>,
}

impl Work<'_> {
    pub fn measure(&self, tick: &mut dyn FnMut(usize)) -> Result<LabelLeak, TrainError> {
        let LeakOptions { subject, adapter, .. } = self.options;
        let (s2, n_layers) = (self.split_point_2, subject.config.n_layers);
        let below = PartSpec { layers: 0..s2, embed: true, head: false };
        let top = PartSpec { layers: s2..n_layers, embed: false, head: true };
        let ends = Ends {
            below: Stage::load(subject, *adapter, below)?,
            top: Stage::load(subject, *adapter, top)?,
            outgoing: self.options.outgoing(),
        };
        tick(1);
        let head = ends.head();
        let head_rows = Vocabulary::from_table(&head);
        let mut equations = NormalEquations::default();
        let mut n_tokens = 0;
        for batch in batches(&self.choice.fit) {
            if n_tokens >= MOST_READER_TOKENS {
                break;
            }
            n_tokens += batch.n_tokens();
            if let Some(seen) = ends.see(&batch, self.knows_part, &head) {
                let by_label = &seen.expected - head_rows.rows(&seen.labels);
                equations.add(&seen.gradients, &by_label);
            }
        }
        tick(3);
        let Some(seen) = self.seen(&ends, &head) else {
            return Err(TrainError::Option {
                option: "split-point-2",
                value: s2.to_string(),
                problem: "in the measured text nothing is predicted, so there are no labels; raise --tokens, or --loss-on all".into(),
            });
        };
        tick(2);
        let linear = equations.solve();
        let read = &seen.expected - linear.read(&seen.gradients);
        let counts = Counts::new(seen.labels.clone());
        let linear = counts.of(&head_rows.nearest(&read, false));
        tick(1);
        let direct = counts.of(&ends.direct(&seen, &mut |done| tick(done)));
        Ok(LabelLeak {
            split_point_2: s2,
            labels: counts.n_tokens(),
            norms: Norms::of(std::slice::from_ref(&seen.norms)),
            baseline: counts.baseline(),
            direct,
            linear,
        })
    }

    /// The labels that are measured.
    fn seen(&self, ends: &Ends, head: &Tensor) -> Option<Seen> {
        let mut all: Option<Seen> = None;
        for batch in batches(&self.choice.test) {
            if all.as_ref().is_some_and(|seen| seen.labels.len() >= self.options.n_labels) {
                break;
            }
            let Some(new) = ends.see(&batch, true, head) else { continue };
            all = Some(match all {
                None => new,
                Some(seen) => seen.with(new),
            });
        }
        all.map(|seen| seen.first(self.options.n_labels))
    }
}

impl Seen {
    fn with(self, new: Seen) -> Seen {
        let cat = |a: Tensor, b: Tensor| Tensor::cat(&[a, b], 0);
        Seen {
            gradients: cat(self.gradients, new.gradients),
            norms: cat(self.norms, new.norms),
            hidden: cat(self.hidden, new.hidden),
            expected: cat(self.expected, new.expected),
            labels: [self.labels, new.labels].concat(),
        }
    }

    fn first(mut self, n: usize) -> Seen {
        self.labels.truncate(n);
        let n = self.labels.len() as i64;
        let Seen { gradients, norms, hidden, expected, labels } = self;
        let [gradients, norms, hidden, expected] =
            [gradients, norms, hidden, expected].map(|t| t.narrow(0, 0, n));
        Seen { gradients, norms, hidden, expected, labels }
    }
}

impl Ends {
    /// `[V, H]`, in the part's dtype.
    fn head(&self) -> Tensor {
        self.top.part.head_rows()
    }

    /// What the server sees of a batch, and what it makes of it. None if nothing is predicted.
    fn see(&self, batch: &Batch, adapted: bool, head: &Tensor) -> Option<Seen> {
        let part = &self.top.part;
        let device = part.device();
        let places: Vec<i64> = (0..batch.n_tokens() as i64)
            .filter(|&place| batch.labels[place as usize] != NOT_PREDICTED)
            .collect();
        if places.is_empty() {
            return None;
        }
        let rows = Rows::new(&batch.seq_lens, None, device);
        let ids = Tensor::from_slice(&batch.ids).to_device(device);
        let labels = Tensor::from_slice(&batch.labels).to_device(device);
        let x = self.below.part.embed(&ids, &rows);
        let x = self.below.forward(&x, &rows, adapted);
        let gradients = self.gradients(&x, &rows, (&labels, adapted));
        let kind = MessageKind::Gradients { scale: 1.0 };
        let message = Message { rows: &gradients, seq_lens: &batch.seq_lens, start: 0, kind };
        let sent = self.outgoing.perturb(&message);
        let keep = Tensor::from_slice(&places).to_device(device);
        // The reader has the public top only.
        let hidden = self.top.forward(&x, &rows, false).index_select(0, &keep);
        let expected = part.logits(&hidden).softmax(-1, Kind::Float).to_kind(head.kind());
        Some(Seen {
            gradients: sent.index_select(0, &keep).to_kind(Kind::Float),
            norms: row_norms(&gradients.index_select(0, &keep)),
            hidden,
            expected: expected.matmul(head).to_kind(Kind::Float),
            labels: places.iter().map(|&place| batch.labels[place as usize]).collect(),
        })
    }

    /// `[N, H]` by the top's input `x`, of the summed cross-entropy.
    fn gradients(&self, x: &Tensor, rows: &Rows, (labels, adapted): (&Tensor, bool)) -> Tensor {
        let segments = [self.top.segment(0..rows.n_tokens(), adapted)];
        let part = &self.top.part;
        let (y, mut tapes) = part.forward(x, rows, &segments, &[Some(TapeSize::Full)]);
        let tape = tapes.pop().flatten().expect("one tape was asked for");
        let by_output = part.loss(&y, labels, 1.0).grad;
        part.backward(&[&tape], &by_output, rows, &segments, true).input.expect("it was wanted")
    }

    /// int64 `[n, 10]`: the labels that would have given the most similar gradients if no layer were
    /// between.
    fn direct(&self, seen: &Seen, tick: &mut dyn FnMut(usize)) -> Tensor {
        let (n, v) = (seen.labels.len(), self.top.part.config().vocab_size);
        let mut ticked = 0;
        let guesses = (0..n).map(|i| {
            let row = |t: &Tensor| t.narrow(0, i as i64, 1);
            let (hidden, came) = (row(&seen.hidden), row(&seen.gradients));
            let scores = (0..v).step_by(CHUNK as usize).map(|from| {
                let labels = from..v.min(from + CHUNK);
                let would = self.top.part.label_gradients(&hidden, labels).to_kind(Kind::Float);
                would.matmul(&came.tr()).squeeze_dim(1) / row_norms(&would).clamp_min(1e-30)
            });
            let scores = Tensor::cat(&scores.collect::<Vec<_>>(), 0); // [V]
            let now = (TICKS - 7) * (i + 1) / n;
            tick(now - ticked);
            ticked = now;
            scores.topk(N_GUESSES.min(v), 0, true, true).1
        });
        Tensor::stack(&guesses.collect::<Vec<_>>(), 0)
    }
}
