//! Two healthy sessions share every batch with a third one that is not: their numbers do not change.

use crate::{F32, llama, smooth, store};
use offshoot_client::{Client, ClientError, ErrorCode, HostTensor, LoraConfig, OpenSession};
use offshoot_tests::TestServer;
use offshoot_tests::run::open_request;
use offshoot_tests::together::Turn::{Backward, Evaluate, Forward};
use offshoot_tests::together::{Player, distance, phase, step};

/// What is wrong with the third one.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sickness {
    /// Finite rows of 1e30: their squares are not.
    Rows,
    /// A gradient of 1e36.
    Gradient,
    /// An adapter that multiplies by 1e50.
    LargeAdapter,
    /// A step with a learning rate of 1e300, which would leave an adapter full of NaN. It is refused and
    /// changes nothing: the one that asked goes on in health.
    HugeStep,
}

const ALL: [Sickness; 4] =
    [Sickness::Rows, Sickness::Gradient, Sickness::LargeAdapter, Sickness::HugeStep];

async fn request(client: &Client, seed: u64) -> OpenSession {
    let lora = LoraConfig {
        r: 2 + seed as u32,
        lora_alpha: 4.0,
        lora_dropout: 0.1,
        use_rslora: false,
        target_modules: vec!["all-linear".into()],
    };
    OpenSession { lora, adamw: smooth(), seed, ..open_request(client).await.unwrap() }
}

async fn open(client: &Client, request: OpenSession) -> Player {
    let hidden_size = client.describe().await.unwrap().hidden_size;
    let seed = request.seed;
    Player::new(client.open(request).await.unwrap(), hidden_size, seed)
}

async fn sick(client: &Client, sickness: Sickness) -> Player {
    let mut request = request(client, 7).await;
    if sickness == Sickness::LargeAdapter {
        let model = client.open(request.clone()).await.unwrap();
        let large = |t: &HostTensor| {
            HostTensor::from_f32(&vec![1e25; t.to_f32().len()], t.shape().to_vec(), t.dtype())
        };
        let exported = model.export().await.unwrap();
        let tensors = exported.tensors.iter().map(|(name, t)| (name.clone(), large(t)));
        request.initial_adapter = tensors.collect();
        model.close(true).await.unwrap();
    }
    let mut player = open(client, request).await;
    match sickness {
        Sickness::Rows => player.rows_scale = 1e30,
        Sickness::Gradient => player.gradient_scale = 1e38,
        Sickness::LargeAdapter => {}
        Sickness::HugeStep => {
            let error = player.session.step(1e300, 1.0).await.unwrap().await.unwrap_err();
            assert_eq!(error.code(), Some(ErrorCode::Invalid), "{error}");
            assert!(error.to_string().contains("adapter after this Step is not finite"), "{error}");
        }
    }
    player
}

/// One round of the healthy ones, an evaluation, a forward and a backward, each with one more in
/// the batch. What the sick one got.
async fn round(
    healthy: &mut [Player; 2],
    spare: &mut Player,
    sick: &mut Player,
    sickness: Sickness,
) -> Result<(), ClientError> {
    let [first, second] = healthy;
    let of_gradient = sickness == Sickness::Gradient;
    // The sick one's bad job is its backward, or else its forward; the spare one fills the places
    // that it leaves empty.
    let opener = if of_gradient { &mut *sick } else { &mut *spare };
    let turn = |i| if i < 2 { Evaluate } else { Forward };
    let results = phase(&mut [&mut *first, &mut *second, opener], turn).await;
    results.into_iter().for_each(|result| result.unwrap());

    let guest = if of_gradient { &mut *spare } else { &mut *sick };
    let turn = |i| if i == 2 && of_gradient { Evaluate } else { Forward };
    let mut results = phase(&mut [&mut *first, &mut *second, guest], turn).await;
    let of_forward = results.pop().unwrap();
    results.into_iter().for_each(|result| result.unwrap());

    let closer = if of_gradient { &mut *sick } else { &mut *spare };
    let mut results = phase(&mut [&mut *first, &mut *second, closer], |_| Backward).await;
    let of_backward = results.pop().unwrap();
    results.into_iter().for_each(|result| result.unwrap());
    step(&mut [first, second]).await;
    if of_gradient { of_backward } else { of_forward }
}

/// The healthy ones' rounds without anybody else.
async fn reference(n_rounds: usize) -> [Player; 2] {
    let folder = store();
    let server = TestServer::start_with(llama(2, folder.path())).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let mut healthy = [
        open(&client, request(&client, 0).await).await,
        open(&client, request(&client, 1).await).await,
    ];
    for _ in 0..n_rounds {
        let [first, second] = &mut healthy;
        for turn in [Evaluate, Forward, Backward] {
            let results = phase(&mut [&mut *first, &mut *second], |_| turn).await;
            results.into_iter().for_each(|result| result.unwrap());
        }
        step(&mut [first, second]).await;
    }
    server.drain().await;
    healthy
}

#[tokio::test(flavor = "multi_thread")]
async fn nan_stays_home() {
    let expected = reference(2 * ALL.len()).await;

    let folder = store();
    let server = TestServer::start_with(llama(3, folder.path())).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let mut healthy = [
        open(&client, request(&client, 0).await).await,
        open(&client, request(&client, 1).await).await,
    ];
    let mut spare = open(&client, request(&client, 2).await).await;
    for sickness in ALL {
        let mut sick = sick(&client, sickness).await;
        for _ in 0..2 {
            let result = round(&mut healthy, &mut spare, &mut sick, sickness).await;
            match (sickness, result) {
                // The norms make nothing of such rows: what comes back is finite, and its own.
                (Sickness::Rows | Sickness::HugeStep, Ok(())) => {}
                (_, Err(error @ ClientError::Refused { .. })) => {
                    println!("{sickness:?}: {error}");
                    assert_eq!(error.code(), Some(ErrorCode::Invalid), "{sickness:?}: {error}");
                }
                (_, other) => panic!("{sickness:?}: {other:?}"),
            }
        }
        sick.session.close(true).await.unwrap();
    }
    for (found, expected) in healthy.iter().zip(&expected) {
        assert!(found.batch_jobs.iter().all(|n| *n == 3), "{:?}", found.batch_jobs);
        let far = distance(&found.numbers, &expected.numbers);
        println!("largest difference: {far:.1e}");
        assert!(far < F32, "{far:.1e}");
    }
    server.drain().await;
}
