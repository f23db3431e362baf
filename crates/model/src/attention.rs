use crate::Rows;
use crate::rows::Group;
use tch::{Device, Kind, Tensor};

/// Causal attention within each packed sequence, `softmax(q k^T / sqrt(D)) v`; query heads share
/// key/value heads in groups of A / K.
///
/// `q` `[N, A, D]`, `k` and `v` `[N, K, D]`; returns `[N, A, D]` in their dtype and what the backward
/// needs besides inputs and output: for each group the log-sum-exp of the scores.
pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Rows) -> (Tensor, Vec<Tensor>) {
    let mut outputs = Vec::with_capacity(rows.groups().len());
    let mut log_sums = Vec::with_capacity(rows.groups().len());
    for group in rows.groups() {
        let [q, k, v] = [q, k, v].map(|x| sequences(x, group));
        let (output, log_sum) = if q.device() == Device::Cpu {
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &q,
                &k,
                &v,
                0.0,
                true,
                None::<&Tensor>,
                None,
            )
        } else {
            by_scores(&q, &k, &v)
        };
        outputs.push(packed(&output));
        log_sums.push(log_sum);
    }
    (concat(outputs).to_kind(q.kind()), log_sums)
}

/// What the backward takes: the forward's inputs and results, all `[N, heads, D]`.
pub(crate) struct Saved<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub output: &'a Tensor,
    pub log_sums: &'a [Tensor],
}

/// Gradients by q, k and v from the gradient `[N, A, D]` by the output.
pub(crate) fn backward(saved: &Saved, grad: &Tensor, rows: &Rows) -> [Tensor; 3] {
    let mut grads = [const { Vec::new() }; 3];
    for (group, log_sum) in rows.groups().iter().zip(saved.log_sums) {
        let [q, k, v, output, grad] =
            [saved.q, saved.k, saved.v, saved.output, grad].map(|x| sequences(x, group));
        let (by_q, by_k, by_v) = if q.device() == Device::Cpu {
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &grad,
                &q,
                &k,
                &v,
                &output,
                log_sum,
                0.0,
                true,
                None::<&Tensor>,
                None,
            )
        } else {
            by_scores_backward(&q, &k, &v, &output, log_sum, &grad)
        };
        for (all, group) in grads.iter_mut().zip([by_q, by_k, by_v]) {
            all.push(packed(&group));
        }
    }
    grads.map(|parts| concat(parts).to_kind(saved.q.kind()))
}

/// A group's rows `[N, heads, D]` as float32 `[B, heads, T, D]`. The CPU kernel is quicker in
/// float32 than in bfloat16 (shared/stack.md), and exact softmax wants it anyway.
fn sequences(x: &Tensor, group: &Group) -> Tensor {
    let (heads, d) = (x.size()[1], x.size()[2]);
    x.narrow(0, group.start, group.n_rows())
        .to_kind(Kind::Float)
        .view([group.n_sequences, group.length, heads, d])
        .transpose(1, 2)
}

/// `[B, heads, T, D] -> [B T, heads, D]`.
fn packed(x: &Tensor) -> Tensor {
    let size = x.size();
    x.transpose(1, 2).reshape([size[0] * size[2], size[1], size[3]])
}

fn concat(mut parts: Vec<Tensor>) -> Tensor {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(&parts, 0),
    }
}

/// Scores `[B, A, T, T]` of every query and key, minus infinity above the diagonal; `k` with A heads.
fn scores(q: &Tensor, k: &Tensor) -> Tensor {
    let (t, d) = (q.size()[2], q.size()[3]);
    let ahead = Tensor::ones([t, t], (Kind::Bool, q.device())).triu(1);
    let mut scores = q.matmul(&k.transpose(2, 3)).g_mul_scalar_(1.0 / (d as f64).sqrt());
    scores.masked_fill_(&ahead, f64::NEG_INFINITY)
}

/// Key or value heads `[B, K, T, D]` repeated to `[B, A, T, D]`.
fn repeated(x: &Tensor, n_heads: i64) -> Tensor {
    x.repeat_interleave_self_int(n_heads / x.size()[1], 1, None)
}

/// The same mathematics with the score matrix in memory, for devices without the kernel.
fn by_scores(q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
    let n_heads = q.size()[1];
    let scores = scores(q, &repeated(k, n_heads));
    let log_sum = scores.logsumexp(-1, false); // [B, A, T]
    let output = scores.softmax(-1, Kind::Float).matmul(&repeated(v, n_heads));
    (output, log_sum)
}

fn by_scores_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    output: &Tensor,
    log_sum: &Tensor,
    grad: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    let (n_heads, d) = (q.size()[1], q.size()[3]);
    let (all_k, all_v) = (repeated(k, n_heads), repeated(v, n_heads));
    let weights = (scores(q, &all_k) - log_sum.unsqueeze(-1)).exp(); // [B, A, T, T]
    let by_v = weights.transpose(2, 3).matmul(grad);
    let by_weights = grad.matmul(&all_v.transpose(2, 3));
    let row = (grad * output).sum_dim_intlist(-1, true, Kind::Float); // [B, A, T, 1]
    let by_scores = weights * (by_weights - row) * (1.0 / (d as f64).sqrt());
    let by_q = by_scores.matmul(&all_k);
    let by_k = by_scores.transpose(2, 3).matmul(q);
    (by_q, summed(&by_k, k.size()[1]), summed(&by_v, k.size()[1]))
}

/// Gradients `[B, A, T, D]` of repeated heads summed to `[B, K, T, D]`.
fn summed(x: &Tensor, n_kv_heads: i64) -> Tensor {
    let s = x.size();
    x.view([s[0], n_kv_heads, s[1] / n_kv_heads, s[2], s[3]]).sum_dim_intlist(2, false, Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_equals_the_score_matrix() {
        tch::manual_seed(5);
        let random = |heads| Tensor::randn([8, heads, 6], (Kind::Float, Device::Cpu));
        let rows = Rows::new(&[4, 4], None, Device::Cpu);
        let (q, k, v, grad) = (random(4), random(2), random(2), random(4));
        let (output, log_sums) = forward(&q, &k, &v, &rows);
        let saved = Saved { q: &q, k: &k, v: &v, output: &output, log_sums: &log_sums };
        let kernel = backward(&saved, &grad, &rows);

        let group = rows.groups()[0];
        let [q4, k4, v4, g4] = [&q, &k, &v, &grad].map(|x| sequences(x, &group));
        let (plain, log_sum) = by_scores(&q4, &k4, &v4);
        let close = |a: &Tensor, b: &Tensor| assert!(a.allclose(b, 1e-5, 1e-5, false), "{a} {b}");
        close(&packed(&plain), &output);
        close(&log_sum, &log_sums[0]);
        let (by_q, by_k, by_v) = by_scores_backward(&q4, &k4, &v4, &plain, &log_sum, &g4);
        for (plain, kernel) in [by_q, by_k, by_v].iter().zip(&kernel) {
            close(&packed(plain), kernel);
        }
    }
}
