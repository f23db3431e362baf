//! Loss and perplexity of a model, with and without an adapter, on a data set: uncut in this
//! process, or through the split.

use crate::TrainError;
use crate::adapter::{Adapter, Visit, VisitOptions};
use crate::data::Batch;
use crate::loss::{CrossEntropy, Loss, LossInput, LossSum};
use crate::noise::PrivacyOptions;
use offshoot_adapters::AdapterSet;
use offshoot_client::{Client, ClientError, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, Rows, Segment};
use tch::{Device, Kind, Tensor};

/// A model, and where and how it is computed.
pub struct Subject<'a> {
    pub checkpoint: &'a Checkpoint,
    pub config: &'a ModelConfig,
    /// dtype of this side's layers.
    pub kind: Kind,
    pub device: Device,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy of the predicted tokens, in nats.
    pub loss: f64,
    /// Tokens that were predicted.
    pub predicted: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    pub samples: usize,
}

impl Evaluation {
    /// Of the predicted tokens.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    fn new(batches: &[Batch], loss_sum: f64) -> Self {
        let sum = |of: fn(&Batch) -> usize| batches.iter().map(of).sum();
        let predicted: usize = sum(Batch::n_predicted);
        Evaluation {
            loss: loss_sum / predicted as f64,
            predicted,
            tokens: sum(Batch::n_tokens),
            samples: sum(|batch| batch.seq_lens.len()),
        }
    }
}

/// Of one evaluation, while its server is killed again and again.
const MAX_FRESH_STARTS: u32 = 5;

/// The loss of language models, without smoothing: what perplexity is made of.
const LOSS: CrossEntropy = CrossEntropy { label_smoothing: 0.0 };

/// A whole model in this process.
pub struct Uncut {
    part: Part,
}

impl Uncut {
    /// Loads all layers.
    pub fn load(subject: &Subject<'_>) -> Result<Self, TrainError> {
        let Subject { checkpoint, config, kind, device } = *subject;
        let part = Part::load(checkpoint, config, PartSpec::whole(config), kind, device)?;
        Ok(Uncut { part })
    }

    /// Evaluates the base model, or the one with an adapter; see [`Adapter::fit`].
    pub fn evaluate(
        &self,
        adapter: Option<&Adapter>,
        batches: &[Batch],
    ) -> Result<Evaluation, TrainError> {
        let _guard = tch::no_grad_guard();
        let device = self.part.device();
        let set = match adapter {
            Some(adapter) => Some(self.adapter_set(adapter)?),
            None => None,
        };
        let mut loss_sum = 0.0;
        for batch in batches {
            let rows = Rows::new(&batch.seq_lens, None, device);
            let ids = Tensor::from_slice(&batch.ids).to_device(device);
            let labels = Tensor::from_slice(&batch.labels).to_device(device);
            let segment =
                Segment { rows: 0..rows.n_tokens(), adapter: set.as_ref(), dropout: None };
            let hidden = self.part.embed(&ids, &rows);
            let (hidden, _) = self.part.forward(&hidden, &rows, &[segment], &[None]);
            let input = LossInput { top: &self.part, hidden: &hidden, labels: &labels, batch };
            loss_sum += LOSS.evaluate(&input).sum;
        }
        Ok(Evaluation::new(batches, loss_sum))
    }

    fn adapter_set(&self, adapter: &Adapter) -> Result<AdapterSet, TrainError> {
        let sites = self.part.sites(&adapter.spec.target_modules)?;
        let mut set = AdapterSet::init(adapter.spec.clone(), sites, 0, self.part.device())?;
        set.load_named(&adapter.tensors)?;
        Ok(set)
    }
}

/// A server's trunk, and how hidden states get there.
pub struct Through<'a> {
    pub client: &'a Client,
    pub wire_dtype: WireDType,
    /// What is done to hidden states before they are sent.
    pub privacy: &'a PrivacyOptions,
}

/// Evaluates through a server's trunk, in a session that is forgotten afterwards.
pub async fn split(
    subject: &Subject<'_>,
    through: &Through<'_>,
    adapter: Option<&Adapter>,
    batches: &[Batch],
) -> Result<Evaluation, TrainError> {
    let Through { client, wire_dtype, privacy } = *through;
    let Subject { checkpoint, config, kind, device } = *subject;
    let visit = Visit::begin(VisitOptions {
        client,
        checkpoint,
        config,
        adapter,
        name: "eval",
        wire_dtype,
        kind,
        device,
    });
    let mut visit = visit.await?;
    if let Err(error) = visit.model.perturb(privacy) {
        return visit.end(Err(error)).await;
    }
    let loss_sum = evaluate_all(&mut visit, client, batches).await;
    let loss_sum = visit.end(loss_sum).await?;
    Ok(Evaluation::new(batches, loss_sum.sum))
}

/// From the beginning again if the server was killed meanwhile: the session has nothing to lose.
async fn evaluate_all(
    visit: &mut Visit,
    client: &Client,
    batches: &[Batch],
) -> Result<LossSum, TrainError> {
    let in_flight = visit.session.limits().max_frames_in_flight.clamp(1, 2) as usize;
    for _ in 0..MAX_FRESH_STARTS {
        match visit.model.evaluate(&visit.session, &LOSS, batches, in_flight).await {
            Err(TrainError::Client(error @ ClientError::RolledBack { .. })) => {
                tracing::warn!("the evaluation begins again: {error}");
                visit.session = client.restore(visit.session.id(), None).await?.0;
            }
            ended => return Ok(ended?.0),
        }
    }
    Ok(visit.model.evaluate(&visit.session, &LOSS, batches, in_flight).await?.0)
}
