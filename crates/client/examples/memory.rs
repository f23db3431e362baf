//! What sessions cost a server: opens some, then one microbatch of 512 tokens, and prints the
//! server's own figures after each. `memory HOST:PORT [SESSIONS]`. See benches/README.md.

use offshoot_client::{
    ADAMW_DEFAULTS, Client, ForwardInput, HostTensor, LoraConfig, OpenSession, WireDType,
};

const SEQUENCES: [u32; 4] = [128; 4];

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let endpoint = args.next().ok_or("usage: memory HOST:PORT [SESSIONS]")?;
    let n_sessions: usize = args.next().map_or(Ok(4), |n| n.parse())?;
    let client = Client::connect(&endpoint).await?;
    let server = client.describe().await?;
    report(&client, "no session").await?;

    let mut sessions = Vec::new();
    for i in 1..=n_sessions {
        let session = client
            .open(OpenSession {
                name: format!("memory {i}"),
                fingerprint: server.fingerprint.clone(),
                split_point_1: server.split_point_1,
                split_point_2: server.split_point_2,
                lora: LoraConfig { r: 8, lora_alpha: 16.0, ..Default::default() },
                adamw: ADAMW_DEFAULTS,
                seed: i as u64,
                wire_dtype: WireDType::Bf16,
                initial_adapter: vec![],
            })
            .await?;
        sessions.push(session);
        report(&client, &format!("{i} sessions, rank 8")).await?;
    }
    let n_tokens = SEQUENCES.iter().sum::<u32>() as usize;
    let values = vec![0.5; n_tokens * server.hidden_size];
    let shape = vec![n_tokens, server.hidden_size];
    let input = ForwardInput {
        hidden: HostTensor::from_f32(&values, shape, WireDType::Bf16),
        seq_lens: SEQUENCES.to_vec(),
        position_ids: vec![],
        want_input_grad: false,
        dropout_key: 1,
    };
    let (output, microbatch, _) = sessions[0].forward(input).await?;
    report(&client, &format!("one open microbatch of {n_tokens} tokens")).await?;
    microbatch.backward(output).await?;
    report(&client, "after its backward").await?;
    for session in sessions {
        session.close(true).await?;
    }
    report(&client, "all sessions closed").await
}

async fn report(client: &Client, when: &str) -> Result<(), Box<dyn std::error::Error>> {
    let m = client.describe().await?.memory;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{when:36} resident {:6.1} MB: weights {:5.1}, adapters {:5.1}, tapes {:5.1}",
        mb(m.resident_bytes),
        mb(m.weights_bytes),
        mb(m.adapter_bytes),
        mb(m.tape_bytes)
    );
    Ok(())
}
