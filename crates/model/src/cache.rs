//! Keys and values of the tokens that a sequence has had already, so that each further token costs
//! its own row only.

use crate::attention;
use crate::rows::Group;
use crate::tape::bytes_of;
use crate::{Part, Rows, Segment};
use tch::{Device, Kind, Tensor};

/// Keys and values of one sequence in every layer of one [`Part`], in the part's dtype.
///
/// A pass writes behind the first [`len`](KvCache::len) tokens; they count only after
/// [`advance`](KvCache::advance), so that a pass which failed can run again over the same places.
pub struct KvCache {
    /// Keys and values of each block, `[K, capacity, D]` each.
    blocks: Vec<[Tensor; 2]>,
    len: i64,
    capacity: i64,
}

impl KvCache {
    /// Tokens that it holds.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().flatten().map(bytes_of).sum()
    }

    /// Forgets all but the first `len` tokens; the room stays.
    pub fn truncate(&mut self, len: i64) {
        self.len = self.len.min(len.max(0));
    }

    /// What a pass wrote behind the last token counts from now on. Panics beyond the capacity.
    pub fn advance(&mut self, n_tokens: i64) {
        assert!(self.len + n_tokens <= self.capacity, "a pass writes within the capacity");
        self.len += n_tokens;
    }

    /// Makes room for `capacity` tokens. While it grows, one block's keys or values are there twice.
    pub fn grow(&mut self, capacity: i64) {
        if capacity <= self.capacity {
            return;
        }
        for tensor in self.blocks.iter_mut().flatten() {
            let size = tensor.size();
            let more =
                Tensor::empty([size[0], capacity, size[2]], (tensor.kind(), tensor.device()));
            more.narrow(1, 0, self.len).copy_(&tensor.narrow(1, 0, self.len));
            *tensor = more;
        }
        self.capacity = capacity;
    }

    /// Writes keys and values `[n, K, D]` of one block behind the last token, and returns all up to
    /// them, `[K, len + n, D]` each.
    fn write(&self, block: usize, rows: [&Tensor; 2]) -> [Tensor; 2] {
        let n = rows[0].size()[0];
        let [keys, values] = &self.blocks[block];
        [(keys, rows[0]), (values, rows[1])].map(|(all, rows)| {
            all.narrow(1, self.len, n).copy_(&rows.transpose(0, 1));
            all.narrow(1, 0, self.len + n)
        })
    }
}

impl Part {
    /// An empty cache with room for `capacity` tokens of one sequence.
    pub fn new_cache(&self, capacity: i64) -> KvCache {
        let c = &self.config;
        let shape = [c.n_kv_heads, capacity, c.head_dim];
        let tensor = || Tensor::empty(shape, (self.kind(), self.device()));
        let blocks = self.blocks.iter().map(|_| [tensor(), tensor()]).collect();
        KvCache { blocks, len: 0, capacity }
    }
}

/// The caches of one pass, by segment.
pub(crate) struct Past<'a> {
    caches: Vec<Option<&'a KvCache>>,
    pieces: Vec<Piece>,
}

/// Some neighbouring rows of a pass that attention takes at once.
enum Piece {
    /// Whole sequences that have no cache.
    Whole(Group),
    /// The next rows of one sequence.
    Next { segment: usize, start: i64, n: i64 },
}

/// The caches of a pass in one of its blocks.
#[derive(Clone, Copy)]
pub(crate) struct PastOfBlock<'a> {
    pub past: &'a Past<'a>,
    pub block: usize,
}

impl<'a> Past<'a> {
    /// None if no segment has a cache. A segment with one is a single sequence.
    pub fn new(
        rows: &Rows,
        segments: &[Segment],
        caches: Vec<Option<&'a KvCache>>,
    ) -> Option<Past<'a>> {
        let mut next: Vec<usize> = (0..segments.len()).filter(|&i| caches[i].is_some()).collect();
        if next.is_empty() {
            return None;
        }
        next.sort_by_key(|&i| segments[i].rows.start);
        let (mut pieces, mut done) = (Vec::new(), 0);
        for i in next {
            let segment = &segments[i].rows;
            pieces.extend(rows.groups_within(done..segment.start).map(Piece::Whole));
            let sequences: i64 = rows.groups_within(segment.clone()).map(|g| g.n_sequences).sum();
            assert_eq!(sequences, 1, "a segment with a cache is one sequence");
            let (start, n) = (segment.start, segment.end - segment.start);
            pieces.push(Piece::Next { segment: i, start, n });
            done = segment.end;
        }
        pieces.extend(rows.groups_within(done..rows.n_tokens()).map(Piece::Whole));
        Some(Past { caches, pieces })
    }
}

impl PastOfBlock<'_> {
    /// What [`attention::forward`] gives, where some sequences go on from their caches: the output
    /// `[N, A, D]`, and the log-sum-exp `[N, A]`, which is zero for those: they have no backward.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let n_heads = q.size()[1];
        let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
        for piece in &self.past.pieces {
            let (output, log_sum) = match piece {
                Piece::Whole(group) => attention::forward_group(q, k, v, group),
                &Piece::Next { segment, start, n } => {
                    let cache = self.past.caches[segment].expect("the piece was made from it");
                    let [q, k, v] = [q, k, v].map(|x| x.narrow(0, start, n));
                    let [keys, values] = cache.write(self.block, [&k, &v]);
                    let output = attention::forward_next(&q, &keys, &values);
                    (output, Tensor::zeros([n, n_heads], (Kind::Float, q.device())))
                }
            };
            outputs.push(output.to_kind(q.kind()));
            log_sums.push(log_sum);
        }
        (attention::concat(outputs), attention::concat(log_sums))
    }
}

impl Rows {
    /// The next rows of sequences that have had tokens already: `seq_lens` tokens of each, none
    /// zero, behind the first `starts` ones.
    pub fn after(seq_lens: &[usize], starts: &[usize], device: Device) -> Rows {
        assert_eq!(seq_lens.len(), starts.len(), "one start for each sequence");
        let both = seq_lens.iter().zip(starts);
        let positions: Vec<i64> =
            both.flat_map(|(&n, &start)| (start..start + n).map(|p| p as i64)).collect();
        Rows::new(seq_lens, Some(&positions), device)
    }
}
