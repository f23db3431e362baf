//! Tenants packed into one batch, and a batch's results cut into each tenant's.

use crate::tenant::{Gradients, Tenant};
use offshoot_model::{Backward, Rows, Segment};
use tch::{Device, Kind, Tensor};

/// Rows, segments and tensors of a batch of tenants, in their order.
pub struct Batch<'a> {
    pub rows: Rows,
    pub segments: Vec<Segment<'a>>,
    /// `[N, H]` each.
    pub x: Tensor,
    pub grad: Tensor,
}

impl<'a> Batch<'a> {
    pub fn new(tenants: &[&'a Tenant], kind: Kind) -> Batch<'a> {
        let mut segments = Vec::new();
        let (mut seq_lens, mut position_ids) = (Vec::new(), Vec::new());
        let mut start = 0;
        for tenant in tenants {
            let end = start + tenant.n_tokens();
            let (adapter, dropout) = (tenant.set.as_deref(), tenant.dropout);
            segments.push(Segment { rows: start..end, adapter, dropout });
            seq_lens.extend(&tenant.seq_lens);
            match &tenant.position_ids {
                Some(ids) => position_ids.extend(ids),
                None => position_ids.extend(tenant.seq_lens.iter().flat_map(|&n| 0..n as i64)),
            }
            start = end;
        }
        let cat = |of: fn(&Tenant) -> &Tensor| {
            let all: Vec<&Tensor> = tenants.iter().map(|tenant| of(tenant)).collect();
            Tensor::cat(&all, 0).to_kind(kind)
        };
        let rows = Rows::new(&seq_lens, Some(&position_ids), Device::Cpu);
        Batch { rows, segments, x: cat(|t| &t.x), grad: cat(|t| &t.grad) }
    }

    /// Each tenant's rows of a packed `[N, H]`.
    pub fn split(&self, packed: &Tensor) -> Vec<Tensor> {
        let rows = self.segments.iter().map(|s| s.rows.clone());
        rows.map(|rows| packed.narrow(0, rows.start, rows.end - rows.start)).collect()
    }

    /// Each tenant's share of a backward.
    pub fn shares(&self, back: Backward) -> Vec<Gradients> {
        let inputs: Vec<Option<Tensor>> = match &back.input {
            Some(input) => self.split(input).into_iter().map(Some).collect(),
            None => self.segments.iter().map(|_| None).collect(),
        };
        assert_eq!(back.lora.len(), inputs.len());
        let shares = inputs.into_iter().zip(back.lora);
        shares.map(|(input, lora)| Gradients { input, lora }).collect()
    }
}
