//! One training step with random hidden states against any server:
//!
//! ```text
//! cargo run -p offshoot-client --example one_step -- 127.0.0.1:50051
//! ```

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ForwardInput, HostTensor, LoraConfig, OpenSession, WireDType,
};
use std::error::Error;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let endpoint = std::env::args().nth(1).unwrap_or("127.0.0.1:50051".into());
    let client = Client::connect(&endpoint).await?;
    let server = client.describe().await?;
    println!(
        "{} ({}): layers {}..{} of {} on {}",
        server.model_name,
        server.model_type,
        server.split_point_1,
        server.split_point_2,
        server.n_layers,
        server.device
    );

    let session = client
        .open(OpenSession {
            name: "one step".into(),
            fingerprint: server.fingerprint,
            split_point_1: server.split_point_1,
            split_point_2: server.split_point_2,
            lora: LoraConfig { r: 8, lora_alpha: 16.0, ..Default::default() },
            adamw: ADAMW_DEFAULTS,
            seed: 1,
            wire_dtype: WireDType::F32,
            initial_adapter: vec![],
        })
        .await?;
    println!("session {} with {} parameters", session.id(), session.adapter_parameters());

    let h = server.hidden_size;
    let values: Vec<f32> = (0..16 * h).map(|_| rand::random::<f32>() - 0.5).collect();
    let hidden = HostTensor::from_f32(&values, vec![16, h], WireDType::F32);
    let input = ForwardInput {
        hidden,
        seq_lens: vec![6, 10],
        position_ids: vec![],
        want_input_grad: true,
        dropout_key: 1,
    };

    let (output, microbatch, report) = session.forward(input.clone()).await?;
    println!(
        "forward: {:.1?}, of which queue {:.1?} and execute {:.1?}; tape of {} bytes",
        report.round_trip, report.queue, report.execute, report.tape_bytes
    );
    // The loss is half the sum of squares, so its gradient is the output itself.
    let gradients = microbatch.backward(output.clone()).await?;
    println!(
        "backward: {:.1?}, norm of the LoRA gradients {:.4}",
        gradients.report.round_trip,
        gradients.norm_squared.sqrt()
    );
    let step = session.step(1e-3, 1.0).await?.await?;
    let after = session.evaluate(input).await?;
    println!("loss before {:.6}, after step {step} {:.6}", loss(&output), loss(&after));

    let adapter = session.export().await?;
    println!("{} tensors exported", adapter.tensors.len());
    session.close(true).await?;
    Ok(())
}

fn loss(output: &HostTensor) -> f64 {
    output.to_f32().iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 2.0
}
