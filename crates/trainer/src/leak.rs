//! How much of a text can be read from what a server sees: the leak meter.
//!
//! Everything runs in this process: no server is needed, and nothing is sent. Hidden states at one or
//! several first split points are computed as a client would send them, and simple readers, of the
//! kind that whoever holds the public model can build in minutes, try to name the tokens:
//!
//! - *nearest*: the token whose embedding has the highest cosine with the row of hidden states;
//! - *centred*: the same after the mean row and the mean embedding are taken off;
//! - *linear*: a ridge regression from hidden states to embeddings, fitted on text that the reader
//!   knows, then the nearest embedding.
//!
//! The reader of `labels` does the same to the gradients at the second split point. All of them are
//! lower bounds: papers read more (docs/privacy.md).

mod choice;
mod counts;
mod labels;
mod readers;
mod stages;

pub use counts::{Baseline, Recovered};
pub use labels::LabelLeak;

use crate::TrainError;
use crate::adapter::Adapter;
use crate::data::DataSet;
use crate::evaluate::Subject;
use crate::noise::{Message, MessageKind, NoiseKey, Outgoing, PrivacyOptions};
use choice::{Choice, batches, later_rows};
use counts::Counts;
use readers::{NormalEquations, Vocabulary};
use serde::Serialize;
use stages::Stages;
use tch::Tensor;

/// What is measured, and how.
pub struct LeakOptions<'a> {
    /// The model, and where it is computed.
    pub subject: Subject<'a>,
    /// See [`Adapter::fit`]. None: the base model, as before the first step.
    pub adapter: Option<&'a Adapter>,
    /// First split points, each below the number of layers, and below the second one.
    pub split_points_1: Vec<usize>,
    /// If labels are to be measured too: that second split point.
    pub split_point_2: Option<usize>,
    /// As the text would be sent.
    pub privacy: PrivacyOptions,
    /// Tokens that are measured, and tokens that the linear reader learns from: at most so many.
    pub n_tokens: usize,
    pub n_reader_tokens: usize,
    /// Labels that are measured: at most so many. Each is compared with the whole vocabulary.
    pub n_labels: usize,
}

/// The text whose leak is measured, and what the reader knows.
pub struct LeakData<'a> {
    /// One's own.
    pub text: &'a DataSet,
    /// What the linear reader learns from, with the public model. None: from the part of `text` that is
    /// not measured, with the adapter, as a reader would who knows some of the text.
    pub reader: Option<&'a DataSet>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Leak {
    /// Tokens that were measured: all of their samples but the first of each, which is a function of
    /// the token alone and can be looked up.
    pub tokens: usize,
    /// Their samples.
    pub samples: usize,
    /// Tokens that the linear reader learned from.
    pub reader_tokens: usize,
    /// Whether they were of the same text.
    pub reader_knows_part: bool,
    /// Without looking at any hidden state.
    pub baseline: Baseline,
    /// By first split point, in their order.
    pub split_points: Vec<SplitLeak>,
    /// At the other end, if it was asked for.
    pub labels: Option<LabelLeak>,
    /// Token ids of the measured samples.
    #[serde(skip)]
    pub texts: Vec<Vec<u32>>,
}

/// What is read from hidden states at one split point.
#[derive(Clone, Debug, Serialize)]
pub struct SplitLeak {
    pub split_point_1: usize,
    /// L2 norms of rows before clipping, without each sample's first.
    pub norms: Norms,
    pub nearest: Recovered,
    pub centred: Recovered,
    pub linear: Recovered,
}

/// Of the rows that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Norms {
    pub median: f64,
    /// 95 of 100 rows are shorter.
    pub percentile_95: f64,
}

/// Work done, and all of it.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Ticks of progress for each split point's readers.
const TICKS_OF_READERS: usize = 4;

/// Measures.
///
/// # Errors
/// If a split point is none, if the text is too short, and what loading can say.
pub fn measure(
    options: &LeakOptions,
    data: &LeakData,
    progress: Progress,
) -> Result<Leak, TrainError> {
    options.check()?;
    let choice = Choice::of(options, data)?;
    measure_choice(options, &choice, data.reader.is_none(), progress)
}

/// `knows_part`: what the reader learns from is computed with the adapter.
fn measure_choice(
    options: &LeakOptions,
    choice: &Choice,
    knows_part: bool,
    progress: Progress,
) -> Result<Leak, TrainError> {
    let _guard = tch::no_grad_guard();
    let stages = Stages::load(&options.subject, options.adapter, &options.split_points_1)?;
    let (fit, test) = (batches(&choice.fit), batches(&choice.test));
    let label_ticks = labels::ticks(options);
    let total =
        fit.len() + test.len() + TICKS_OF_READERS * options.split_points_1.len() + label_ticks;
    let mut done = 0;
    let mut tick = |n: usize| {
        done += n;
        progress(done, total);
    };
    tick(0);

    let longest = choice.longest();
    let vocabulary = Vocabulary::of(stages.embeddings(), longest);
    let outgoing = options.outgoing();
    let mut equations: Vec<NormalEquations> =
        options.split_points_1.iter().map(|_| NormalEquations::default()).collect();
    for batch in &fit {
        let (keep, ids) = later_rows(batch);
        let targets = vocabulary.rows(&ids);
        for (at, equations) in stages.run(batch, knows_part).into_iter().zip(&mut equations) {
            let sent = perturbed(&outgoing, &at, &batch.seq_lens);
            let rows = vocabulary.without_positions(&sent, batch).index_select(0, &keep);
            equations.add(&rows, &targets);
        }
        tick(1);
    }
    let mut measured: Vec<Measured> =
        options.split_points_1.iter().map(|_| Measured::default()).collect();
    let mut ids = Vec::new();
    for batch in &test {
        let (keep, kept_ids) = later_rows(batch);
        ids.extend(kept_ids);
        for (at, measured) in stages.run(batch, true).into_iter().zip(&mut measured) {
            measured.norms.push(row_norms(&at.index_select(0, &keep)));
            let sent = perturbed(&outgoing, &at, &batch.seq_lens);
            let rows = vocabulary.without_positions(&sent, batch);
            measured.rows.push(rows.index_select(0, &keep));
        }
        tick(1);
    }
    drop(stages);
    let counts = Counts::new(ids);
    let mut split_points = Vec::new();
    for ((&split_point_1, measured), equations) in
        options.split_points_1.iter().zip(measured).zip(equations)
    {
        let rows = Tensor::cat(&measured.rows, 0);
        let linear = equations.solve();
        tick(1);
        let mut read = |rows: &Tensor, centred| {
            let found = counts.of(&vocabulary.nearest(rows, centred));
            tick(1);
            found
        };
        split_points.push(SplitLeak {
            split_point_1,
            norms: Norms::of(&measured.norms),
            nearest: read(&rows, false),
            centred: read(&rows, true),
            linear: read(&linear.read(&rows), false),
        });
    }
    let labels = match options.split_point_2 {
        None => None,
        Some(split_point_2) => {
            let work = labels::Work { options, split_point_2, choice, knows_part };
            Some(work.measure(&mut tick)?)
        }
    };
    Ok(Leak {
        tokens: counts.n_tokens(),
        samples: choice.test.len(),
        reader_tokens: choice.fit.iter().map(|sample| sample.ids.len() - 1).sum(),
        reader_knows_part: knows_part,
        baseline: counts.baseline(),
        split_points,
        labels,
        texts: choice.texts(),
    })
}

/// What was seen at one split point.
#[derive(Default)]
struct Measured {
    rows: Vec<Tensor>,
    norms: Vec<Tensor>,
}

impl LeakOptions<'_> {
    fn check(&self) -> Result<(), TrainError> {
        self.privacy.validate()?;
        let n = self.subject.config.n_layers;
        let wrong = |option, value: usize, problem: String| {
            Err(TrainError::Option { option, value: value.to_string(), problem })
        };
        if self.split_points_1.is_empty() {
            let (option, value) = ("split-point-1", "(none)".to_string());
            let problem = "name at least one, such as 2".into();
            return Err(TrainError::Option { option, value, problem });
        }
        if let Some(&point) = self.split_points_1.iter().find(|point| **point >= n) {
            let problem = format!("the model has {n} layers: expected 0 to {}", n - 1);
            return wrong("split-point-1", point, problem);
        }
        if !self.split_points_1.is_sorted_by(|a, b| a < b) {
            let last = self.split_points_1.last().copied().unwrap_or_default();
            return wrong("split-point-1", last, "expected each one once, in rising order".into());
        }
        if let Some(point) = self.split_point_2.filter(|point| *point == 0 || *point > n) {
            let problem = format!("the model has {n} layers: expected 1 to {n}");
            return wrong("split-point-2", point, problem);
        }
        if let (Some(&last), Some(end)) = (self.split_points_1.last(), self.split_point_2)
            && last >= end
        {
            let problem = format!(
                "the trunk ends before layer {end} (--split-point-2): expected 0 to {}",
                end - 1
            );
            return wrong("split-point-1", last, problem);
        }
        for (option, value) in [("tokens", self.n_tokens), ("reader-tokens", self.n_reader_tokens)]
        {
            if value < 2 {
                return wrong(
                    option,
                    value,
                    "expected at least 2; some thousands tell more".into(),
                );
            }
        }
        Ok(())
    }

    fn outgoing(&self) -> Outgoing {
        let PrivacyOptions { hidden, gradients, noise_key } = self.privacy.clone();
        Outgoing { hidden, gradients, key: noise_key.unwrap_or_else(NoiseKey::draw) }
    }
}

/// Hidden states `[N, H]` as they would be sent.
fn perturbed(outgoing: &Outgoing, rows: &Tensor, seq_lens: &[usize]) -> Tensor {
    outgoing.perturb(&Message { rows, seq_lens, start: 0, kind: MessageKind::Hidden })
}

/// `[N, H] -> [N]`, float32.
fn row_norms(rows: &Tensor) -> Tensor {
    rows.to_kind(tch::Kind::Float).norm_scalaropt_dim(2, [1i64].as_slice(), false)
}

impl Norms {
    fn of(norms: &[Tensor]) -> Self {
        let all = Tensor::cat(norms, 0).to_kind(tch::Kind::Double).to_device(tch::Device::Cpu);
        let mut all = Vec::<f64>::try_from(all).unwrap_or_default();
        all.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (share * all.len() as f64) as usize;
            all.get(place.min(all.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        Norms { median: at(0.5), percentile_95: at(0.95) }
    }
}

#[cfg(test)]
mod tests;
