//! A tenant is alone: sessions with other ranks, alphas and targets that train at the same time end
//! with the adapters that each gets alone, bit for bit.

use offshoot_client::{Client, ExportedAdapter, LoraConfig};
use offshoot_tests::run::{assert_same_adapter, open_request, train};
use offshoot_tests::{TestServer, fixture, server_config};
use std::sync::Arc;
use tokio::sync::Barrier;

const STEPS: u64 = 6;

fn settings() -> [LoraConfig; 4] {
    let lora = |r, lora_alpha, lora_dropout, use_rslora, targets: &[&str]| LoraConfig {
        r,
        lora_alpha,
        lora_dropout,
        use_rslora,
        target_modules: targets.iter().map(|&t| t.into()).collect(),
    };
    [
        lora(2, 4.0, 0.0, false, &["all-linear"]),
        lora(5, 3.0, 0.1, false, &["q_proj", "v_proj"]),
        lora(1, 8.0, 0.3, true, &["down_proj"]),
        lora(16, 32.0, 0.05, false, &["self_attn.o_proj", "gate_proj", "up_proj"]),
    ]
}

/// One session's whole life, begun when everybody at `start` is there.
async fn tenant(client: Client, number: u64, start: Arc<Barrier>) -> ExportedAdapter {
    let mut open = open_request(&client).await.unwrap();
    open.lora = settings()[number as usize].clone();
    open.seed = number;
    let session = client.open(open).await.unwrap();
    start.wait().await;
    train(&session, 40, number * 100..number * 100 + STEPS).await.unwrap();
    let adapter = session.export().await.unwrap();
    session.close(true).await.unwrap();
    adapter
}

#[tokio::test(flavor = "multi_thread")]
async fn batched_equals_alone() {
    let store = tempfile::tempdir().unwrap();
    let mut config = server_config(store.path());
    config.model.name = fixture("llama").display().to_string();
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();

    let mut alone = Vec::new();
    for number in 0..4 {
        alone.push(tenant(client.clone(), number, Arc::new(Barrier::new(1))).await);
    }
    let start = Arc::new(Barrier::new(4));
    let together = (0..4)
        .map(|number| tokio::spawn(tenant(client.clone(), number, start.clone())))
        .collect::<Vec<_>>();
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!(alone.step, STEPS);
        assert_same_adapter(&together.await.unwrap(), alone);
    }
    server.drain().await;
}
