use super::*;
use crate::session::SessionId;

const RULES: FrameRules =
    FrameRules { hidden_size: 2, wire_dtype: WireDType::F32, max_tokens: 4, max_cache_tokens: 6 };

fn tensor(values: &[f32], shape: &[usize]) -> Option<v1::Tensor> {
    Some(HostTensor::from_f32(values, shape.to_vec(), WireDType::F32).into_proto())
}

fn fine() -> v1::Forward {
    v1::Forward {
        microbatch: 1,
        hidden: tensor(&[1.0; 6], &[3, 2]),
        seq_lens: vec![2, 1],
        position_ids: vec![],
        mode: v1::Mode::Train as i32,
        want_input_grad: false,
        dropout_key: 1,
    }
}

fn check(forward: v1::Forward) -> Result<Frame, Error> {
    let body = Some(Body::Forward(forward));
    frame(v1::ClientFrame { sequence: 1, body, ..Default::default() }, &RULES)
}

fn label(forward: v1::Forward) -> &'static str {
    check(forward).unwrap_err().label()
}

#[test]
fn a_forward_is_checked_in_every_part() {
    check(fine()).unwrap();
    check(v1::Forward { position_ids: vec![0, 1, 5], ..fine() }).unwrap();
    assert_eq!(label(v1::Forward { hidden: None, ..fine() }), "missing");
    assert_eq!(label(v1::Forward { mode: 0, ..fine() }), "missing");
    assert_eq!(label(v1::Forward { seq_lens: vec![2, 2], ..fine() }), "sequence_lengths");
    assert_eq!(label(v1::Forward { seq_lens: vec![], ..fine() }), "sequence_lengths");
    assert_eq!(label(v1::Forward { seq_lens: vec![3, 0], ..fine() }), "empty_sequence");
    assert_eq!(label(v1::Forward { seq_lens: vec![u32::MAX; 9], ..fine() }), "sequence_lengths");
    assert_eq!(label(v1::Forward { position_ids: vec![1], ..fine() }), "position_ids");
    let hidden =
        |values: &[f32], shape: &[usize]| v1::Forward { hidden: tensor(values, shape), ..fine() };
    assert_eq!(label(hidden(&[1.0; 6], &[2, 3])), "shape");
    assert_eq!(label(hidden(&[1.0; 6], &[6])), "shape");
    assert_eq!(label(hidden(&[], &[0, 2])), "tensor");
    assert_eq!(label(hidden(&[1.0; 10], &[5, 2])), "too_many_tokens");
    assert_eq!(label(hidden(&[1.0, 1.0, 1.0, f32::NAN, 1.0, 1.0], &[3, 2])), "not_finite");
    let mut short = fine();
    short.hidden.as_mut().unwrap().shape = vec![9, 2];
    assert_eq!(label(short), "tensor");
    let bf16 = HostTensor::from_f32(&[1.0; 6], vec![3, 2], WireDType::Bf16).into_proto();
    assert_eq!(label(v1::Forward { hidden: Some(bf16), ..fine() }), "wire_dtype");
}

#[test]
fn an_extend_is_checked_in_every_part() {
    let extend = |start, hidden| {
        let body = Some(Body::Extend(v1::Extend { cache: 3, start, hidden }));
        frame(v1::ClientFrame { sequence: 1, body, ..Default::default() }, &RULES)
    };
    let rows = |n: usize| tensor(&vec![1.0; 2 * n], &[n, 2]);
    let label = |start, hidden| extend(start, hidden).unwrap_err().label();
    let good = extend(2, rows(4)).unwrap();
    assert!(matches!(good.work, Work::Extend(ExtendWork { cache: 3, start: 2, .. })));
    assert_eq!(label(0, None), "missing");
    assert_eq!(label(0, rows(5)), "too_many_tokens");
    assert_eq!(label(0, tensor(&[], &[0, 2])), "tensor");
    assert_eq!(label(0, tensor(&[f32::NAN, 1.0], &[1, 2])), "not_finite");
    assert_eq!(label(3, rows(4)), "cache_tokens");
    assert_eq!(label(u32::MAX, rows(1)), "cache_tokens");
    let text = extend(3, rows(4)).unwrap_err().to_string();
    assert!(text.contains("7 tokens") && text.contains("limit of 6"), "{text}");
    // Any change is another payload.
    let digests = [extend(2, rows(4)), extend(1, rows(4)), extend(2, rows(3))];
    let digests = digests.map(|frame| frame.unwrap().head.digest);
    assert!(digests[0] != digests[1] && digests[0] != digests[2]);
}

#[test]
fn an_error_says_what_to_do() {
    let text = check(v1::Forward { seq_lens: vec![2, 2], ..fine() }).unwrap_err().to_string();
    assert_eq!(text, "seq_lens add up to 4 tokens, but hidden has 3 rows");
}

#[test]
fn steps_are_bounded() {
    let checked = |learning_rate, clip_factor, shared_loss| {
        let body = Some(Body::Step(v1::Step { learning_rate, clip_factor, shared_loss }));
        frame(v1::ClientFrame { sequence: 1, body, ..Default::default() }, &RULES)
    };
    let check = |learning_rate, clip_factor| checked(learning_rate, clip_factor, None).map(|_| ());
    check(1e-4, 1.0).unwrap();
    check(0.0, 0.0).unwrap();
    for (learning_rate, clip_factor) in
        [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 1.5), (1.0, -0.1), (1.0, f64::NAN)]
    {
        assert_eq!(check(learning_rate, clip_factor).unwrap_err().label(), "setting");
    }
    // What is shared for people's eyes is part of the frame all the same: a replay is the same frame.
    let shared = |loss| checked(1e-4, 1.0, loss).unwrap().head.digest;
    assert_eq!(shared(Some(2.5)), shared(Some(2.5)));
    assert!(shared(Some(2.5)) != shared(Some(2.25)) && shared(Some(0.0)) != shared(None));
    let error = checked(1e-4, 1.0, Some(f64::NAN)).unwrap_err().to_string();
    assert!(error.starts_with("shared_loss is NaN, expected a finite number"), "{error}");
}

#[test]
fn any_change_of_a_frame_changes_its_digest() {
    let digest = |forward: v1::Forward| check(forward).unwrap().head.digest;
    let first = digest(fine());
    assert_eq!(first, digest(fine()));
    let changed = [
        v1::Forward { microbatch: 2, ..fine() },
        v1::Forward { mode: v1::Mode::Eval as i32, ..fine() },
        v1::Forward { want_input_grad: true, ..fine() },
        v1::Forward { dropout_key: 2, ..fine() },
        v1::Forward { seq_lens: vec![1, 2], ..fine() },
        v1::Forward { seq_lens: vec![3], position_ids: vec![0, 1, 2], ..fine() },
        v1::Forward { hidden: tensor(&[1.0, 1.0, 1.0, 1.0, 1.0, 2.0], &[3, 2]), ..fine() },
    ];
    for forward in changed {
        assert_ne!(digest(forward), first);
    }
}

#[test]
fn the_first_frame_is_hello() {
    let id = SessionId::new();
    let good =
        v1::Hello { session_id: id.to_string(), last_answered: 3, epoch: 7, ..Default::default() };
    let frame = |sequence, body| Some(v1::ClientFrame { sequence, body, ..Default::default() });
    let greeting = Greeting { last_answered: 3, epoch: 7, ..Greeting::default() };
    assert_eq!(
        hello(frame(0, Some(Body::Hello(good.clone())))).unwrap(),
        (id.to_string(), greeting)
    );
    assert_eq!(hello(frame(1, Some(Body::Hello(good)))).unwrap_err().label(), "hello");
    assert_eq!(hello(frame(0, None)).unwrap_err().label(), "hello");
    assert_eq!(hello(None).unwrap_err().label(), "hello");
}

#[test]
fn any_change_of_a_scale_or_an_outlier_changes_the_digest() {
    // An outlier channel.
    let values: Vec<f32> = (0..4 * 70).map(|i| if i % 70 == 9 { 90.0 } else { 1.0 }).collect();
    let digest = |tensor: v1::Tensor, wire_dtype| {
        let rules = FrameRules { hidden_size: 70, wire_dtype, ..RULES };
        let backward = v1::Backward { microbatch: 1, grad: Some(tensor) };
        let body = Some(Body::Backward(backward));
        let frame = frame(v1::ClientFrame { sequence: 1, body, ..Default::default() }, &rules);
        frame.unwrap().head.digest
    };
    let f16 = HostTensor::from_f32(&values, vec![4, 70], WireDType::F16).into_proto();
    let other = v1::Tensor { scale_exponent: Some(3), ..f16.clone() };
    assert_ne!(digest(f16, WireDType::F16), digest(other, WireDType::F16));

    let int8 = HostTensor::from_f32(&values, vec![4, 70], WireDType::Int8).into_proto();
    let twice = |bytes: &bytes::Bytes| bytes.iter().map(|byte| byte / 2).collect::<Vec<u8>>();
    let others = [
        v1::Tensor { block_scales: twice(&int8.block_scales).into(), ..int8.clone() },
        v1::Tensor { outlier_channels: vec![10], ..int8.clone() },
        v1::Tensor { outlier_values: twice(&int8.outlier_values).into(), ..int8.clone() },
        v1::Tensor { outlier_values: vec![].into(), outlier_channels: vec![], ..int8.clone() },
    ];
    let first = digest(int8, WireDType::Int8);
    for other in others {
        assert_ne!(digest(other, WireDType::Int8), first);
    }
}
