//! How the client computes changes nothing of a run: on several devices, with layers that are
//! computed again; and in bfloat16 it stays near.

use super::overlap::assert_same_runs;
use super::{N_STEPS, Place, assert_same_adapters, run};
use offshoot_tests::TestServer;
use offshoot_trainer::adapter::Adapter;
use offshoot_trainer::{Checkpointing, TrainOptions};
use tch::{Device, Kind};

/// Five steps of four microbatches, the last of each epoch with fewer and smaller ones.
fn options(place: &Place, server: &TestServer, output: &str, in_flight: usize) -> TrainOptions {
    let mut options = place.options(server, output);
    options.steps.batch_size = Some(2);
    options.steps.gradient_accumulation_steps = 4;
    options.steps.max_steps = Some(5);
    options.steps.microbatches_in_flight = in_flight;
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn more_devices_change_no_number() {
    // LoRA in bottom and top, in the top only, in the bottom only.
    for (split_point_1, split_point_2) in [(1, 3), (0, 3), (1, 4)] {
        let place = Place::new();
        let mut config = place.server();
        (config.model.split_point_1, config.model.split_point_2) = (split_point_1, split_point_2);
        let server = TestServer::start_with(config).await;
        let straight = run(options(&place, &server, "one", 1)).await;
        for (n_devices, in_flight) in [(2, 2), (2, 4), (3, 4), (3, 1)] {
            let output = format!("devices-{n_devices}-in-flight-{in_flight}");
            let mut options = options(&place, &server, &output, in_flight);
            options.compute.devices = vec![Device::Cpu; n_devices];
            let several = run(options).await;
            println!("{split_point_1}..{split_point_2}, {output}: {:?}", several.losses);
            assert_same_runs(&several, &straight);
        }
        server.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_with_another_number_of_devices() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(place.options(&server, "straight")).await;
    let adapter = straight.adapter.clone().unwrap();
    let mut from = straight.checkpoint.with_file_name("checkpoint_step_4");
    for n_devices in [2, 3, 1] {
        let mut options = place.options(&server, &format!("devices-{n_devices}"));
        options.compute.devices = vec![Device::Cpu; n_devices];
        options.output.resume = Some(from.display().to_string());
        let resumed = run(options).await;
        assert_eq!(resumed.losses, straight.losses[4..]);
        assert_same_adapters(resumed.adapter.as_ref().unwrap(), &adapter);
        // A checkpoint that this many devices have written: there is one of every fourth step.
        let own = resumed.checkpoint.with_file_name("checkpoint_step_8");
        assert!(own.exists() && resumed.step == N_STEPS);
        from = straight.checkpoint.with_file_name("checkpoint_step_4");
    }
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_computed_again_change_no_number() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let straight = run(options(&place, &server, "kept", 2)).await;
    let mut again = options(&place, &server, "again", 2);
    again.compute.checkpointing = Checkpointing::On;
    assert_same_runs(&run(again).await, &straight);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bfloat16_layers_train_a_float32_adapter() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let exact = run(place.options(&server, "f32")).await.losses;
    let mut options = place.options(&server, "bf16");
    options.compute.kind = Kind::BFloat16;
    let rounded = run(options).await.losses;
    println!("f32 {exact:?}\nbf16 {rounded:?}");
    assert_ne!(rounded, exact);
    for (rounded, exact) in rounded.iter().zip(&exact) {
        assert!((rounded / exact - 1.0).abs() < 1e-2, "{rounded} {exact}");
    }

    // Steps far smaller than bfloat16 can tell apart are not lost.
    let mut options = place.options(&server, "small-steps");
    options.compute.kind = Kind::BFloat16;
    options.optimizer.learning_rate = 1e-6;
    options.output.save_interval = 1;
    options.steps.max_steps = Some(4);
    let last = run(options).await.checkpoint;
    let before = Adapter::read(&last.with_file_name("checkpoint_step_2")).unwrap();
    let after = Adapter::read(&last).unwrap();
    for (name, after) in after.tensors.iter().filter(|(name, _)| name.contains("lora_A")) {
        let (_, before) = before.tensors.iter().find(|(other, _)| other == name).unwrap();
        assert_eq!(after.kind(), Kind::Float);
        let moved = (after - before).abs();
        assert!(moved.max().double_value(&[]) < 1e-5, "{name}");
        let share = moved.gt(0.0).mean(Kind::Float).double_value(&[]);
        assert!(share > 0.9, "{name}: only {share} of it moved");
    }
    server.drain().await;
}
