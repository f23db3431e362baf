//! A short stay at a server: an adapter's trunk in a session of its own, for evaluation or
//! generation, that leaves nothing behind.

use super::{Adapter, lora_config};
use crate::split::{Checkpointing, SplitModel, SplitOptions};
use crate::{TrainError, fit};
use offshoot_adapters::{AdamW, LoraSpec};
use offshoot_client::{ADAMW_DEFAULTS, Client, OpenSession, Session, WireDType};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, SplitPoints};
use tch::{Device, Kind};

/// What a [`Visit`] is for.
pub struct VisitOptions<'a> {
    /// The server's.
    pub client: &'a Client,
    /// The same model as the server's, and its configuration.
    pub checkpoint: &'a Checkpoint,
    pub config: &'a ModelConfig,
    /// None: the base model. See [`Adapter::fit`].
    pub adapter: Option<&'a Adapter>,
    /// For lists and logs of the server.
    pub name: &'a str,
    /// dtype of hidden states between the two sides.
    pub wire_dtype: WireDType,
    /// dtype of the client's layers.
    pub kind: Kind,
    /// Where they are.
    pub device: Device,
}

/// The split model with an adapter that does not train: bottom and top here, the trunk in a session
/// that is forgotten at the end.
pub struct Visit {
    pub model: SplitModel,
    pub session: Session,
}

impl Visit {
    /// Loads bottom and top, and opens a session with the adapter's trunk.
    pub async fn begin(options: VisitOptions<'_>) -> Result<Self, TrainError> {
        let VisitOptions { client, checkpoint, config, adapter, .. } = options;
        let server = client.describe().await?;
        let fingerprint = checkpoint.fingerprint();
        fit::fingerprint(&server, checkpoint.name(), config, &fingerprint)?;
        fit::wire_dtype(&server, options.wire_dtype)?;
        let (s1, s2) = (server.split_point_1, server.split_point_2);
        let split = SplitPoints::new(s1 as usize, s2 as usize, config.n_layers)?;
        let lora = adapter.map_or_else(|| unchanged(config), |adapter| adapter.spec.clone());
        let mut model = SplitModel::load(
            checkpoint,
            config,
            &SplitOptions {
                split,
                lora: lora.clone(),
                adamw: AdamW::default(),
                seed: 0,
                kind: options.kind,
                checkpointing: Checkpointing::Auto,
                devices: vec![options.device],
            },
        )?;
        if let Some(adapter) = adapter {
            model.load_adapter(&adapter.tensors)?;
        }
        let session = client
            .open(OpenSession {
                name: options.name.into(),
                fingerprint,
                split_point_1: s1,
                split_point_2: s2,
                lora: lora_config(&lora),
                adamw: ADAMW_DEFAULTS,
                seed: 0,
                wire_dtype: options.wire_dtype,
                initial_adapter: adapter.map(|adapter| adapter.trunk(split)).unwrap_or_default(),
            })
            .await?;
        Ok(Visit { model, session })
    }

    /// Forgets the session, whatever came of the visit, and gives that back.
    pub async fn end<T>(self, result: Result<T, TrainError>) -> Result<T, TrainError> {
        let closed = self.session.close(true).await;
        let value = result?;
        closed?;
        Ok(value)
    }
}

/// A fresh adapter of rank 1 on one module: its B is zero, so the model is the base model exactly.
fn unchanged(config: &ModelConfig) -> LoraSpec {
    let target_modules = config.default_targets().into_iter().take(1).collect();
    LoraSpec { r: 1, lora_alpha: 1.0, target_modules, ..LoraSpec::default() }
}
