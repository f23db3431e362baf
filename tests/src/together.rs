//! Sessions that move in lock-step, so that their jobs certainly share batches.
//!
//! Each [`Player`] sends one job of [`N_TOKENS`] in each phase, and nobody goes on before all are
//! answered. On a server from [`server_for`] so many players fill a batch exactly: it begins as soon
//! as the last job is there, and never without it.

use crate::run::values;
use crate::server_config;
use offshoot_client::{
    ClientError, ForwardInput, FrameReport, Gradients, HostTensor, Microbatch, PendingEvaluate,
    PendingForward, Session, WireDType,
};
use offshoot_server::ServerConfig;
use std::collections::VecDeque;
use std::path::Path;

/// Tokens of every microbatch here.
pub const N_TOKENS: usize = 11;

/// How they divide into sequences, in turn.
const SEQ_LENS: [&[u32]; 5] = [&[5, 2, 4], &[3, 8], &[11], &[1, 1, 9], &[4, 4, 3]];

/// A server that waits for `n_players` jobs before each forward and backward.
pub fn server_for(n_players: usize, store: &Path) -> ServerConfig {
    let mut config = server_config(store);
    config.limits.max_tokens_per_batch = n_players * N_TOKENS;
    // Never over in a test that passes: the last job comes as soon as its client is asked for it.
    config.limits.batch_wait_seconds = 10.0;
    config
}

/// One client and everything that it saw.
pub struct Player {
    pub session: Session,
    pub hidden_size: usize,
    /// What it sends is a function of this and of how many microbatches it sent before.
    pub seed: u64,
    /// What its rows are multiplied with.
    pub rows_scale: f32,
    /// What its gradients are multiplied with.
    pub gradient_scale: f32,
    n_sent: u64,
    /// Microbatches without their backward, the oldest first.
    open: VecDeque<(Microbatch, HostTensor)>,
    /// Outputs, gradients and norms, in their order.
    pub numbers: Vec<(String, Vec<f32>)>,
    /// Jobs in the batch of each of its frames.
    pub batch_jobs: Vec<u32>,
    /// What each of its training forwards left on the device, when it ended.
    pub tape_bytes: Vec<u64>,
}

/// What a player does in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Forward,
    Evaluate,
    /// Of its oldest open microbatch.
    Backward,
}

enum Pending {
    Forward(PendingForward),
    Evaluate(PendingEvaluate),
    Backward(offshoot_client::PendingBackward),
}

impl Player {
    pub fn new(session: Session, hidden_size: usize, seed: u64) -> Player {
        Player {
            session,
            hidden_size,
            seed,
            rows_scale: 1.0,
            gradient_scale: 1.0,
            n_sent: 0,
            open: VecDeque::new(),
            numbers: Vec::new(),
            batch_jobs: Vec::new(),
            tape_bytes: Vec::new(),
        }
    }

    /// The next microbatch's rows.
    pub fn input(&mut self) -> ForwardInput {
        let key = self.seed << 32 | self.n_sent;
        let seq_lens = SEQ_LENS[(self.seed + self.n_sent) as usize % SEQ_LENS.len()].to_vec();
        self.n_sent += 1;
        let mut hidden = values(key, N_TOKENS * self.hidden_size);
        hidden.iter_mut().for_each(|v| *v *= self.rows_scale);
        let shape = vec![N_TOKENS, self.hidden_size];
        ForwardInput {
            hidden: HostTensor::from_f32(&hidden, shape, WireDType::F32),
            seq_lens,
            position_ids: vec![],
            // Some want the gradient by their input and some do not.
            want_input_grad: self.seed % 3 != 2,
            dropout_key: key,
        }
    }

    async fn send(&mut self, turn: Turn) -> Result<Pending, ClientError> {
        Ok(match turn {
            Turn::Forward => {
                let input = self.input();
                Pending::Forward(self.session.send_forward(input).await?)
            }
            Turn::Evaluate => {
                let input = self.input();
                Pending::Evaluate(self.session.send_evaluate(input).await?)
            }
            Turn::Backward => {
                let (microbatch, output) = self.open.pop_front().expect("a Forward before");
                // Of a loss that is half the mean square of the output.
                let n = output.shape().iter().product::<usize>() as f32;
                let scale = self.gradient_scale / n;
                let grad: Vec<f32> = output.to_f32().iter().map(|v| v * scale).collect();
                let grad = HostTensor::from_f32(&grad, output.shape().to_vec(), WireDType::F32);
                Pending::Backward(microbatch.send_backward(grad).await?)
            }
        })
    }

    fn see(&mut self, what: &str, tensor: &HostTensor) {
        self.numbers.push((what.into(), tensor.to_f32().to_vec()));
    }

    fn see_backward(&mut self, gradients: &Gradients) {
        if let Some(input) = &gradients.input {
            self.see("input gradient", input);
        }
        let norm = gradients.norm_squared.sqrt() as f32;
        self.numbers.push(("gradient norm".into(), vec![norm]));
    }

    async fn receive(&mut self, pending: Pending) -> Result<FrameReport, ClientError> {
        Ok(match pending {
            Pending::Forward(pending) => {
                let (output, microbatch, report) = pending.await?;
                self.see("output", &output);
                self.tape_bytes.push(report.tape_bytes);
                self.open.push_back((microbatch, output));
                report
            }
            Pending::Evaluate(pending) => {
                let (output, report) = pending.with_report().await?;
                self.see("evaluation", &output);
                report
            }
            Pending::Backward(pending) => {
                let gradients = pending.await?;
                self.see_backward(&gradients);
                gradients.report
            }
        })
    }
}

/// One phase: everybody sends, then everybody waits for its answer. What each got.
pub async fn phase(
    players: &mut [&mut Player],
    turn: impl Fn(usize) -> Turn,
) -> Vec<Result<(), ClientError>> {
    let mut pending = Vec::new();
    for (i, player) in players.iter_mut().enumerate() {
        pending.push(player.send(turn(i)).await);
    }
    let mut results = Vec::new();
    for (player, pending) in players.iter_mut().zip(pending) {
        let result = match pending {
            Ok(pending) => player.receive(pending).await,
            Err(error) => Err(error),
        };
        results.push(result.map(|report| player.batch_jobs.push(report.batch_jobs)));
    }
    results
}

/// One training step of everybody: forwards and evaluations mixed, the other way round, the
/// backwards, then the optimizer. Everybody must succeed.
pub async fn round(players: &mut [&mut Player]) {
    // The same in other company.
    let first: Vec<bool> = players.iter().map(|p| (p.seed + p.n_sent / 2) % 2 == 1).collect();
    for turn in [true, false] {
        let turn = |i: usize| if first[i] == turn { Turn::Evaluate } else { Turn::Forward };
        phase(players, turn).await.into_iter().for_each(|done| done.unwrap());
    }
    phase(players, |_| Turn::Backward).await.into_iter().for_each(|done| done.unwrap());
    step(players).await;
}

/// An optimizer step of everybody.
pub async fn step(players: &mut [&mut Player]) {
    for player in players {
        player.session.step(0.01, 0.5).await.unwrap().await.unwrap();
    }
}

/// The largest difference of two runs' numbers, each relative to the largest value of its tensor.
pub fn distance(found: &[(String, Vec<f32>)], expected: &[(String, Vec<f32>)]) -> f64 {
    let names = |all: &[(String, Vec<f32>)]| all.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    let mut worst = 0f64;
    for ((_, found), (_, expected)) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in found.iter().zip(expected) {
            let d = f64::from((a - b).abs());
            // What is zero in both has no scale; NaN is infinitely far away.
            let far = match d {
                0.0 => 0.0,
                d if d.is_nan() => f64::INFINITY,
                d => d / f64::from(largest),
            };
            worst = worst.max(far);
        }
    }
    worst
}
