//! What is not finite in one tenant stays with it.

use crate::FAMILIES;
use crate::batch::Batch;
use crate::tenant::{Dice, Model, Tenant, distance};
use offshoot_adapters::{AdapterSet, LoraSpec};
use offshoot_model::{LoraMode, Tape, TapeSize};
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Where a tenant's bad values are, and which.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Poison {
    Rows(f64),
    Gradient(f64),
    A(f64),
    B(f64),
    /// All of A and B: finite, and what they make of finite rows is not.
    Large,
}

const POISONS: [Poison; 9] = [
    Poison::Rows(f64::NAN),
    Poison::Rows(f64::INFINITY),
    Poison::Gradient(f64::NAN),
    Poison::Gradient(f64::INFINITY),
    Poison::A(f64::NAN),
    Poison::A(f64::NEG_INFINITY),
    Poison::B(f64::NAN),
    Poison::B(f64::INFINITY),
    Poison::Large,
];

const POISONED: usize = 1;

fn tenants(model: &Model, dice: &mut Dice) -> Vec<Tenant> {
    let spec = |r| LoraSpec {
        r,
        lora_alpha: 4.0,
        lora_dropout: 0.2,
        use_rslora: false,
        target_modules: vec!["all-linear".into()],
    };
    vec![
        // The same length as its neighbour's: attention takes both in one call.
        Tenant::new(model, dice, Some(spec(3)), &[2, 5]),
        Tenant::new(model, dice, Some(spec(2)), &[5, 4]).drops(3, 4),
        Tenant::new(model, dice, Some(spec(5)), &[4, 1]).drops(5, 6),
        Tenant::new(model, dice, None, &[3]),
    ]
}

impl Poison {
    fn give(self, tenant: &mut Tenant) {
        let one = |t: &Tensor, bad| t.flatten(0, -1).narrow(0, 3, 1).fill_(bad);
        match self {
            Poison::Rows(bad) => drop(one(&tenant.x, bad)),
            Poison::Gradient(bad) => drop(one(&tenant.grad, bad)),
            Poison::A(_) | Poison::B(_) | Poison::Large => {
                let set = tenant.set.as_ref().unwrap();
                let (a, b) = set.matrices(2);
                match self {
                    Poison::A(bad) => drop(one(&a, bad)),
                    Poison::B(bad) => drop(one(&b, bad)),
                    _ => (0..set.sites().len()).for_each(|site| {
                        let (mut a, mut b) = set.matrices(site);
                        let _ = (a.fill_(1e25), b.fill_(1e25));
                    }),
                }
                // As a session comes to such values: through its set, which looks at them.
                let (spec, sites) = (set.spec().clone(), set.sites().to_vec());
                let set = AdapterSet::from_state(spec, sites, set.to_state(), set.device());
                tenant.set = Some(Rc::new(set.unwrap()));
            }
        }
    }
}

/// For each tenant its output, its gradient by the input and by LoRA, from a shared pass.
fn results(model: &Model, tenants: &[Tenant], keep: TapeSize) -> Vec<[Tensor; 3]> {
    let tenants: Vec<&Tenant> = tenants.iter().collect();
    let batch = Batch::new(&tenants, model.part.kind());
    let (rows, segments) = (&batch.rows, &batch.segments);
    let keep = vec![Some(keep); tenants.len()];
    let (y, tapes) = model.part.forward(&batch.x, rows, segments, &keep);
    let tapes: Vec<&Tape> = tapes.iter().flatten().collect();
    let back = model.part.backward(&tapes, &batch.grad, rows, segments, true);
    let shares = batch.shares(back).into_iter();
    let all = batch.split(&y).into_iter().zip(shares);
    all.map(|(y, share)| [y, share.input.unwrap(), share.lora]).collect()
}

/// Whether nobody but the poisoned one differs, by more than `bound`.
fn assert_unchanged(what: &str, sick: &[[Tensor; 3]], healthy: &[[Tensor; 3]], bound: f64) {
    let finite = |t: &Tensor| t.isfinite().all().int64_value(&[]) == 1;
    assert!(!sick[POISONED].iter().all(finite), "{what}: it was not bad");
    for i in (0..healthy.len()).filter(|i| *i != POISONED) {
        for (found, expected) in sick[i].iter().zip(&healthy[i]).filter(|(_, e)| e.numel() > 0) {
            let far = distance(found, expected);
            assert!(far <= bound, "{what}: tenant {i} changed by {far:.1e}");
        }
    }
}

#[test]
fn nan_stays_home() {
    for family in FAMILIES {
        let mut model = Model::load(family, 1..3, Kind::Float);
        for mode in [LoraMode::Loop, LoraMode::Stacked] {
            model.part.set_lora_mode(mode);
            for keep in TapeSize::ALL {
                let healthy = results(&model, &tenants(&model, &mut Dice::new(21)), keep);
                for poison in POISONS {
                    let mut tenants = tenants(&model, &mut Dice::new(21));
                    poison.give(&mut tenants[POISONED]);
                    let what = format!("{family}, {mode:?}, {poison:?}, {keep:?} tapes");
                    // A batch with an adapter that is not finite is not stacked, so that others get
                    // the other way's rounding.
                    let other_way =
                        mode == LoraMode::Stacked && matches!(poison, Poison::A(_) | Poison::B(_));
                    let bound = if other_way { 1e-5 } else { 0.0 };
                    assert_unchanged(&what, &results(&model, &tenants, keep), &healthy, bound);
                }
            }
        }
    }
}
