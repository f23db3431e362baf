//! Batches of any composition: forwards that several tenants share, tapes of every size, backwards
//! in another company than the forwards'.

use crate::batch::Batch;
use crate::tenant::{Dice, Expected, Gradients, Model, Tenant, distance};
use crate::{F32, FAMILIES};
use offshoot_adapters::LoraSpec;
use offshoot_model::{LoraMode, Tape, TapeSize};
use std::rc::Rc;
use tch::Kind;

/// Settings that differ in everything.
fn random_spec(model: &Model, dice: &mut Dice) -> LoraSpec {
    let mut targets = model.modules();
    dice.shuffle(&mut targets);
    targets.truncate(dice.number(1..targets.len() + 1));
    match dice.number(0..6) {
        0 | 1 => targets = vec!["all-linear".into()],
        // One layer only, by its path.
        2 => targets = vec![model.part.sites(&targets).unwrap()[0].path.clone()],
        _ => {}
    }
    LoraSpec {
        r: dice.number(1..7),
        lora_alpha: dice.number(1..9) as f64,
        lora_dropout: *dice.any(&[0.0, 0.0, 0.1, 0.5]),
        use_rslora: dice.chance(0.3),
        target_modules: targets,
    }
}

/// A tenant of up to three sequences; now and then another microbatch of an earlier one's session.
fn random_tenant(model: &Model, dice: &mut Dice, others: &[Job]) -> Tenant {
    let seq_lens: Vec<usize> = (0..dice.number(1..4)).map(|_| dice.number(1..8)).collect();
    let mut tenant = if !others.is_empty() && dice.chance(0.2) {
        let set = dice.any(others).tenant.set.clone();
        Tenant::sharing(model, dice, set, &seq_lens)
    } else {
        let spec = dice.chance(0.9).then(|| random_spec(model, dice));
        Tenant::new(model, dice, spec, &seq_lens)
    };
    if dice.chance(0.6) {
        tenant = tenant.drops(dice.number(0..99) as u64, dice.number(0..99) as u64);
    }
    if dice.chance(0.3) {
        let first = dice.number(0..20) as i64;
        let ids = seq_lens.iter().flat_map(|&n| (0..n as i64).map(move |i| first + 2 * i));
        tenant.position_ids = Some(ids.collect());
    }
    tenant
}

/// A tenant, what autograd says of it alone, and how much its forward shall keep.
struct Job {
    tenant: Tenant,
    expected: Expected,
    keep: Option<TapeSize>,
    tape: Option<Tape>,
}

/// Cuts `items` into runs of random lengths.
fn random_groups(dice: &mut Dice, mut items: Vec<usize>) -> Vec<Vec<usize>> {
    let mut groups = Vec::new();
    while !items.is_empty() {
        let rest = items.split_off(dice.number(1..items.len() + 1));
        groups.push(std::mem::replace(&mut items, rest));
    }
    groups
}

/// The forwards of all jobs, in batches of random company. The largest difference.
fn run_forwards(model: &Model, dice: &mut Dice, jobs: &mut [Job]) -> f64 {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    dice.shuffle(&mut order);
    let mut worst = 0f64;
    for group in random_groups(dice, order) {
        let tenants: Vec<&Tenant> = group.iter().map(|&i| &jobs[i].tenant).collect();
        let batch = Batch::new(&tenants, model.part.kind());
        let keep: Vec<Option<TapeSize>> = group.iter().map(|&i| jobs[i].keep).collect();
        let (y, tapes) = model.part.forward(&batch.x, &batch.rows, &batch.segments, &keep);
        assert_eq!(tapes.len(), group.len());
        let outputs = batch.split(&y);
        for ((i, tape), output) in group.into_iter().zip(tapes).zip(outputs) {
            let job = &mut jobs[i];
            assert_eq!(tape.as_ref().map(Tape::size), job.keep);
            worst = worst.max(distance(&output, &job.expected.output));
            job.tape = tape;
        }
    }
    worst
}

/// Makes some tapes smaller, as under pressure.
fn shrink_some(dice: &mut Dice, jobs: &mut [Job]) {
    for tape in jobs.iter_mut().filter_map(|job| job.tape.as_mut()) {
        for to in [TapeSize::Blocks, TapeSize::Input] {
            if dice.chance(0.3) {
                let (size, bytes) = (tape.size(), tape.bytes());
                tape.shrink(to);
                assert_eq!(tape.size(), size.min(to));
                assert!(tape.bytes() <= bytes);
            }
        }
    }
}

/// The backwards of all jobs with a tape, in batches of other company. The largest difference.
fn run_backwards(model: &Model, dice: &mut Dice, jobs: &[Job]) -> f64 {
    let mut order: Vec<usize> = (0..jobs.len()).filter(|&i| jobs[i].tape.is_some()).collect();
    dice.shuffle(&mut order);
    let mut worst = 0f64;
    for group in random_groups(dice, order) {
        let tenants: Vec<&Tenant> = group.iter().map(|&i| &jobs[i].tenant).collect();
        let tapes: Vec<&Tape> = group.iter().filter_map(|&i| jobs[i].tape.as_ref()).collect();
        let batch = Batch::new(&tenants, model.part.kind());
        let (rows, segments) = (&batch.rows, &batch.segments);
        let want_input = dice.chance(0.7);
        let back = model.part.backward(&tapes, &batch.grad, rows, segments, want_input);
        assert_eq!(back.input.is_some(), want_input);
        for (share, &i) in batch.shares(back).iter().zip(&group) {
            let set = jobs[i].tenant.set.as_deref();
            worst = worst.max(jobs[i].expected.distance_of_backward(set, share));
        }
    }
    worst
}

#[test]
fn batches_of_any_composition_equal_autograd() {
    let mut models: Vec<Model> =
        FAMILIES.iter().map(|family| Model::load(family, 1..3, Kind::Float)).collect();
    let mut worst = [0f64; 2];
    for seed in 0..300 {
        let mut dice = Dice::new(seed);
        let index = dice.number(0..models.len());
        let mode =
            *dice.any(&[LoraMode::Stacked, LoraMode::Stacked, LoraMode::Loop, LoraMode::Auto]);
        models[index].part.set_lora_mode(mode);
        let model = &models[index];
        let mut jobs: Vec<Job> = Vec::new();
        // With room for all, tapes are views of what their forward shared.
        let roomy = dice.chance(0.4);
        for _ in 0..dice.number(1..7) {
            let tenant = random_tenant(model, &mut dice, &jobs);
            let expected = tenant.expected(model);
            let keep = match roomy {
                true => Some(TapeSize::Full),
                false => dice.chance(0.8).then(|| *dice.any(&TapeSize::ALL)),
            };
            jobs.push(Job { tenant, expected, keep, tape: None });
        }
        let forward = run_forwards(model, &mut dice, &mut jobs);
        if !roomy {
            shrink_some(&mut dice, &mut jobs);
        }
        let backward = run_backwards(model, &mut dice, &jobs);
        assert!(
            forward < F32 && backward < F32,
            "seed {seed}, {}, {mode:?}, {} tenants: forward {forward:.1e}, backward {backward:.1e}",
            FAMILIES[index],
            jobs.len()
        );
        worst = [worst[0].max(forward), worst[1].max(backward)];
    }
    println!("largest difference: forward {:.1e}, backward {:.1e}", worst[0], worst[1]);
}

/// Three tenants that share forward and backward, with LoRA everywhere and dropout.
fn three_tenants(model: &Model, dice: &mut Dice) -> Vec<Tenant> {
    let spec = |r, lora_dropout| LoraSpec {
        r,
        lora_alpha: 4.0,
        lora_dropout,
        use_rslora: false,
        target_modules: vec!["all-linear".into()],
    };
    vec![
        Tenant::new(model, dice, Some(spec(2, 0.2)), &[5, 3]).drops(1, 2),
        Tenant::new(model, dice, Some(spec(4, 0.0)), &[1, 6]),
        Tenant::new(model, dice, None, &[4]),
    ]
}

/// Gradients of all tenants after one shared forward that keeps `keep` and tapes shrunk to `to`.
fn gradients(model: &Model, tenants: &[Tenant], keep: TapeSize, to: &[TapeSize]) -> Vec<Gradients> {
    let tenants: Vec<&Tenant> = tenants.iter().collect();
    let batch = Batch::new(&tenants, model.part.kind());
    let (rows, segments) = (&batch.rows, &batch.segments);
    let keep = vec![Some(keep); tenants.len()];
    let (_, tapes) = model.part.forward(&batch.x, rows, segments, &keep);
    let mut tapes: Vec<Tape> = tapes.into_iter().flatten().collect();
    for (tape, tenant) in tapes.iter_mut().zip(&tenants) {
        to.iter().for_each(|&to| tape.shrink(to));
        assert_eq!(tape.n_tokens(), tenant.n_tokens());
        let input = (tenant.x.numel() * 4) as u64;
        let n_layers = model.part.layers().len() as u64;
        match tape.size() {
            TapeSize::Full => assert!(tape.bytes() > 5 * n_layers * input),
            TapeSize::Blocks => assert_eq!(tape.bytes(), n_layers * input),
            TapeSize::Input => assert_eq!(tape.bytes(), input),
        }
    }
    let tapes: Vec<&Tape> = tapes.iter().collect();
    batch.shares(model.part.backward(&tapes, &batch.grad, rows, segments, true))
}

#[test]
fn every_tape_size_gives_the_same_gradients() {
    use TapeSize::{Blocks, Full, Input};
    let mut dice = Dice::new(7);
    for family in FAMILIES {
        for mode in [LoraMode::Stacked, LoraMode::Loop] {
            let mut model = Model::load(family, 0..4, Kind::Float);
            model.part.set_lora_mode(mode);
            let tenants = three_tenants(&model, &mut dice);
            let full = gradients(&model, &tenants, Full, &[]);
            for (tenant, share) in tenants.iter().zip(&full) {
                let expected = tenant.expected(&model);
                let far = expected.distance_of_backward(tenant.set.as_deref(), share);
                assert!(far < F32, "{family} {mode:?}: {far:.1e}");
            }
            let others: [(TapeSize, &[TapeSize]); 5] = [
                (Blocks, &[]),
                (Input, &[]),
                (Full, &[Blocks]),
                (Full, &[Input]),
                (Full, &[Blocks, Full, Input, Blocks]),
            ];
            for (keep, to) in others {
                let found = gradients(&model, &tenants, keep, to);
                for (found, full) in found.iter().zip(&full) {
                    // What is computed again in the same company is computed by the same kernels.
                    let same = found.lora.equal(&full.lora)
                        && found.input.as_ref().unwrap().equal(full.input.as_ref().unwrap());
                    assert!(same, "{family} {mode:?}: kept {keep:?}, shrunk to {to:?}");
                }
            }
        }
    }
}

/// Two microbatches of one session, on their way at once, are two segments with one adapter.
#[test]
fn a_session_may_share_a_batch_with_itself() {
    let mut dice = Dice::new(8);
    let mut model = Model::load("llama", 1..3, Kind::Float);
    for mode in [LoraMode::Stacked, LoraMode::Loop] {
        model.part.set_lora_mode(mode);
        let mut tenants = three_tenants(&model, &mut dice);
        let set = tenants[0].set.clone();
        assert_eq!(Rc::strong_count(set.as_ref().unwrap()), 2);
        tenants.push(Tenant::sharing(&model, &mut dice, set, &[2, 7]).drops(1, 3));
        let found = gradients(&model, &tenants, TapeSize::Full, &[]);
        for (tenant, share) in tenants.iter().zip(&found) {
            let expected = tenant.expected(&model);
            let far = expected.distance_of_backward(tenant.set.as_deref(), share);
            assert!(far < F32, "{mode:?}: {far:.1e}");
        }
    }
}

/// An adapter whose targets are all in layers that are elsewhere, as a session with LoRA in the
/// client's layers only has it.
#[test]
fn an_adapter_without_sites_is_the_base_model() {
    let mut dice = Dice::new(9);
    let mut model = Model::load("llama", 1..3, Kind::Float);
    for mode in [LoraMode::Stacked, LoraMode::Loop] {
        model.part.set_lora_mode(mode);
        let mut tenants = three_tenants(&model, &mut dice);
        let elsewhere = LoraSpec {
            lora_dropout: 0.1,
            target_modules: vec!["model.layers.3.mlp.up_proj".into()],
            ..LoraSpec::default()
        };
        tenants.insert(1, Tenant::new(&model, &mut dice, Some(elsewhere), &[4, 2]).drops(1, 1));
        assert_eq!(tenants[1].set.as_ref().unwrap().n_parameters(), 0);
        let found = gradients(&model, &tenants, TapeSize::Full, &[]);
        for (tenant, share) in tenants.iter().zip(&found) {
            let expected = tenant.expected(&model);
            let far = expected.distance_of_backward(tenant.set.as_deref(), share);
            assert!(far < F32, "{mode:?}: {far:.1e}");
        }
    }
}

/// A client that keeps only the embeddings has a part without layers.
#[test]
fn a_part_without_layers_passes_everything_through() {
    let mut dice = Dice::new(10);
    let model = Model::load("llama", 1..1, Kind::Float);
    let tenant = Tenant::new(&model, &mut dice, None, &[3, 2]);
    let batch = Batch::new(&[&tenant], model.part.kind());
    let (rows, segments) = (&batch.rows, &batch.segments);
    for keep in TapeSize::ALL {
        let (y, tapes) = model.part.forward(&batch.x, rows, segments, &[Some(keep)]);
        assert!(y.equal(&tenant.x));
        let mut tape = tapes.into_iter().flatten().next().unwrap();
        assert_eq!((tape.n_tokens(), tape.bytes()), (5, 0));
        tape.shrink(TapeSize::Input);
        let back = model.part.backward(&[&tape], &batch.grad, rows, segments, true);
        assert!(back.input.unwrap().equal(&tenant.grad));
    }
}
