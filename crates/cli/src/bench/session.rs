use super::args::{End, Mode, Size};
use offshoot_client::{
    ClientError, ForwardInput, FrameReport, HostTensor, PendingBackward, PendingEvaluate,
    PendingForward, Session,
};
use std::collections::VecDeque;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use tokio::sync::Barrier;
use tokio::time::Instant;

const LEARNING_RATE: f64 = 1e-4;
/// Of the gradients that are sent: small beside hidden states, as real ones are.
const GRADIENT_SCALE: f64 = 1e-3;

/// What every session of a measurement does.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub mode: Mode,
    pub in_flight: usize,
    pub accumulate: usize,
    pub warm_up: u64,
    pub end: End,
}

/// A session without layers and without text: random hidden states go in, random gradients back.
pub struct Driver {
    session: Session,
    plan: Plan,
    input: ForwardInput,
    grad: HostTensor,
}

/// What one session did while it was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Whole ones: with their backward, if there is one.
    pub n_microbatches: u64,
    pub n_steps: u64,
    pub seconds: f64,
    pub forward: Vec<FrameReport>,
    pub backward: Vec<FrameReport>,
}

/// Answers that are waited for, in the order in which they come.
enum Pending {
    Forward(PendingForward),
    Evaluate(PendingEvaluate),
    Backward(PendingBackward),
}

/// What came back.
enum Answered {
    Forward(FrameReport),
    Backward(FrameReport),
    /// Either the backward of a microbatch or an evaluation was its last answer.
    Microbatch,
}

impl Driver {
    /// `hidden_size` is H; `want_input_grad` is what a client would ask for.
    pub fn new(session: Session, plan: Plan, size: Size, shape: Shape) -> Driver {
        let n_tokens = size.n_tokens() as i64;
        let random = |scale: f64| {
            let hidden = shape.hidden_size as i64;
            let values = Tensor::randn([n_tokens, hidden], (Kind::Float, Device::Cpu)) * scale;
            let values = Vec::<f32>::try_from(values.flatten(0, 1)).expect("it has one dimension");
            let dims = vec![n_tokens as usize, shape.hidden_size];
            HostTensor::from_f32(&values, dims, session.wire_dtype())
        };
        let input = ForwardInput {
            hidden: random(1.0),
            seq_lens: vec![size.tokens; size.sequences as usize],
            position_ids: vec![],
            want_input_grad: shape.want_input_grad,
            dropout_key: 0,
        };
        let grad = random(GRADIENT_SCALE);
        Driver { session, plan, input, grad }
    }

    /// Warms up, waits for the others, and measures until the end.
    pub async fn run(mut self, start: Arc<Barrier>) -> Result<Measured, ClientError> {
        for _ in 0..self.plan.warm_up {
            self.step(|_| {}).await?;
        }
        self.session.settle().await?;
        start.wait().await;
        let begun = Instant::now();
        let mut measured = Measured::default();
        match self.plan.end {
            End::Steps(n) => {
                for _ in 0..n {
                    self.step(|answered| measured.count(answered)).await?;
                    measured.n_steps += 1;
                }
                self.session.settle().await?;
                measured.seconds = begun.elapsed().as_secs_f64();
            }
            End::After(time) => {
                // What is answered later is not counted, but keeps the others company.
                let in_time = || begun.elapsed() < time;
                while in_time() {
                    let count = |answered| {
                        if in_time() {
                            measured.count(answered)
                        }
                    };
                    self.step(count).await?;
                    measured.n_steps += u64::from(in_time());
                }
                measured.seconds = time.as_secs_f64();
            }
        }
        self.session.close(true).await?;
        Ok(measured)
    }

    /// One step, not counted. The session stays.
    pub async fn step_once(&mut self) -> Result<(), ClientError> {
        self.step(|_| {}).await?;
        self.session.settle().await?;
        Ok(())
    }

    async fn step(&mut self, mut count: impl FnMut(Answered)) -> Result<(), ClientError> {
        let (mut pending, mut n_sent, mut n_open) = (VecDeque::new(), 0, 0);
        let mut norm_squared: f64 = 0.0;
        loop {
            while n_sent < self.plan.accumulate && n_open < self.plan.in_flight {
                pending.push_back(self.send().await?);
                n_sent += 1;
                n_open += 1;
            }
            let Some(next) = pending.pop_front() else { break };
            match next {
                Pending::Forward(forward) => {
                    let (_, microbatch, report) = forward.await?;
                    count(Answered::Forward(report));
                    let backward = microbatch.send_backward(self.grad.clone()).await?;
                    pending.push_back(Pending::Backward(backward));
                    continue;
                }
                Pending::Evaluate(evaluate) => {
                    count(Answered::Forward(evaluate.with_report().await?.1));
                }
                Pending::Backward(backward) => {
                    let gradients = backward.await?;
                    norm_squared = gradients.norm_squared;
                    count(Answered::Backward(gradients.report));
                }
            }
            count(Answered::Microbatch);
            n_open -= 1;
        }
        if self.plan.mode == Mode::Train {
            // Not waited for, as a trainer does; a refusal is reported by the next call.
            let clip_factor = (1.0 / norm_squared.sqrt()).min(1.0);
            self.session.step(LEARNING_RATE, clip_factor).await?;
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<Pending, ClientError> {
        self.input.dropout_key += 1;
        let input = self.input.clone();
        Ok(match self.plan.mode {
            Mode::Train => Pending::Forward(self.session.send_forward(input).await?),
            Mode::Eval => Pending::Evaluate(self.session.send_evaluate(input).await?),
        })
    }
}

/// What the trunk says about its input.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// H.
    pub hidden_size: usize,
    /// False at split point 0: nothing below is trained there.
    pub want_input_grad: bool,
}

impl Measured {
    fn count(&mut self, answered: Answered) {
        match answered {
            Answered::Forward(report) => self.forward.push(report),
            Answered::Backward(report) => self.backward.push(report),
            Answered::Microbatch => self.n_microbatches += 1,
        }
    }

    /// How often the server was too full for a frame.
    pub fn n_retries(&self) -> u64 {
        self.forward.iter().chain(&self.backward).map(|report| u64::from(report.retries)).sum()
    }
}
