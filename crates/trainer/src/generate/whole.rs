use crate::TrainError;
use crate::adapter::Adapter;
use crate::split::{embed, go_on};
use offshoot_adapters::AdapterSet;
use offshoot_model::weights::Checkpoint;
use offshoot_model::{KvCache, ModelConfig, Part, PartSpec, Rows, Segment};
use tch::{Device, Kind, Tensor};

/// The uncut model on this machine, with an adapter if it has one: no server is needed.
pub struct WholeModel {
    part: Part,
    adapter: Option<AdapterSet>,
}

impl WholeModel {
    /// Loads all layers, with weights in `kind`. `adapter` must [fit](Adapter::fit) the model.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        adapter: Option<&Adapter>,
        (kind, device): (Kind, Device),
    ) -> Result<Self, TrainError> {
        let part = Part::load(checkpoint, config, PartSpec::whole(config), kind, device)?;
        let adapter = match adapter {
            None => None,
            Some(adapter) => {
                let sites = part.sites(&adapter.spec.target_modules)?;
                let mut set = AdapterSet::init(adapter.spec.clone(), sites, 0, device)?;
                set.load_named(&adapter.tensors)?;
                Some(set)
            }
        };
        Ok(WholeModel { part, adapter })
    }

    /// Of the model.
    pub fn config(&self) -> &ModelConfig {
        self.part.config()
    }

    pub(super) fn new_cache(&self, capacity: usize) -> KvCache {
        self.part.new_cache(capacity as i64)
    }

    /// The next tokens of a sequence, behind the first `start` ones of its cache: `[n, H]` out of the
    /// last block.
    pub(super) fn extend(&self, ids: &[u32], start: usize, cache: &mut KvCache) -> Tensor {
        let _guard = tch::no_grad_guard();
        let rows = Rows::after(&[ids.len()], &[start], self.part.device());
        let segment = self.segment(&rows);
        go_on(&self.part, &embed(&self.part, ids, &rows), &rows, segment, (cache, start))
    }

    /// A whole sequence, without a cache: `[n, H]` out of the last block.
    pub(super) fn evaluate(&self, ids: &[u32]) -> Tensor {
        let _guard = tch::no_grad_guard();
        let rows = Rows::new(&[ids.len()], None, self.part.device());
        let x = embed(&self.part, ids, &rows);
        self.part.forward_eval(&x, &rows, &[self.segment(&rows)])
    }

    /// Float32 logits `[V]` behind the last row of `hidden` `[n, H]`.
    pub(super) fn last_row_logits(&self, hidden: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.part.logits(&hidden.slice(0, -1, None, 1)).squeeze_dim(0)
    }

    fn segment(&self, rows: &Rows) -> Segment<'_> {
        Segment { rows: 0..rows.n_tokens(), adapter: self.adapter.as_ref(), dropout: None }
    }
}
