//! What is not finite in one tenant stays with it.

use crate::FAMILIES;
use crate::batch::Batch;
use crate::tenant::{Dice, Model, Tenant};
use offshoot_adapters::LoraSpec;
use offshoot_model::{LoraMode, Tape, TapeSize};
use tch::{Kind, Tensor};

/// Where a tenant's bad value is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Rows,
    Gradient,
    A,
    B,
}

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

/// The sick tenant's tensor that `place` means, a view.
fn place_of(tenants: &[Tenant], place: Place) -> Tensor {
    let tenant = &tenants[POISONED];
    let set = tenant.set.as_ref().unwrap();
    match place {
        Place::Rows => tenant.x.shallow_clone(),
        Place::Gradient => tenant.grad.shallow_clone(),
        Place::A => set.matrices(2).0,
        Place::B => set.matrices(2).1,
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

/// Runs `check` on a healthy batch's results and on the same with one bad value, for every mode,
/// place, bad value and tape size.
fn with_poison(
    model: &mut Model,
    mode: LoraMode,
    places: &[Place],
    check: impl Fn(&str, &[[Tensor; 3]], &[[Tensor; 3]]),
) {
    model.part.set_lora_mode(mode);
    let tenants = tenants(model, &mut Dice::new(21));
    for keep in TapeSize::ALL {
        let healthy = results(model, &tenants, keep);
        for &place in places {
            for bad in [f64::NAN, f64::INFINITY] {
                let value = place_of(&tenants, place).flatten(0, -1).narrow(0, 3, 1);
                let before = value.copy();
                let _ = value.shallow_clone().fill_(bad);
                let sick = results(model, &tenants, keep);
                value.shallow_clone().copy_(&before);
                let finite = |t: &Tensor| t.isfinite().all().int64_value(&[]) == 1;
                let what = format!("{mode:?}, {bad} in {place:?}, {keep:?} tapes");
                assert!(!sick[POISONED].iter().all(finite), "{what}: it was not bad");
                check(&what, &healthy, &sick);
            }
        }
    }
}

#[test]
fn nan_stays_home() {
    for family in FAMILIES {
        let mut model = Model::load(family, 1..3, Kind::Float);
        let unchanged = |what: &str, healthy: &[[Tensor; 3]], sick: &[[Tensor; 3]]| {
            for i in (0..healthy.len()).filter(|i| *i != POISONED) {
                for (found, expected) in sick[i].iter().zip(&healthy[i]) {
                    assert!(found.equal(expected), "{family} {what}: tenant {i} changed");
                }
            }
        };
        let all = [Place::Rows, Place::Gradient, Place::A, Place::B];
        with_poison(&mut model, LoraMode::Loop, &all, unchanged);
        // Stacked, every row is multiplied with every adapter.
        with_poison(&mut model, LoraMode::Stacked, &all[..2], unchanged);
    }
}

/// The engine runs tenants alone again when a stacked batch shows a value that is not finite. That
/// is enough only if nobody's numbers change without showing one.
#[test]
fn a_bad_adapter_in_a_stacked_batch_shows_wherever_it_reaches() {
    for family in FAMILIES {
        let mut model = Model::load(family, 1..3, Kind::Float);
        let places = [Place::A, Place::B];
        with_poison(&mut model, LoraMode::Stacked, &places, |what, healthy, sick| {
            for i in (0..healthy.len()).filter(|i| *i != POISONED) {
                for (found, expected) in sick[i].iter().zip(&healthy[i]) {
                    let silent = found.isfinite().logical_and(&found.ne_tensor(expected));
                    let n = silent.sum(Kind::Int64).int64_value(&[]);
                    assert_eq!(n, 0, "{family} {what}: tenant {i} has other finite values");
                }
            }
        });
    }
}
