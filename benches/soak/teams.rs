use offshoot_benches::normal;
use offshoot_client::{
    ADAMW_DEFAULTS, Client, ClientError, ClientOptions, ForwardInput, LoraConfig, OpenSession,
    Session, Token, WireDType,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::task::JoinHandle;

const SEQUENCES: usize = 2;
const TOKENS: usize = 64;

/// A tenant that trains as ever.
pub struct Team {
    /// Tokens that were trained on.
    pub n_tokens: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    task: JoinHandle<Result<(), ClientError>>,
}

impl Team {
    pub async fn start(name: &str, endpoint: &str, token: &str) -> anyhow::Result<Team> {
        let client = Client::connect_with(endpoint, options(token)?).await?;
        let session = open(&client, name, 8).await?;
        let hidden_size = client.describe().await?.hidden_size;
        let (n_tokens, ends) = <(Arc<AtomicU64>, Arc<AtomicBool>)>::default();
        let (counted, ended) = (n_tokens.clone(), ends.clone());
        let task = tokio::spawn(async move {
            train(&session, hidden_size, &counted, &ended).await?;
            session.close(true).await.map(drop)
        });
        Ok(Team { n_tokens, ends, task })
    }

    /// Fails if anything of what it did failed.
    pub async fn end(self) -> anyhow::Result<()> {
        self.ends.store(true, Ordering::Relaxed);
        Ok(self.task.await??)
    }
}

pub fn options(token: &str) -> anyhow::Result<ClientOptions> {
    Ok(ClientOptions { token: Some(Token::new(token)?), ..ClientOptions::default() })
}

pub async fn open(client: &Client, name: &str, r: u32) -> Result<Session, ClientError> {
    let server = client.describe().await?;
    let lora = LoraConfig { r, lora_alpha: 2.0 * f64::from(r), ..Default::default() };
    client
        .open(OpenSession {
            name: name.into(),
            fingerprint: server.fingerprint,
            split_point_1: server.split_point_1,
            split_point_2: server.split_point_2,
            lora,
            adamw: ADAMW_DEFAULTS,
            seed: 1,
            wire_dtype: WireDType::F32,
            initial_adapter: vec![],
        })
        .await
}

pub fn input(hidden_size: usize) -> ForwardInput {
    ForwardInput {
        hidden: normal(SEQUENCES * TOKENS, hidden_size, WireDType::F32, 1),
        seq_lens: vec![TOKENS as u32; SEQUENCES],
        position_ids: vec![],
        want_input_grad: true,
        dropout_key: 0,
    }
}

async fn train(
    session: &Session,
    hidden_size: usize,
    n_tokens: &AtomicU64,
    ends: &AtomicBool,
) -> Result<(), ClientError> {
    let input = input(hidden_size);
    let grad = normal(SEQUENCES * TOKENS, hidden_size, WireDType::F32, 2);
    while !ends.load(Ordering::Relaxed) {
        let (_, microbatch, _) = session.forward(input.clone()).await?;
        microbatch.backward(grad.clone()).await?;
        session.step(1e-5, 1e-3).await?;
        n_tokens.fetch_add((SEQUENCES * TOKENS) as u64, Ordering::Relaxed);
    }
    Ok(())
}
