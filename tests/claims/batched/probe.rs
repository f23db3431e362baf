//! A probe trains while others come, step, evaluate, fail, leave the device, return and go. Each of
//! its jobs shares its batch with two of theirs.

use crate::{F32, llama, smooth, store, tensors};
use offshoot_client::{Client, ExportedAdapter, ForwardInput, LoraConfig, OpenSession, WireDType};
use offshoot_client::{ClientError, HostTensor, SessionId};
use offshoot_tests::TestServer;
use offshoot_tests::run::open_request;
use offshoot_tests::together::Turn::{self, Backward, Evaluate, Forward};
use offshoot_tests::together::{N_TOKENS, Player, distance, phase, step};

const ROUNDS: usize = 10;
/// So long without a frame, and a session leaves the device.
const IDLE_SECONDS: f64 = 0.3;

async fn open(client: &Client, seed: u64, r: u32) -> Player {
    begin(client, request(client, seed, r).await).await
}

/// One whose adapter multiplies by 1e50: its forwards overflow.
async fn open_wild(client: &Client, seed: u64, r: u32) -> Player {
    let mut request = request(client, seed, r).await;
    let model = client.open(request.clone()).await.unwrap();
    let exported = model.export().await.unwrap();
    model.close(true).await.unwrap();
    let large = |t: &HostTensor| {
        HostTensor::from_f32(&vec![1e25; t.to_f32().len()], t.shape().to_vec(), t.dtype())
    };
    let tensors = exported.tensors.iter().map(|(name, t)| (name.clone(), large(t)));
    request.initial_adapter = tensors.collect();
    begin(client, request).await
}

async fn begin(client: &Client, request: OpenSession) -> Player {
    let (seed, hidden_size) = (request.seed, client.describe().await.unwrap().hidden_size);
    Player::new(client.open(request).await.unwrap(), hidden_size, seed)
}

async fn request(client: &Client, seed: u64, r: u32) -> OpenSession {
    let lora = LoraConfig {
        r,
        lora_alpha: 2.0 * f64::from(r),
        lora_dropout: 0.1,
        use_rslora: false,
        target_modules: vec!["all-linear".into()],
    };
    let request = open_request(client).await.unwrap();
    OpenSession { lora, adamw: smooth(), seed, ..request }
}

/// What the probe does in the three phases of a round.
const PROBE: [Turn; 3] = [Evaluate, Forward, Backward];

/// The probe by itself.
async fn alone() -> (Player, ExportedAdapter) {
    let folder = store();
    let server = TestServer::start_with(llama(1, folder.path())).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let mut probe = open(&client, 0, 3).await;
    for _ in 0..ROUNDS {
        for turn in PROBE {
            phase(&mut [&mut probe], |_| turn).await.remove(0).unwrap();
        }
        step(&mut [&mut probe]).await;
    }
    let adapter = probe.session.export().await.unwrap();
    server.drain().await;
    (probe, adapter)
}

/// A round of the probe with two others: both train; in the second phase `guest`, if there is one,
/// takes the place of the second. What the guest got.
async fn round(
    probe: &mut Player,
    [first, second]: [&mut Player; 2],
    guest: Option<(&mut Player, Turn)>,
) -> Option<ClientError> {
    let turn = |i| if i == 0 { PROBE[0] } else { Forward };
    for result in phase(&mut [&mut *probe, &mut *first, &mut *second], turn).await {
        result.unwrap();
    }
    let (third, of_third) = guest.unwrap_or((&mut *second, Evaluate));
    let turn = |i| [PROBE[1], Evaluate, of_third][i];
    let mut results = phase(&mut [&mut *probe, &mut *first, third], turn).await;
    let of_guest = results.pop().unwrap().err();
    results.into_iter().for_each(|result| result.unwrap());
    for result in phase(&mut [&mut *probe, &mut *first, &mut *second], |_| Backward).await {
        result.unwrap();
    }
    step(&mut [probe, first, second]).await;
    of_guest
}

/// Frames that the server refuses before they come near a batch.
async fn be_refused(player: &Player) {
    let h = player.hidden_size;
    let good = |value| ForwardInput {
        hidden: HostTensor::from_f32(&vec![value; N_TOKENS * h], vec![N_TOKENS, h], WireDType::F32),
        seq_lens: vec![N_TOKENS as u32],
        position_ids: vec![],
        want_input_grad: true,
        dropout_key: 1,
    };
    let not_finite = good(f32::NAN);
    let short = ForwardInput { seq_lens: vec![3], ..good(0.5) };
    for bad in [not_finite, short] {
        let error = player.session.forward(bad).await.unwrap_err();
        assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    }
}

/// Until the session has left the device.
async fn until_gone(client: &Client, id: &SessionId) {
    loop {
        let all = client.list_sessions().await.unwrap();
        let session = all.iter().find(|session| session.id == *id).unwrap();
        if session.adapter_bytes == 0 {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_does_not_notice() {
    let (expected, expected_adapter) = alone().await;

    let folder = store();
    let mut config = llama(3, folder.path());
    config.session.idle_seconds = IDLE_SECONDS;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let mut probe = open(&client, 0, 3).await;
    let mut first = open(&client, 1, 16).await;
    let mut second = open(&client, 2, 1).await;
    // They train.
    for _ in 0..2 {
        round(&mut probe, [&mut first, &mut second], None).await;
    }
    // One goes for ever, another one comes.
    first.session.close(true).await.unwrap();
    first = open(&client, 3, 9).await;
    round(&mut probe, [&mut first, &mut second], None).await;
    // One is refused between its frames.
    be_refused(&second).await;
    round(&mut probe, [&mut first, &mut second], None).await;
    // One fails within the probe's batch.
    let mut wild = open_wild(&client, 4, 2).await;
    let error = round(&mut probe, [&mut first, &mut second], Some((&mut wild, Forward))).await;
    println!("beside the probe: {}", error.unwrap());
    // One goes with a microbatch open, without a word.
    let mut careless = open(&client, 5, 2).await;
    let guest = Some((&mut careless, Forward));
    assert!(round(&mut probe, [&mut first, &mut second], guest).await.is_none());
    drop(careless);
    // Two leave the device for being idle, the probe with them or not, and come back.
    until_gone(&client, first.session.id()).await;
    until_gone(&client, second.session.id()).await;
    for _ in 0..2 {
        round(&mut probe, [&mut first, &mut second], None).await;
    }
    // One is parked by hand and restored.
    let id = second.session.id().clone();
    let seed = second.seed;
    second.session.close(false).await.unwrap();
    let (session, _) = client.restore(&id, None).await.unwrap();
    second = Player::new(session, probe.hidden_size, seed);
    for _ in 0..2 {
        round(&mut probe, [&mut first, &mut second], None).await;
    }

    assert!(probe.batch_jobs.iter().all(|n| *n == 3), "{:?}", probe.batch_jobs);
    let adapter = probe.session.export().await.unwrap();
    assert_eq!(adapter.step, ROUNDS as u64);
    let numbers = distance(&probe.numbers, &expected.numbers);
    let adapter = distance(&tensors(&adapter), &tensors(&expected_adapter));
    println!("largest difference: numbers {numbers:.1e}, adapter {adapter:.1e}");
    assert!(numbers < F32 && adapter < F32, "numbers {numbers:.1e}, adapter {adapter:.1e}");
}
