//! A run in each wire dtype stays beside the one in float32.

use super::{Place, run};
use offshoot_client::WireDType;
use offshoot_tests::TestServer;
use std::fs;

#[tokio::test(flavor = "multi_thread")]
async fn every_wire_dtype_trains() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let mut straight = Vec::new();
    // f32 first.
    for dtype in WireDType::ALL {
        let name = dtype.name();
        let mut options = place.options(&server, name);
        options.compute.wire_dtype = dtype;
        options.steps.max_steps = Some(20);
        let losses = run(options).await.losses;
        if straight.is_empty() {
            straight = losses.clone();
        }
        let far = losses.iter().zip(&straight).map(|(loss, exact)| (loss / exact - 1.0).abs());
        let far = far.fold(0.0, f64::max);
        println!("{name}: {far:e} from f32; {losses:?}");
        // Far below what training itself does: the loss falls by two fifths.
        let most = match dtype {
            WireDType::F32 => 0.0,
            WireDType::F16 => 5e-4,
            WireDType::Bf16 => 2e-3,
            WireDType::Int8 => 3e-3,
        };
        assert!(far <= most, "{name}: {far:e}");
        assert!(losses[19] < 0.7 * losses[0], "{name}: {losses:?}");

        let metrics = place.dir.path().join(name).join("metrics.jsonl");
        let done = fs::read_to_string(metrics).unwrap().lines().last().unwrap().to_string();
        let done: serde_json::Value = serde_json::from_str(&done).unwrap();
        for part in ["hidden_sent", "hidden_received", "gradients_sent", "gradients_received"] {
            let error = done["wire_error"][part].as_f64().unwrap();
            assert_eq!(error > 0.0, dtype != WireDType::F32, "{name}: {done}");
            assert!(error < 3e-2, "{name}: {done}");
        }
    }
    server.drain().await;
}
