//! One tenant alone: every family, every target.

use crate::batch::Batch;
use crate::tenant::{Dice, Model, Tenant, distance};
use crate::{F32, FAMILIES};
use offshoot_adapters::LoraSpec;
use tch::Kind;

/// The same settings with other targets; dropout acts only where a tenant has a key.
fn spec(targets: &[&str]) -> LoraSpec {
    LoraSpec {
        r: 3,
        lora_alpha: 7.0,
        lora_dropout: 0.3,
        use_rslora: false,
        target_modules: targets.iter().map(|&t| t.into()).collect(),
    }
}

#[test]
fn explicit_math_equals_autograd_for_every_family_and_target() {
    let mut dice = Dice::new(1);
    let mut worst = [0f64; 2];
    for family in FAMILIES {
        let model = Model::load(family, 1..3, Kind::Float);
        let modules = model.modules();
        let mut choices: Vec<Option<LoraSpec>> =
            modules.iter().map(|module| Some(spec(&[module]))).collect();
        choices.extend([Some(spec(&["all-linear"])), None]);
        for choice in choices {
            for (drops, want_input) in [(false, true), (true, true), (true, false)] {
                let mut tenant = Tenant::new(&model, &mut dice, choice.clone(), &[5, 1, 4, 4]);
                if drops {
                    tenant = tenant.drops(9, 2);
                }
                let batch = Batch::new(&[&tenant], model.part.kind());
                let expected = tenant.expected(&model);
                let (y, tape) = model.part.forward_train(&batch.x, &batch.rows, &batch.segments[0]);
                let evaluated = model.part.forward_eval(&batch.x, &batch.rows, &batch.segments);
                let segments = &batch.segments;
                let back =
                    model.part.backward(&[&tape], &batch.grad, &batch.rows, segments, want_input);
                assert_eq!(back.input.is_some(), want_input);
                let share = batch.shares(back).remove(0);
                let found = [
                    distance(&y, &expected.output).max(distance(&evaluated, &expected.output)),
                    expected.distance_of_backward(tenant.set.as_deref(), &share),
                ];
                let what = choice.as_ref().map(|spec| &spec.target_modules);
                assert!(
                    found.iter().all(|d| *d < F32),
                    "{family} {what:?}, dropout {drops}: forward {:.1e}, backward {:.1e}",
                    found[0],
                    found[1]
                );
                worst = [worst[0].max(found[0]), worst[1].max(found[1])];
            }
        }
    }
    println!("largest difference: forward {:.1e}, backward {:.1e}", worst[0], worst[1]);
}

/// Longer than a block of the fused attention kernels, beside short ones.
#[test]
fn long_sequences_equal_autograd() {
    let mut dice = Dice::new(2);
    for family in ["gpt2", "llama", "qwen3"] {
        let model = Model::load(family, 2..3, Kind::Float);
        let tenant = Tenant::new(&model, &mut dice, Some(spec(&["all-linear"])), &[3, 700, 65, 65]);
        let tenant = tenant.drops(5, 5);
        let expected = tenant.expected(&model);
        let batch = Batch::new(&[&tenant], model.part.kind());
        let (rows, segments) = (&batch.rows, &batch.segments);
        let (y, tape) = model.part.forward_train(&batch.x, rows, &segments[0]);
        let back = model.part.backward(&[&tape], &batch.grad, rows, segments, true);
        let share = batch.shares(back).remove(0);
        let forward = distance(&y, &expected.output);
        let backward = expected.distance_of_backward(tenant.set.as_deref(), &share);
        println!("{family}: forward {forward:.1e}, backward {backward:.1e}");
        assert!(forward < F32 && backward < F32, "{family}: {forward:.1e} {backward:.1e}");
    }
}
