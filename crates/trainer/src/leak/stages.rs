use crate::TrainError;
use crate::adapter::Adapter;
use crate::data::Batch;
use crate::evaluate::Subject;
use offshoot_adapters::AdapterSet;
use offshoot_model::{Part, PartSpec, Rows, Segment};
use std::ops::Range;
use tch::Tensor;

/// The first layers of a model, cut at each split point that is measured.
pub(super) struct Stages(Vec<Stage>);

/// Some layers with what trains in them.
pub(super) struct Stage {
    pub part: Part,
    pub adapter: Option<AdapterSet>,
}

impl Stages {
    /// `points` in rising order.
    pub fn load(
        subject: &Subject,
        adapter: Option<&Adapter>,
        points: &[usize],
    ) -> Result<Self, TrainError> {
        let mut stages = Vec::new();
        let mut from = 0;
        for (i, &to) in points.iter().enumerate() {
            let spec = PartSpec { layers: from..to, embed: i == 0, head: false };
            stages.push(Stage::load(subject, adapter, spec)?);
            from = to;
        }
        Ok(Stages(stages))
    }

    /// The part that has them.
    pub fn embeddings(&self) -> &Part {
        &self.0.first().expect("there is a split point").part
    }

    /// Hidden states `[N, H]` at each split point, with or without the adapter.
    pub fn run(&self, batch: &Batch, adapted: bool) -> Vec<Tensor> {
        let part = self.embeddings();
        let rows = Rows::new(&batch.seq_lens, None, part.device());
        let mut hidden =
            part.embed(&Tensor::from_slice(&batch.ids).to_device(part.device()), &rows);
        let mut seen = Vec::with_capacity(self.0.len());
        for stage in &self.0 {
            hidden = stage.forward(&hidden, &rows, adapted);
            seen.push(hidden.shallow_clone());
        }
        seen
    }
}

impl Stage {
    pub fn load(
        subject: &Subject,
        adapter: Option<&Adapter>,
        spec: PartSpec,
    ) -> Result<Self, TrainError> {
        let Subject { checkpoint, config, kind, device } = *subject;
        let part = Part::load(checkpoint, config, spec, kind, device)?;
        let adapter = match adapter {
            None => None,
            Some(adapter) => {
                let sites = part.sites(&adapter.spec.target_modules)?;
                let mut set = AdapterSet::init(adapter.spec.clone(), sites, 0, device)?;
                set.load_named(&adapter.tensors)?;
                Some(set).filter(|set| set.n_parameters() > 0)
            }
        };
        Ok(Stage { part, adapter })
    }

    /// `[N, H] -> [N, H]`, without dropout.
    pub fn forward(&self, x: &Tensor, rows: &Rows, adapted: bool) -> Tensor {
        self.part.forward_eval(x, rows, &[self.segment(0..rows.n_tokens(), adapted)])
    }

    pub fn segment(&self, rows: Range<i64>, adapted: bool) -> Segment<'_> {
        Segment { rows, adapter: self.adapter.as_ref().filter(|_| adapted), dropout: None }
    }
}
