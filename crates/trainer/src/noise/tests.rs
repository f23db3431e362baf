use super::*;
use tch::Device;

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn perturbation(clip_norm: f64, noise: f64) -> Perturbation {
    Perturbation { clip_norm: Some(clip_norm), noise }
}

fn hidden<'a>(rows: &'a Tensor, seq_lens: &'a [usize]) -> Message<'a> {
    Message { rows, seq_lens, start: 0, kind: MessageKind::Hidden }
}

fn key() -> NoiseKey {
    NoiseKey::of([7; 32])
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && host::bytes_of(a, a.kind()) == host::bytes_of(b, b.kind())
}

#[test]
fn no_noise_and_an_infinite_clip_change_no_bit() {
    let rows = Tensor::randn([9, 33], CPU) * 50.0;
    let _ = rows.get(3).zero_();
    let _ = rows.get(4).fill_(-0.0);
    for rows in [rows.shallow_clone(), rows.to_kind(Kind::BFloat16)] {
        for message in [
            hidden(&rows, &[4, 5]),
            Message { kind: MessageKind::Gradients { scale: 1e-3 }, ..hidden(&rows, &[9]) },
        ] {
            assert!(same_bits(&Perturbation::default().apply(&key(), &message), &rows));
            let sent = perturbation(f64::INFINITY, 0.0).apply(&key(), &message);
            assert!(same_bits(&sent.to_kind(rows.kind()), &rows));
            // Nor does a clip that is longer than every row.
            let sent = perturbation(1e6, 0.0).apply(&key(), &message);
            assert!(same_bits(&sent.to_kind(rows.kind()), &rows));
        }
        let grad = Tensor::randn([9, 33], CPU).to_kind(rows.kind());
        for perturbation in [Perturbation::default(), perturbation(1e6, 0.0)] {
            assert!(same_bits(&perturbation.backward(&rows, &grad), &grad));
        }
    }
}

#[test]
fn long_rows_are_clipped_to_the_norm_and_keep_their_direction() {
    let rows = Tensor::randn([6, 40], CPU)
        * Tensor::from_slice(&[0.1f32, 1., 2., 9., 50., 1e4]).unsqueeze(1);
    let sent = perturbation(10.0, 0.0).apply(&key(), &hidden(&rows, &[6]));
    for row in 0..6 {
        let (x, y) = (rows.get(row), sent.get(row));
        let norm = x.norm().double_value(&[]);
        let expected = norm.min(10.0);
        assert!((y.norm().double_value(&[]) / expected - 1.0).abs() < 1e-5);
        let cosine = x.dot(&y).double_value(&[]) / (norm * expected);
        assert!((cosine - 1.0).abs() < 1e-5, "{cosine}");
    }
    // Gradients are measured in units of one token's loss: those of a thousandth of the sum are a
    // thousandth as long.
    let gradients =
        |rows| Message { kind: MessageKind::Gradients { scale: 1e-3 }, ..hidden(rows, &[6]) };
    let scaled = perturbation(10.0, 0.0).apply(&key(), &gradients(&(&rows * 1e-3)));
    assert!((scaled * 1e3).allclose(&sent, 1e-5, 1e-6, false));
}

#[test]
fn noise_is_normal_and_as_long_as_it_says() {
    let (n, width) = (600, 576);
    let rows = Tensor::randn([n, width], CPU);
    let (clip, noise) = (5.0, 0.5);
    let seq_lens = [100; 6];
    let sent = perturbation(clip, noise).apply(&key(), &hidden(&rows, &seq_lens));
    let clipped = perturbation(clip, 0.0).apply(&key(), &hidden(&rows, &seq_lens));
    let added = sent - clipped;
    let lengths = norms(&added) / (clip * noise);
    let (mean, spread) = (lengths.mean(Kind::Double), lengths.std(true));
    assert!((mean.double_value(&[]) - 1.0).abs() < 5e-3, "{mean}");
    // The length of H normal values varies by 1 / sqrt(2 H).
    assert!((spread.double_value(&[]) - 1.0 / (2.0 * width as f64).sqrt()).abs() < 5e-3);
    let z = added.to_kind(Kind::Double) * (width as f64).sqrt() / (clip * noise);
    let moment = |k: f64| z.pow_tensor_scalar(k).mean(Kind::Double).double_value(&[]);
    // n H = 345600 values: standard errors are 0.0017, 0.0024, 0.007 and 0.017.
    for (k, expected, bound) in
        [(1.0, 0.0, 0.01), (2.0, 1.0, 0.013), (3.0, 0.0, 0.035), (4.0, 3.0, 0.085)]
    {
        assert!((moment(k) - expected).abs() < bound, "moment {k}: {}", moment(k));
    }
    // Neighbouring values and rows are independent.
    for (dimension, length) in [(1, width), (0, n)] {
        let (a, b) = (z.narrow(dimension, 0, length - 1), z.narrow(dimension, 1, length - 1));
        let correlation = (a * b).mean(Kind::Double).double_value(&[]);
        assert!(correlation.abs() < 0.01, "{correlation}");
    }
}

#[test]
fn noise_is_a_function_of_the_key_and_of_what_is_sent() {
    let noisy = perturbation(3.0, 1.0);
    let (a, b) = (Tensor::randn([5, 64], CPU), Tensor::randn([4, 64], CPU));
    let noise = |key: &NoiseKey, message: &Message| {
        noisy.apply(key, message) - perturbation(3.0, 0.0).apply(key, message)
    };
    let both = Tensor::cat(&[&a, &b], 0);
    let first = noise(&key(), &hidden(&both, &[5, 4]));
    assert!(same_bits(&first, &noise(&key(), &hidden(&both, &[5, 4]))));
    // A sequence has its own, whoever else is in the message.
    let swapped = Tensor::cat(&[&b, &a], 0);
    let second = noise(&key(), &hidden(&swapped, &[4, 5]));
    assert!(same_bits(&first.narrow(0, 0, 5), &second.narrow(0, 4, 5)));
    // With another key, kind, place, extent or value, however close, it is another one.
    let nudged = &a + 1e-6;
    let alone = noise(&key(), &hidden(&a, &[5]));
    let (scale, start) = (1.0, 1);
    for other in [
        noise(&NoiseKey::of([8; 32]), &hidden(&a, &[5])),
        noise(&key(), &Message { kind: MessageKind::Gradients { scale }, ..hidden(&a, &[5]) }),
        noise(&key(), &Message { start, ..hidden(&a, &[5]) }),
        noise(&key(), &hidden(&a, &[2, 3])),
        noise(&key(), &hidden(&nudged, &[5])),
    ] {
        let far = (&other - &alone).norm().double_value(&[]) / alone.norm().double_value(&[]);
        assert!((far - 2f64.sqrt()).abs() < 0.3, "{far}");
    }
}

#[test]
fn the_gradient_through_the_clip_is_autograds() {
    // Two rows are clipped, two are not.
    let lengths = Tensor::from_slice(&[0.5f64, 1.5, 8.0, 300.0]).unsqueeze(1);
    let x = Tensor::randn([4, 24], (Kind::Double, Device::Cpu));
    let x = (&x / norms(&x) * lengths).set_requires_grad(true);
    let upstream = Tensor::randn([4, 24], (Kind::Double, Device::Cpu));
    let clipped = &x * (norms(&x).reciprocal() * 2.0).clamp_max(1.0);
    (clipped * &upstream).sum(Kind::Double).backward();
    let (rows, by_autograd) = (x.detach().to_kind(Kind::Float), x.grad());
    // Noise passes the gradient on as it is.
    for noise in [0.0, 0.7] {
        let ours = perturbation(2.0, noise).backward(&rows, &upstream.to_kind(Kind::Float));
        let far = (ours.to_kind(Kind::Double) - &by_autograd).abs().max().double_value(&[]);
        assert!(far < 1e-5, "{far:e}");
    }
    // It is not the identity: the direction of a clipped row has no way through.
    let along = perturbation(2.0, 0.0).backward(&rows, &rows);
    assert!(along.get(3).abs().max().double_value(&[]) < 1e-4);
    assert!(same_bits(&along.get(0), &rows.get(0)));
}

#[test]
fn senseless_options_are_refused() {
    let said = |privacy: PrivacyOptions| privacy.validate().unwrap_err().to_string();
    let of = |hidden: Perturbation, gradients: Perturbation| PrivacyOptions {
        hidden,
        gradients,
        noise_key: None,
    };
    let none = Perturbation::default();
    of(none, none).validate().unwrap();
    of(perturbation(3.0, 0.0), perturbation(3.0, 2.0)).validate().unwrap();
    for norm in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let text = said(of(perturbation(norm, 0.0), none));
        assert!(
            text.starts_with("--hidden-clip-norm = ")
                && text.contains("expected a positive number"),
            "{text}"
        );
    }
    for noise in [-0.5, f64::NAN, f64::INFINITY] {
        let text = said(of(none, perturbation(1.0, noise)));
        assert!(text.starts_with("--gradient-noise = ") && text.contains("such as 0.5"), "{text}");
    }
    let text = said(of(none, Perturbation { clip_norm: None, noise: 0.5 }));
    assert!(text.contains("in units of --gradient-clip-norm, which is missing"), "{text}");
}
