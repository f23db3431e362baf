use super::*;

fn bytes(n: usize) -> Bytes {
    vec![0; n].into()
}

#[test]
fn values_survive_the_wire() {
    for dtype in WireDType::ALL {
        let values = [0.0, -127.0, 63.5, 2.0, 1024.0, 512.0];
        let sent = HostTensor::from_f32(&values, vec![2, 3], dtype);
        let came = HostTensor::from_proto(Some(sent.clone().into_proto())).unwrap();
        assert_eq!(came, sent);
        assert_eq!(came.dtype(), dtype);
        for (value, came) in values.iter().zip(came.to_f32()) {
            let step = if dtype == WireDType::Int8 { 0.51 * 1024.0 / 127.0 } else { 0.0 };
            assert!((value - came).abs() <= step, "{dtype:?}: {value} {came}");
        }
    }
}

#[test]
fn bad_numbers_stay_bad_in_every_dtype() {
    for dtype in WireDType::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let sent = HostTensor::from_f32(&[1.0, bad, 2.0, 0.5], vec![2, 2], dtype);
            assert!(sent.to_f32().iter().any(|value| !value.is_finite()), "{dtype:?} {bad}");
        }
    }
}

#[test]
fn f16_keeps_what_is_tiny_and_what_is_huge() {
    for size in [1e-37, 1e-20, 1e-9, 1.0, 1e9, 1e38] {
        // The smallest is 2^-27 of the largest.
        let values: Vec<f32> = (0..28).map(|i| size * 0.5f32.powi(i)).collect();
        let sent = HostTensor::from_f32(&values, vec![4, 7], WireDType::F16);
        for (value, came) in values.iter().zip(sent.to_f32()) {
            assert!((value - came).abs() <= value / 2048.0, "{value} {came}");
        }
        assert!(sent.rounding().relative_error() < 1e-3);
    }
    let zeros = HostTensor::from_f32(&[0.0; 4], vec![2, 2], WireDType::F16);
    assert_eq!(zeros.clone().into_proto().scale_exponent, Some(0));
    assert_eq!(zeros.to_f32(), [0.0; 4]);
    // An exponent beyond what f32 can hold is cut, not wrapped.
    let least = f32::from_bits(1);
    let sent = HostTensor::from_f32(&[least, -least], vec![1, 2], WireDType::F16);
    assert_eq!(sent.to_f32(), [least, -least]);
}

#[test]
fn rounding_is_measured_where_it_happens() {
    let values: Vec<f32> = (0..300 * 80).map(|i| (i as f32 * 0.37).sin()).collect();
    let error = |dtype| {
        let sent = HostTensor::from_f32(&values, vec![300, 80], dtype);
        let came = sent.to_f32();
        let mut all = Rounding::default();
        all.add(&values, &came);
        let (sample, all) = (sent.rounding().relative_error(), all.relative_error());
        assert!((sample - all).abs() <= 0.1 * all, "{dtype:?}: {sample} of {all}");
        let came = HostTensor::from_proto(Some(sent.into_proto())).unwrap();
        assert_eq!(came.rounding(), Rounding::default());
        sample
    };
    assert_eq!(error(WireDType::F32), 0.0);
    let (bf16, f16, int8) = (error(WireDType::Bf16), error(WireDType::F16), error(WireDType::Int8));
    println!("bf16 {bf16:e}, f16 {f16:e}, int8 {int8:e}");
    assert!((1e-3..3e-3).contains(&bf16));
    assert!((1e-4..4e-4).contains(&f16));
    assert!((1e-3..5e-3).contains(&int8));
}

#[test]
fn a_shape_without_end_is_refused_and_not_repeated() {
    let tensor =
        |n| v1::Tensor { dtype: 1, shape: vec![1; n], data: bytes(4), ..Default::default() };
    assert!(HostTensor::from_proto(Some(tensor(8))).is_ok());
    for n in [9, 1_000_000] {
        let error = HostTensor::from_proto(Some(tensor(n))).unwrap_err();
        let text = format!("a tensor has {n} dimensions, at most 8 are taken");
        assert_eq!(error.to_string(), text);
    }
}

/// Found by fuzzing: no bytes, and dimensions whose product, or whose buffers, are beyond any memory.
#[test]
fn a_tensor_without_elements_is_refused_whatever_its_other_dimensions() {
    for dtype in 1..=4 {
        for shape in [vec![0, 1 << 31], vec![0, u32::MAX, u32::MAX], vec![u32::MAX, 0], vec![0]] {
            let scale_exponent = (dtype == 3).then_some(0);
            let tensor = v1::Tensor { dtype, shape, scale_exponent, ..Default::default() };
            let error = HostTensor::from_proto(Some(tensor)).unwrap_err();
            assert!(error.to_string().contains("has no elements"), "{error}");
        }
    }
}

#[test]
fn wrong_length_is_named() {
    let error = HostTensor::new(vec![2, 3], Payload::Bf16(bytes(13))).unwrap_err();
    assert_eq!(error.to_string(), "a tensor of shape [2, 3] in bf16 has 12 bytes, 13 came");
    let huge = vec![u32::MAX as usize; 4];
    assert!(matches!(
        HostTensor::new(huge, Payload::F32(Bytes::new())),
        Err(TensorError::TooLarge { .. })
    ));
}

#[test]
fn every_field_is_checked() {
    let text = |tensor: v1::Tensor| {
        HostTensor::from_proto(Some(tensor)).expect_err("it is malformed").to_string()
    };
    let good = |dtype| {
        let mut values = vec![1.0; 3 * 70];
        values[5] = 100.0;
        HostTensor::from_f32(&values, vec![3, 70], dtype).into_proto()
    };
    let (f16, int8) = (good(WireDType::F16), good(WireDType::Int8));
    assert_eq!(int8.outlier_channels, [5]);
    let scales = |index: usize, scale: f32| {
        let mut bytes = int8.block_scales.to_vec();
        bytes[4 * index..][..4].copy_from_slice(&scale.to_le_bytes());
        v1::Tensor { block_scales: bytes.into(), ..int8.clone() }
    };
    let outliers = |channels: &[u32]| v1::Tensor {
        outlier_channels: channels.to_vec(),
        outlier_values: bytes(3 * 2 * channels.len()),
        ..int8.clone()
    };
    assert!(HostTensor::from_proto(Some(outliers(&[0, 69]))).is_ok());
    let exponent = |scale_exponent| v1::Tensor { scale_exponent, ..f16.clone() };
    for (tensor, says) in [
        (exponent(None), "without scale_exponent"),
        (exponent(Some(114)), "114, expected -126 to 113"),
        (exponent(Some(-127)), "-127"),
        (scales(4, f32::NAN), "block_scales[4] is NaN"),
        (scales(1, -1.0), "block_scales[1] is -1e0"),
        (scales(0, 1e37), "block_scales[0]"),
        (v1::Tensor { block_scales: bytes(20), ..int8.clone() }, "24 bytes of block_scales, 20"),
        (v1::Tensor { outlier_values: bytes(4), ..int8.clone() }, "6 bytes of outlier_values, 4"),
        (outliers(&[7, 7]), "[7, 7]"),
        (outliers(&[7, 2]), "[7, 2]"),
        (outliers(&[70]), "below 70"),
        (outliers(&[1, 2, 3]), "3 outlier_channels came, at most 2"),
        (v1::Tensor { shape: vec![210], ..int8.clone() }, "[210]"),
        (v1::Tensor { data: bytes(209), ..int8.clone() }, "210 bytes, 209 came"),
        (v1::Tensor { dtype: 2, ..f16.clone() }, "scale_exponent came with a tensor in bf16"),
        (v1::Tensor { block_scales: bytes(4), ..f16.clone() }, "block_scales"),
        (v1::Tensor { outlier_channels: vec![1], ..f16.clone() }, "outlier_channels"),
        (v1::Tensor { outlier_values: bytes(2), ..f16.clone() }, "outlier_values"),
    ] {
        let text = text(tensor);
        assert!(text.contains(says), "{says:?} is not in {text:?}");
    }
}
