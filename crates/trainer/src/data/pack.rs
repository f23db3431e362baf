//! Which units share a microbatch.

use super::order::MicrobatchSize;
use std::cmp::Reverse;

/// Microbatches that are filled at the same time. More fill a little better and mix the order less:
/// a unit moves at most so many microbatches away from its place.
const OPEN: usize = 32;

/// Units by their length in tokens.
pub(super) struct Units<'a> {
    /// Tokens of each.
    pub lengths: &'a [u32],
    /// Tokens of the shortest.
    pub shortest: u32,
}

impl Units<'_> {
    fn length(&self, unit: usize) -> usize {
        self.lengths[unit] as usize
    }

    /// Puts units, in this order, into microbatches: at most `max_tokens` tokens and `max_units`
    /// units each, none of them cut. Each goes where it leaves the least room among the open
    /// microbatches (best fit), or opens a new one; the fullest is closed when there are too many.
    /// No unit may have more than `max_tokens`.
    pub fn pack(&self, order: &[usize], max_tokens: usize, max_units: usize) -> Vec<Vec<usize>> {
        let mut open: Vec<Bin> = Vec::new();
        let mut closed = Vec::new();
        for &unit in order {
            let n = self.length(unit);
            let fits = open.iter().enumerate().filter(|(_, bin)| bin.room >= n);
            let at = match fits.min_by_key(|(_, bin)| bin.room) {
                Some((at, _)) => at,
                None => {
                    open.push(Bin { room: max_tokens, units: Vec::new() });
                    open.len() - 1
                }
            };
            let bin = &mut open[at];
            bin.room -= n;
            bin.units.push(unit);
            let full = bin.room < self.shortest as usize || bin.units.len() == max_units;
            if full {
                closed.push(open.remove(at).units);
            } else if open.len() > OPEN {
                let fullest = (0..open.len()).min_by_key(|&i| open[i].room).unwrap_or_default();
                closed.push(open.remove(fullest).units);
            }
        }
        closed.extend(open.into_iter().map(|bin| bin.units));
        closed.iter_mut().for_each(|units| self.longest_first(units));
        closed
    }

    /// Parts the units of one microbatch where they have more than `max_tokens` together.
    pub fn split(&self, units: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
        let mut sorted = units.to_vec();
        self.longest_first(&mut sorted);
        let mut parts: Vec<Vec<usize>> = Vec::new();
        let mut room = 0;
        for unit in sorted {
            let n = self.length(unit);
            match parts.last_mut() {
                Some(part) if n <= room => part.push(unit),
                _ => {
                    parts.push(vec![unit]);
                    room = max_tokens.max(n);
                }
            }
            room -= n;
        }
        parts
    }

    /// Neighbours of one length are cheaper for attention; the sum over them is the same.
    fn longest_first(&self, units: &mut [usize]) {
        units.sort_by_key(|&unit| Reverse(self.lengths[unit]));
    }

    /// The microbatches of units that come in this order.
    pub fn microbatches(
        &self,
        order: &[usize],
        size: MicrobatchSize,
        server_max_tokens: usize,
    ) -> Vec<Vec<usize>> {
        match size {
            MicrobatchSize::Samples(n) => {
                order.chunks(n).flat_map(|units| self.split(units, server_max_tokens)).collect()
            }
            MicrobatchSize::Tokens { max_tokens, max_samples } => {
                self.pack(order, max_tokens, max_samples.unwrap_or(usize::MAX))
            }
        }
    }
}

struct Bin {
    /// Tokens that still fit.
    room: usize,
    units: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(lengths: &[u32]) -> Units<'_> {
        Units { lengths, shortest: lengths.iter().copied().min().unwrap() }
    }

    #[test]
    fn a_unit_goes_where_it_leaves_the_least_room() {
        let lengths = [6, 7, 3, 2, 5, 4, 1];
        let packed = units(&lengths).pack(&[0, 1, 2, 3, 4, 5, 6], 10, 100);
        // 7 and 3 fill one; 2 goes to the 6; 5 and 4 share one, and 1 fills it.
        assert_eq!(packed, [vec![1, 2], vec![4, 5, 6], vec![0, 3]]);
    }

    #[test]
    fn a_microbatch_has_no_more_units_than_allowed() {
        let lengths = [1; 7];
        let packed = units(&lengths).pack(&[0, 1, 2, 3, 4, 5, 6], 100, 3);
        assert_eq!(packed, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }

    #[test]
    fn short_and_long_texts_fill_more_than_nine_tenths() {
        // Lengths between 3 and 512 with many short ones, as texts have them.
        let lengths: Vec<u32> = (0..5000u32)
            .map(|i| 3 + (i.wrapping_mul(2_654_435_761) >> 8) % [60, 60, 200, 510][i as usize % 4])
            .collect();
        let order: Vec<usize> = (0..lengths.len()).collect();
        let total: usize = lengths.iter().map(|&n| n as usize).sum();
        for max_tokens in [512, 1024, 2048] {
            let packed = units(&lengths).pack(&order, max_tokens, usize::MAX);
            let longest = packed.iter().map(|b| b.iter().map(|&u| lengths[u] as usize).sum());
            assert!(longest.max().unwrap_or(0usize) <= max_tokens);
            let mut seen: Vec<usize> = packed.iter().flatten().copied().collect();
            seen.sort();
            assert_eq!(seen, order);
            let fill = total as f64 / (packed.len() * max_tokens) as f64;
            assert!(fill > 0.9, "{max_tokens}: {fill}");
        }
    }

    #[test]
    fn what_is_too_much_for_the_server_is_parted() {
        let lengths = [3; 5];
        let all = [0, 1, 2, 3, 4];
        let sizes = |max_tokens| -> Vec<usize> {
            units(&lengths).split(&all, max_tokens).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(100), [5]);
        assert_eq!(sizes(7), [2, 2, 1]);
        assert_eq!(sizes(2), [1, 1, 1, 1, 1]);
    }
}
