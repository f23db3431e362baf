//! Sequences that go on from their keys and values: the same numbers as one forward over all rows.

use crate::tenant::{Dice, Model, Tenant, distance};
use crate::{F32, FAMILIES};
use offshoot_adapters::LoraSpec;
use offshoot_model::{KvCache, Rows, Segment, TapeSize, Way};
use tch::{Device, Kind, Tensor};

/// How many rows come in each pass.
const PASSES: [usize; 6] = [5, 1, 1, 3, 1, 2];
const N_TOKENS: usize = 13;

fn spec(r: usize) -> LoraSpec {
    LoraSpec { r, target_modules: vec!["all-linear".into()], ..LoraSpec::default() }
}

/// A sequence of a tenant of its own, which comes in several passes.
struct Sequence {
    tenant: Tenant,
    cache: KvCache,
    passes: Vec<usize>,
    outputs: Vec<Tensor>,
}

impl Sequence {
    fn new(model: &Model, dice: &mut Dice, r: usize, passes: &[usize]) -> Sequence {
        let n_tokens = passes.iter().sum();
        let tenant = Tenant::new(model, dice, Some(spec(r)), &[n_tokens]);
        let cache = model.part.new_cache(n_tokens as i64);
        Sequence { tenant, cache, passes: passes.to_vec(), outputs: Vec::new() }
    }

    /// The rows of its next pass, and behind how many they stand.
    fn next(&self) -> (Tensor, usize) {
        let start = self.cache.len();
        let n = self.passes[self.outputs.len()];
        (self.tenant.x.narrow(0, start, n as i64), start as usize)
    }

    /// How far its outputs are from those of one forward over all rows.
    fn distance(&self, model: &Model) -> f64 {
        distance(&Tensor::cat(&self.outputs, 0), &self.tenant.expected(model).output)
    }
}

/// The next pass of all of them, packed one after the other.
fn pass(model: &Model, all: &mut [&mut Sequence]) {
    let parts: Vec<(Tensor, usize)> = all.iter().map(|one| one.next()).collect();
    let x = Tensor::cat(&parts.iter().map(|(x, _)| x).collect::<Vec<_>>(), 0);
    let lens: Vec<usize> = parts.iter().map(|(x, _)| x.size()[0] as usize).collect();
    let starts: Vec<usize> = parts.iter().map(|(_, start)| *start).collect();
    let rows = Rows::after(&lens, &starts, Device::Cpu);
    let (mut segments, mut caches, mut places) = (Vec::new(), Vec::new(), Vec::new());
    let mut begin = 0;
    let mut outputs = Vec::new();
    for (one, n) in all.iter_mut().zip(lens) {
        let (adapter, end) = (one.tenant.set.as_deref(), begin + n as i64);
        segments.push(Segment { rows: begin..end, adapter, dropout: None });
        caches.push(Some(&mut one.cache));
        outputs.push(&mut one.outputs);
        places.push((begin, n as i64));
        begin = end;
    }
    let y = model.part.forward_cached(&x, &rows, &segments, &mut caches);
    for (outputs, (begin, n)) in outputs.into_iter().zip(places) {
        outputs.push(y.narrow(0, begin, n));
    }
}

#[test]
fn prefill_and_decode_equal_one_forward_for_every_family() {
    let mut dice = Dice::new(31);
    for family in FAMILIES {
        let model = Model::load(family, 1..3, Kind::Float);
        let mut one = Sequence::new(&model, &mut dice, 3, &PASSES);
        // The first passes in little room.
        one.cache = model.part.new_cache(6);
        for &n in &PASSES {
            let needed = one.cache.len() + n as i64;
            if needed > one.cache.capacity() {
                one.cache.grow(needed + 2);
            }
            pass(&model, &mut [&mut one]);
        }
        assert_eq!(one.cache.len(), N_TOKENS as i64);
        assert_eq!(one.cache.bytes(), model.part.cache_bytes(one.cache.capacity() as u64));
        let found = one.distance(&model);
        println!("{family}: {found:.1e}");
        assert!(found < F32, "{family}: {found:.1e}");
    }
}

/// Longer than a block of the fused attention kernels.
#[test]
fn long_prefixes_equal_one_forward() {
    let mut dice = Dice::new(32);
    for family in ["gpt2", "llama", "qwen3"] {
        let model = Model::load(family, 2..3, Kind::Float);
        let passes = [700, 1, 90, 1];
        let mut one = Sequence::new(&model, &mut dice, 2, &passes);
        passes.iter().for_each(|_| pass(&model, &mut [&mut one]));
        let found = one.distance(&model);
        println!("{family}: {found:.1e}");
        assert!(found < F32, "{family}: {found:.1e}");
    }
}

#[test]
fn sequences_of_several_adapters_share_passes() {
    let mut dice = Dice::new(33);
    for family in FAMILIES {
        let model = Model::load(family, 1..3, Kind::Float);
        let shapes: [&[usize]; 3] = [&[4, 1, 1, 1], &[1, 1, 2, 1], &[9, 1, 1, 6]];
        let mut all: Vec<Sequence> = shapes
            .iter()
            .enumerate()
            .map(|(i, passes)| Sequence::new(&model, &mut dice, 2 + i, passes))
            .collect();
        for _ in 0..4 {
            pass(&model, &mut all.iter_mut().collect::<Vec<_>>());
        }
        for one in &all {
            let found = one.distance(&model);
            assert!(found < F32, "{family}: {found:.1e}");
        }
    }
}

/// One pass with everything: a sequence goes on between one that trains and two that are evaluated,
/// and the pass runs twice over the same places, as after a failure.
#[test]
fn segments_with_and_without_caches_share_a_pass_that_may_run_again() {
    let mut dice = Dice::new(34);
    for family in FAMILIES {
        let model = Model::load(family, 1..3, Kind::Float);
        let mut going = Sequence::new(&model, &mut dice, 4, &[6, 2]);
        pass(&model, &mut [&mut going]);
        let trains = Tenant::new(&model, &mut dice, Some(spec(2)), &[3, 3, 1]);
        let evaluated = Tenant::new(&model, &mut dice, None, &[2, 2]);

        let (next, start) = going.next();
        let x = Tensor::cat(&[&trains.x, &next, &evaluated.x], 0);
        let rows = [0..3, 0..3, 0..1, start as i64..start as i64 + 2, 0..2, 0..2];
        let positions: Vec<i64> = rows.into_iter().flatten().collect();
        let rows = Rows::new(&[3, 3, 1, 2, 2, 2], Some(&positions), Device::Cpu);
        let sets = [trains.set.as_deref(), going.tenant.set.as_deref(), None];
        let segments: Vec<Segment> = sets
            .into_iter()
            .zip([0..7, 7..9, 9..13])
            .map(|(adapter, rows)| Segment { rows, adapter, dropout: None })
            .collect();
        let ways = [Way::Train(TapeSize::Full), Way::Extend(&going.cache), Way::Evaluate];
        let (first, _) = model.part.forward_mixed(&x, &rows, &segments, &ways);
        let (again, tapes) = model.part.forward_mixed(&x, &rows, &segments, &ways);
        assert_eq!(first, again, "the second pass wrote over what the first one wrote");
        going.cache.advance(2);
        going.outputs.push(again.narrow(0, 7, 2));

        let close = |what: &str, found: f64| assert!(found < F32, "{family} {what}: {found:.1e}");
        close("with a cache", going.distance(&model));
        let expected = trains.expected(&model);
        close("trains", distance(&again.narrow(0, 0, 7), &expected.output));
        close("evaluated", distance(&again.narrow(0, 9, 4), &evaluated.expected(&model).output));

        assert!(tapes[1].is_none() && tapes[2].is_none());
        let tape = tapes[0].as_ref().unwrap();
        let alone = Rows::new(&[3, 3, 1], None, Device::Cpu);
        let segment = [Segment { rows: 0..7, adapter: sets[0], dropout: None }];
        let back = model.part.backward(&[tape], &trains.grad, &alone, &segment, true);
        close("its gradient", distance(&back.input.unwrap(), &expected.input));
    }
}

/// Where products run in bfloat16 caches are kept in it, too.
#[test]
fn narrow_weights_give_what_one_forward_gives() {
    let mut dice = Dice::new(36);
    for family in FAMILIES {
        let model = Model::load(family, 1..3, Kind::BFloat16);
        let mut one = Sequence::new(&model, &mut dice, 3, &PASSES);
        one.tenant.x = one.tenant.x.to_kind(model.part.kind());
        PASSES.iter().for_each(|_| pass(&model, &mut [&mut one]));
        let rows = Rows::new(&[N_TOKENS], None, Device::Cpu);
        let adapter = one.tenant.set.as_deref();
        let segment = [Segment { rows: 0..N_TOKENS as i64, adapter, dropout: None }];
        let whole = model.part.forward_eval(&one.tenant.x, &rows, &segment);
        let found = distance(&Tensor::cat(&one.outputs, 0), &whole);
        let most = if model.part.kind() == Kind::Float { F32 } else { 2e-2 };
        println!("{family} in {:?}: {found:.1e}", model.part.kind());
        assert!(found < most, "{family}: {found:.1e}");
    }
}

/// As the bottom is when the model is cut at layer 0.
#[test]
fn a_part_without_layers_counts_the_tokens() {
    let model = Model::load("gpt2", 1..1, Kind::Float);
    let mut cache = model.part.new_cache(4);
    let x = Tensor::ones([3, model.part.config().hidden_size], (Kind::Float, Device::Cpu));
    let rows = Rows::after(&[3], &[0], Device::Cpu);
    let segment = [Segment { rows: 0..3, adapter: None, dropout: None }];
    let y = model.part.forward_cached(&x, &rows, &segment, &mut [Some(&mut cache)]);
    assert_eq!((y, cache.len(), cache.bytes()), (x, 3, 0));
}

#[test]
fn what_was_truncated_is_written_again() {
    let mut dice = Dice::new(35);
    let model = Model::load("llama", 1..3, Kind::Float);
    let mut one = Sequence::new(&model, &mut dice, 3, &[5, 4]);
    // Another sequence in the same room first.
    let other = Sequence::new(&model, &mut dice, 3, &[7]);
    let rows = Rows::after(&[7], &[0], Device::Cpu);
    let segment = [Segment { rows: 0..7, adapter: None, dropout: None }];
    let caches = &mut [Some(&mut one.cache)];
    let _ = model.part.forward_cached(&other.tenant.x, &rows, &segment, caches);
    one.cache.truncate(0);
    assert!(one.cache.is_empty());
    pass(&model, &mut [&mut one]);
    pass(&model, &mut [&mut one]);
    let found = one.distance(&model);
    assert!(found < F32, "{found:.1e}");
}
