//! Every wire dtype carries the same numbers as float32, as far as it says; what is malformed in it
//! is refused like anything else.

use offshoot_client::{
    Client, ClientError, ErrorCode, ForwardInput, HostTensor, Session, WireDType, WireError,
};
use offshoot_proto::v1::{self, client_frame::Body};
use offshoot_tests::raw::{self, BadFrame, RawStream, check_protocol};
use offshoot_tests::run::{input, open_request, values};
use offshoot_tests::{TestServer, raw::forward};

/// Relative error of one rounding at most, for values of one magnitude and for the gradients here.
fn tolerance(dtype: WireDType) -> f64 {
    match dtype {
        WireDType::F32 => 0.0,
        WireDType::Bf16 => 3e-3,
        WireDType::F16 => 4e-4,
        WireDType::Int8 => 1.5e-2,
    }
}

async fn open(client: &Client, wire_dtype: WireDType) -> Session {
    let mut request = open_request(client).await.unwrap();
    request.wire_dtype = wire_dtype;
    // Dropout would be the same; without it nothing but the wire is between the sessions.
    request.lora.lora_dropout = 0.0;
    client.open(request).await.unwrap()
}

fn rounded(tensor: &HostTensor, dtype: WireDType) -> HostTensor {
    HostTensor::from_f32(&tensor.to_f32(), tensor.shape().to_vec(), dtype)
}

/// Norm of the difference over the norm.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let far = square(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (far / square(&mut expected.iter().map(|&v| f64::from(v)))).sqrt()
}

/// A microbatch of a session: hidden states, output, gradient by the input, its square norm.
struct Passed {
    output: HostTensor,
    gradient: HostTensor,
    norm_squared: f64,
}

/// `grad` is scaled by `size`.
async fn pass(session: &Session, hidden: &HostTensor, grad: &HostTensor, size: f32) -> Passed {
    let dtype = session.wire_dtype();
    let h = hidden.shape()[1];
    let hidden = rounded(hidden, dtype);
    let (output, microbatch, _) =
        session.forward(ForwardInput { hidden, ..input(1, &[4, 3], h) }).await.unwrap();
    let grad: Vec<f32> = grad.to_f32().iter().map(|value| value * size).collect();
    let grad = HostTensor::from_f32(&grad, vec![7, h], dtype);
    let gradients = microbatch.backward(grad).await.unwrap();
    session.step(0.0, 1.0).await.unwrap();
    let gradient = gradients.input.unwrap();
    assert_eq!((output.dtype(), gradient.dtype()), (dtype, dtype));
    Passed { output, gradient, norm_squared: gradients.norm_squared }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wire_dtype_carries_the_same_numbers() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let described = client.describe().await.unwrap();
    assert_eq!(described.wire_dtypes, WireDType::ALL);
    let h = described.hidden_size;
    let hidden = input(1, &[4, 3], h).hidden;
    let grad = HostTensor::from_f32(&values(2, 7 * h), vec![7, h], WireDType::F32);
    let exact = open(&client, WireDType::F32).await;

    // Gradients of 1e-9 and 1e-20 are below what f16 holds without a scale.
    for size in [1.0, 1e-9, 1e-20] {
        let expected = pass(&exact, &hidden, &grad, size).await;
        for dtype in WireDType::ALL {
            let session = open(&client, dtype).await;
            let came = pass(&session, &hidden, &grad, size).await;
            let output = distance(&came.output.to_f32(), &expected.output.to_f32());
            let gradient = distance(&came.gradient.to_f32(), &expected.gradient.to_f32());
            let norm = (came.norm_squared / expected.norm_squared - 1.0).abs();
            println!(
                "{dtype:?} {size:e}: output {output:e}, gradient {gradient:e}, norm² {norm:e}"
            );
            // Rounded on the way there and on the way back; a square counts twice.
            let most = 3.0 * tolerance(dtype);
            assert!(output <= most && gradient <= most, "{dtype:?} {size:e}");
            // 1e-40 has few bits in float32.
            assert!(size < 1e-15 || norm <= 2.0 * most, "{dtype:?} {size:e}: {norm:e}");
            session.close(true).await.unwrap();
        }
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_meter_tells_what_the_wire_dtype_costs() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let hidden = input(1, &[4, 3], h).hidden;
    let grad = HostTensor::from_f32(&values(2, 7 * h), vec![7, h], WireDType::F32);
    for dtype in WireDType::ALL {
        let session = open(&client, dtype).await;
        let listed = async || {
            let sessions = client.list_sessions().await.unwrap();
            let listed = sessions.into_iter().find(|listed| listed.id == *session.id());
            listed.unwrap().wire_error
        };
        assert_eq!(session.wire_error(), WireError::default());
        assert_eq!(listed().await, Some(WireError::default()));
        pass(&session, &hidden, &grad, 1e-9).await;
        let (sent, came) = (session.wire_error(), listed().await.unwrap());
        println!("{dtype:?}: sent {sent:?}, came {came:?}");
        for error in [sent.hidden, sent.gradients, came.hidden, came.gradients] {
            let most = tolerance(dtype);
            assert!((most / 20.0..=most).contains(&error), "{dtype:?}: {error:e}");
        }
        let id = session.id().clone();
        session.close(false).await.unwrap();
        let parked = client.list_sessions().await.unwrap();
        assert_eq!(parked.iter().find(|listed| listed.id == id).unwrap().wire_error, None);
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_blocks_travel_and_bad_numbers_are_refused_in_every_dtype() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let exact = open(&client, WireDType::F32).await;
    let mut zero_rows = values(3, 7 * h);
    zero_rows[2 * h..4 * h].fill(0.0);
    let mut one_channel = values(4, 7 * h);
    one_channel.iter_mut().skip(11).step_by(h).for_each(|value| *value *= 200.0);
    // Every channel is one's outlier; no channel can be.
    let spikes = (0..7 * h).map(|i| if i % h % 7 == i / h { 100.0 } else { 0.01 }).collect();
    for (what, numbers) in [
        ("rows of zeros", zero_rows),
        ("nothing but zeros", vec![0.0; 7 * h]),
        ("one outlier channel", one_channel),
        ("nothing but outliers", spikes),
    ] {
        let hidden = HostTensor::from_f32(&numbers, vec![7, h], WireDType::F32);
        let forward = |session: &Session| {
            let hidden = rounded(&hidden, session.wire_dtype());
            ForwardInput { hidden, ..input(1, &[4, 3], h) }
        };
        let expected = exact.evaluate(forward(&exact)).await.unwrap().to_f32();
        for dtype in WireDType::ALL {
            let session = open(&client, dtype).await;
            let came = session.evaluate(forward(&session)).await.unwrap().to_f32();
            let far = if expected.iter().all(|value| *value == 0.0) {
                f64::from(came.iter().fold(0f32, |most, value| most.max(value.abs())))
            } else {
                distance(&came, &expected)
            };
            println!("{what} in {dtype:?}: {far:e}");
            assert!(far <= 3.0 * tolerance(dtype), "{what} in {dtype:?}: {far:e}");
            session.close(true).await.unwrap();
        }
    }
    for dtype in WireDType::ALL {
        let session = open(&client, dtype).await;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // One becomes an outlier channel of int8, several spoil a block.
            for n_bad in [1, 5] {
                let mut numbers = values(5, 7 * h);
                numbers[3 * h + 1..][..n_bad].fill(bad);
                let hidden = HostTensor::from_f32(&numbers, vec![7, h], dtype);
                let sent = session.evaluate(ForwardInput { hidden, ..input(1, &[4, 3], h) }).await;
                let error = sent.unwrap_err();
                let ClientError::Refused { code, message, .. } = &error else { panic!("{error}") };
                assert_eq!(*code, ErrorCode::Invalid);
                assert!(message.contains("not finite"), "{dtype:?}: {message}");
            }
        }
        session.close(true).await.unwrap();
    }
    server.drain().await;
}

/// A forward in `dtype`, changed after it was made.
fn changed(h: usize, dtype: WireDType, change: impl Fn(&mut v1::Tensor)) -> Option<Body> {
    let mut numbers = values(1, 7 * h);
    // An outlier channel.
    numbers.iter_mut().skip(4).step_by(h).for_each(|value| *value *= 100.0);
    let hidden = HostTensor::from_f32(&numbers, vec![7, h], dtype);
    let input = ForwardInput { hidden, ..input(5, &[4, 3], h) };
    let mut forward = forward(input, 100, v1::Mode::Train);
    change(forward.hidden.get_or_insert_default());
    Some(Body::Forward(forward))
}

fn put_scale(tensor: &mut v1::Tensor, index: usize, scale: f32) {
    let mut bytes = tensor.block_scales.to_vec();
    bytes[4 * index..][..4].copy_from_slice(&scale.to_le_bytes());
    tensor.block_scales = bytes.into();
}

fn bad_tensors(h: usize, dtype: WireDType) -> Vec<BadFrame> {
    let bad = |what, change: fn(&mut v1::Tensor), names| {
        let body = changed(h, dtype, change);
        BadFrame { what, body, code: ErrorCode::Invalid, names }
    };
    let of_int8 = |what, change, names| {
        if dtype == WireDType::Int8 {
            bad(what, change, names)
        } else {
            // Any of these fields is one too many elsewhere.
            bad(what, |t| t.block_scales = vec![0; 28].into(), &["block_scales", "no such field"])
        }
    };
    let mut all = vec![
        of_int8(
            "short scales",
            |t| t.block_scales.truncate(24),
            &["28 bytes of block_scales", "24"],
        ),
        of_int8("no scales", |t| t.block_scales.clear(), &["block_scales", "0 came"]),
        of_int8("NaN scale", |t| put_scale(t, 2, f32::NAN), &["block_scales[2]", "NaN"]),
        of_int8("negative scale", |t| put_scale(t, 6, -0.5), &["block_scales[6]", "-5e-1"]),
        of_int8("infinite scale", |t| put_scale(t, 0, f32::INFINITY), &["block_scales[0]", "inf"]),
        of_int8("huge scale", |t| put_scale(t, 1, 3e36), &["block_scales[1] is 3e36", "2^121"]),
        of_int8("outlier beyond H", |t| t.outlier_channels = vec![40], &["[40]", "below 40"]),
        of_int8(
            "outliers twice",
            |t| t.outlier_channels = vec![4, 4],
            &["2 outlier_channels", "1"],
        ),
        of_int8("no outlier values", |t| t.outlier_values.clear(), &["14 bytes of outlier_values"]),
        of_int8(
            "infinite outlier",
            |t| t.outlier_values = [0, 0, 0x80, 0x7f].repeat(4)[..14].to_vec().into(),
            &["hidden", "not finite", "index 44"],
        ),
        of_int8("one axis", |t| t.shape = vec![280], &["int8", "[280]"]),
        of_int8("a scale of f16", |t| t.scale_exponent = Some(0), &["scale_exponent", "int8"]),
        bad("short data", |t| t.data.truncate(12), &["12 came"]),
    ];
    if dtype == WireDType::F16 {
        all.extend([
            bad("no scale", |t| t.scale_exponent = None, &["f16", "scale_exponent"]),
            bad("scale too large", |t| t.scale_exponent = Some(114), &["114", "113"]),
            bad("scale too small", |t| t.scale_exponent = Some(i32::MIN), &["-126"]),
            bad(
                "infinite with its scale",
                |t| {
                    t.scale_exponent = Some(113);
                    t.data = [0, 0x79].repeat(280).into();
                },
                &["hidden", "not finite"],
            ),
        ]);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_scales_and_outliers_are_refused_and_the_session_goes_on() {
    let server = TestServer::start().await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    for dtype in WireDType::ALL {
        let session = open(&client, dtype).await;
        let id = session.id().to_string();
        drop(session);
        let mut rpc = raw::rpc(&server.endpoint()).await;
        let mut stream = RawStream::attach(&mut rpc, &id).await.unwrap();
        let Some(Body::Forward(good)) = changed(h, dtype, |_| {}) else { panic!("a forward") };
        let good = v1::Forward { microbatch: 0, mode: v1::Mode::Eval as i32, ..good };
        check_protocol(&mut stream, bad_tensors(h, dtype), &good).await;
        // The same numbers in another dtype are not taken for the session's.
        for other in WireDType::ALL.into_iter().filter(|other| *other != dtype) {
            let body = changed(h, other, |_| {}).unwrap();
            let error = stream.refused(raw::frame(stream.next, body)).await;
            assert_eq!(error.code(), ErrorCode::Invalid);
            assert!(error.message.contains(dtype.name()), "{}", error.message);
            assert!(error.message.contains(other.name()), "{}", error.message);
        }
    }
    // Adapters stay in float32.
    let mut request = open_request(&client).await.unwrap();
    let tensor = HostTensor::from_f32(&[0.5; 4], vec![2, 2], WireDType::Int8);
    request.initial_adapter = vec![("any".into(), tensor)];
    let error = client.open(request).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Invalid));
    assert!(error.to_string().contains("f32") && error.to_string().contains("int8"), "{error}");
    server.drain().await;
}
