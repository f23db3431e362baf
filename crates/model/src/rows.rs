use crate::dropout::DropoutKey;
use offshoot_adapters::AdapterSet;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// How packed rows `[N, ...]` divide into sequences: sequence after sequence, no padding.
pub struct Rows {
    n_tokens: i64,
    /// Position of each token in its sequence, int64 `[N]`.
    positions: Tensor,
    groups: Vec<Group>,
}

/// Neighbouring sequences of one length, which attention can take as one `[B, ..., T, D]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    pub start: i64,
    pub n_sequences: i64,
    pub length: i64,
}

impl Group {
    pub fn n_rows(&self) -> i64 {
        self.n_sequences * self.length
    }
}

impl Rows {
    /// `seq_lens`: tokens of each sequence, none zero. `position_ids`: one for each token, or
    /// 0, 1, 2, ... within each sequence.
    pub fn new(seq_lens: &[usize], position_ids: Option<&[i64]>, device: Device) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        let mut n_tokens = 0;
        for &length in seq_lens {
            let length = length as i64;
            match groups.last_mut() {
                Some(last) if last.length == length => last.n_sequences += 1,
                _ => groups.push(Group { start: n_tokens, n_sequences: 1, length }),
            }
            n_tokens += length;
        }
        let counted: Vec<i64>;
        let position_ids = match position_ids {
            Some(ids) => ids,
            None => {
                counted = seq_lens.iter().flat_map(|&n| 0..n as i64).collect();
                &counted
            }
        };
        let positions = Tensor::from_slice(position_ids).to_kind(Kind::Int64).to_device(device);
        Rows { n_tokens, positions, groups }
    }

    /// N.
    pub fn n_tokens(&self) -> i64 {
        self.n_tokens
    }

    /// int64 `[N]`.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The groups of the sequences in these rows, which begin and end with a sequence.
    pub(crate) fn groups_within(&self, rows: Range<i64>) -> impl Iterator<Item = Group> {
        self.groups.iter().filter_map(move |group| {
            let start = group.start.max(rows.start);
            let n_rows = (group.start + group.n_rows()).min(rows.end) - start;
            let whole = (start - group.start) % group.length == 0 && n_rows % group.length == 0;
            debug_assert!(n_rows <= 0 || whole, "rows {rows:?} cut a sequence");
            let n_sequences = n_rows / group.length;
            (n_rows > 0).then_some(Group { start, n_sequences, length: group.length })
        })
    }
}

/// The rows of a batch that belong to one job, and the adapter that they meet.
pub struct Segment<'a> {
    /// Of the packed rows; segments do not overlap.
    pub rows: Range<i64>,
    /// None: the base model.
    pub adapter: Option<&'a AdapterSet>,
    /// None: no dropout, as in evaluation.
    pub dropout: Option<DropoutKey>,
}

impl Segment<'_> {
    pub(crate) fn n_rows(&self) -> i64 {
        self.rows.end - self.rows.start
    }

    /// This segment's rows of a packed tensor, a view.
    pub(crate) fn of(&self, packed: &Tensor) -> Tensor {
        packed.narrow(0, self.rows.start, self.n_rows())
    }
}
