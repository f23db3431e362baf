//! Weights in bfloat16. A CPU without matrix units for it keeps rows in float32, so that only the
//! weights are rounded; elsewhere rows are bfloat16 too (`compute_kind`).

use crate::batch::Batch;
use crate::tenant::{Dice, Model, Tenant, distance};
use crate::{F32, FAMILIES};
use offshoot_adapters::LoraSpec;
use offshoot_model::{LoraMode, Tape, TapeSize};
use tch::{Kind, Tensor};

/// What rows in bfloat16 may differ from autograd in float64 over the same weights.
const BF16: f64 = 0.1;

fn tenants(model: &Model, dice: &mut Dice) -> Vec<Tenant> {
    let spec = |r, lora_dropout| LoraSpec {
        r,
        lora_alpha: 4.0,
        lora_dropout,
        use_rslora: false,
        target_modules: vec!["all-linear".into()],
    };
    vec![
        Tenant::new(model, dice, Some(spec(2, 0.0)), &[5, 3]),
        Tenant::new(model, dice, Some(spec(4, 0.2)), &[1, 6]).drops(1, 2),
    ]
}

/// Every tape size against autograd within `bound`, and against each other bit for bit. The largest
/// difference.
fn check(what: &str, model: &Model, tenants: &[Tenant], rows_in: Kind, bound: f64) -> f64 {
    let batch = Batch::new(&tenants.iter().collect::<Vec<_>>(), rows_in);
    let (rows, segments) = (&batch.rows, &batch.segments);
    let mut worst = 0f64;
    let mut first: Option<Vec<Tensor>> = None;
    for keep in TapeSize::ALL {
        let keep = vec![Some(keep); tenants.len()];
        let (y, tapes) = model.part.forward(&batch.x, rows, segments, &keep);
        assert_eq!(y.kind(), rows_in);
        let tapes: Vec<&Tape> = tapes.iter().flatten().collect();
        let back = model.part.backward(&tapes, &batch.grad, rows, segments, true);
        let shares = batch.shares(back);
        for ((tenant, share), y) in tenants.iter().zip(&shares).zip(batch.split(&y)) {
            let expected = tenant.expected(model);
            let backward = expected.distance_of_backward(tenant.set.as_deref(), share);
            worst = worst.max(distance(&y, &expected.output)).max(backward);
        }
        let all: Vec<Tensor> = shares.into_iter().map(|share| share.lora).collect();
        let first = first.get_or_insert_with(|| all.iter().map(Tensor::copy).collect());
        let same = all.iter().zip(first).all(|(a, b)| a.equal(b));
        assert!(same, "{what}: {keep:?} tapes give other gradients");
    }
    assert!(worst < bound, "{what}: {worst:.1e}");
    worst
}

#[test]
fn bf16_weights_equal_autograd_over_the_same_weights() {
    let mut dice = Dice::new(31);
    let mut worst = [0f64; 2];
    for family in FAMILIES {
        for mode in [LoraMode::Stacked, LoraMode::Loop] {
            let mut model = Model::load(family, 1..3, Kind::BFloat16);
            model.part.set_lora_mode(mode);
            let tenants = tenants(&model, &mut dice);
            let kind = model.part.kind();
            let bound = if kind == Kind::Float { F32 } else { BF16 };
            let what = format!("{family} {mode:?}");
            worst[0] = worst[0].max(check(&what, &model, &tenants, kind, bound));
            // The dtype of the rows is that of the products, wherever biases do not settle it.
            if !model.part.config().qkv_bias {
                let far = check(&what, &model, &tenants, Kind::BFloat16, BF16);
                worst[1] = worst[1].max(far);
            }
        }
    }
    println!("largest difference: {:.1e}, rows in bfloat16 {:.1e}", worst[0], worst[1]);
}
