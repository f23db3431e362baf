//! Causal attention within each packed sequence, by libtorch's fused kernels: no score matrix exists
//! at any length, on the CPU and on CUDA.

use crate::Rows;
use crate::rows::Group;
use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// `softmax(q k^T / sqrt(D)) v`, causal within each sequence; query heads share key/value heads in
/// groups of A / K.
///
/// `q` `[N, A, D]`, `k` and `v` `[N, K, D]`; returns `[N, A, D]` in their dtype and the log-sum-exp of
/// each query's scores, float32 `[N, A]`, for the backward.
pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Rows) -> (Tensor, Tensor) {
    let groups = rows.groups().iter().map(|group| forward_group(q, k, v, group));
    let (outputs, log_sums) = groups.unzip();
    (concat(outputs).to_kind(q.kind()), concat(log_sums))
}

/// The same for the rows of one group, `[B T, A, D]` in the kernel's dtype, and `[B T, A]`.
pub(crate) fn forward_group(q: &Tensor, k: &Tensor, v: &Tensor, group: &Group) -> (Tensor, Tensor) {
    let kernel = Kernel::of(q.device());
    let [q, k, v] = [q, k, v].map(|x| kernel.sequences(x, group));
    let (output, log_sum) = kernel.forward(&q, &k, &v);
    (packed(&output), log_sum.transpose(1, 2).reshape([group.n_rows(), -1]))
}

/// Attention of the last n rows of one sequence, `q` `[n, A, D]`, over all of its T keys and values,
/// `[K, T, D]` each, these rows' own among them: each row sees those before it and itself.
/// `[n, A, D]` in the kernel's dtype.
pub(crate) fn forward_next(q: &Tensor, keys: &Tensor, values: &Tensor) -> Tensor {
    let kernel = Kernel::of(q.device());
    let kind = if kernel == Kernel::CudaEfficient { q.kind() } else { Kind::Float };
    let [q, k, v] = [&q.transpose(0, 1), keys, values].map(|x| x.to_kind(kind).unsqueeze(0));
    let (n, t) = (q.size()[2], k.size()[2]);
    let output = match kernel {
        _ if n == t => kernel.forward(&q, &k, &v).0,
        Kernel::CpuFlash => {
            let mask = (n > 1).then(|| ahead(n, t, q.device()));
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &q,
                &k,
                &v,
                0.0,
                false,
                mask.as_ref(),
                None,
            )
            .0
        }
        Kernel::CudaEfficient | Kernel::Scores if n == 1 => one_row(&q, &k, &v),
        Kernel::CudaEfficient | Kernel::Scores => some_rows(&q, &k, &v),
    };
    packed(&output)
}

/// What is added to the scores `[n, T]` of the last n of T rows: minus infinity where a key is ahead
/// of its query. Float32.
fn ahead(n: i64, t: i64, device: Device) -> Tensor {
    Tensor::full([n, t], f64::NEG_INFINITY, (Kind::Float, device)).triu(t - n + 1)
}

/// One query `[1, A, 1, D]` over `[1, K, T, D]`: the query heads of one key head are the rows of a
/// product, so that no key is repeated.
fn one_row(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (size, n_kv_heads) = (q.size(), k.size()[1]);
    let scale = 1.0 / (size[3] as f64).sqrt();
    let q = q.reshape([1, n_kv_heads, -1, size[3]]) * scale; // [1, K, A / K, D]
    let weights = q.matmul(&k.transpose(2, 3)).softmax(-1, Kind::Float).to_kind(v.kind());
    weights.matmul(v).reshape(size)
}

/// Several queries `[1, A, n, D]` behind a prefix, without a score matrix where the device has a
/// kernel for it.
fn some_rows(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (n, t, n_heads) = (q.size()[2], k.size()[2], q.size()[1]);
    let mask = ahead(n, t, q.device()).to_kind(q.kind());
    let (k, v) = (repeated(k, n_heads), repeated(v, n_heads));
    Tensor::scaled_dot_product_attention(q, &k, &v, Some(&mask), 0.0, false, None, false)
}

/// What the backward takes: the forward's inputs and results, all `[N, heads, D]`.
pub(crate) struct Attended<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub output: &'a Tensor,
    /// `[N, A]`.
    pub log_sums: &'a Tensor,
}

/// Gradients by q, k and v from the gradient `[N, A, D]` by the output.
pub(crate) fn backward(attended: &Attended, grad: &Tensor, rows: &Rows) -> [Tensor; 3] {
    let Attended { q, k, v, output, log_sums } = attended;
    let kernel = Kernel::of(q.device());
    let mut grads = [const { Vec::new() }; 3];
    for group in rows.groups() {
        let shape = [group.n_sequences, group.length, -1];
        let log_sum = log_sums.narrow(0, group.start, group.n_rows()).view(shape).transpose(1, 2);
        let [q, k, v, output, grad] = [q, k, v, output, grad].map(|x| kernel.sequences(x, group));
        let saved = Group4 { q: &q, k: &k, v: &v, output: &output, log_sum: &log_sum };
        for (all, group) in grads.iter_mut().zip(kernel.backward(&saved, &grad)) {
            all.push(packed(&group));
        }
    }
    grads.map(|parts| concat(parts).to_kind(attended.q.kind()))
}

/// The sequences of one group: `[B, heads, T, D]`, the log-sum-exp `[B, A, T]`.
struct Group4<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    output: &'a Tensor,
    log_sum: &'a Tensor,
}

/// libtorch's number for it (sdp::CustomMaskType).
const CAUSAL_FROM_TOP_LEFT: i64 = 1;

/// Who computes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kernel {
    /// The CPU's flash kernel. It takes shared key/value heads as they are.
    CpuFlash,
    /// CUDA's memory-efficient kernel.
    CudaEfficient,
    /// The same mathematics with the scores in memory, where neither works.
    Scores,
}

impl Kernel {
    fn of(device: Device) -> Kernel {
        static CUDA: OnceLock<Kernel> = OnceLock::new();
        match device {
            Device::Cpu => Kernel::CpuFlash,
            Device::Cuda(_) => *CUDA.get_or_init(|| Kernel::checked(device)),
            _ => Kernel::Scores,
        }
    }

    /// The memory-efficient kernel, if it runs on this device and gives the right numbers.
    fn checked(device: Device) -> Kernel {
        let check = || {
            let random = |heads| Tensor::randn([2, heads, 40, 16], (Kind::Float, device));
            let (q, k, v, grad) = (random(4), random(2), random(2), random(4));
            let of = |kernel: Kernel| {
                let (output, log_sum) = kernel.forward(&q, &k, &v);
                let log_sum = log_sum.contiguous();
                let saved = Group4 { q: &q, k: &k, v: &v, output: &output, log_sum: &log_sum };
                let [by_q, by_k, by_v] = kernel.backward(&saved, &grad);
                [output, log_sum, by_q, by_k, by_v]
            };
            let both = of(Kernel::CudaEfficient).into_iter().zip(of(Kernel::Scores));
            both.into_iter().all(|(a, b)| a.allclose(&b, 1e-2, 1e-3, false))
        };
        // A kernel that does not exist for this device panics.
        match std::panic::catch_unwind(check) {
            Ok(true) => Kernel::CudaEfficient,
            outcome => {
                let failed = outcome.is_err();
                tracing::warn!(failed, "attention keeps score matrices: the fused kernel differs");
                Kernel::Scores
            }
        }
    }

    /// A group's rows `[N, heads, D]` as `[B, heads, T, D]`; on the CPU in float32, where its kernel
    /// is quicker than in bfloat16 (shared/stack.md).
    fn sequences(self, x: &Tensor, group: &Group) -> Tensor {
        let (heads, d) = (x.size()[1], x.size()[2]);
        let rows = x.narrow(0, group.start, group.n_rows());
        let rows = match self {
            Kernel::CudaEfficient => rows,
            Kernel::CpuFlash | Kernel::Scores => rows.to_kind(Kind::Float),
        };
        rows.reshape([group.n_sequences, group.length, heads, d]).transpose(1, 2)
    }

    /// The output `[B, A, T, D]` and the log-sum-exp `[B, A, T]`.
    fn forward(self, q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        match self {
            Kernel::CpuFlash => Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                q,
                k,
                v,
                0.0,
                true,
                None::<&Tensor>,
                None,
            ),
            Kernel::CudaEfficient => {
                let n_heads = q.size()[1];
                let (k, v) = (repeated(k, n_heads), repeated(v, n_heads));
                let (output, log_sum, ..) = Tensor::internal_scaled_dot_product_efficient_attention(
                    q,
                    &k,
                    &v,
                    None::<&Tensor>,
                    true,
                    0.0,
                    true,
                    None,
                );
                // The kernel pads T.
                (output, log_sum.narrow(2, 0, q.size()[2]))
            }
            Kernel::Scores => by_scores(q, k, v),
        }
    }

    /// Gradients by q, k and v, in their shapes.
    fn backward(self, saved: &Group4, grad: &Tensor) -> [Tensor; 3] {
        let Group4 { q, k, v, output, log_sum } = *saved;
        let (by_q, by_k, by_v) = match self {
            Kernel::CpuFlash => {
                Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                    grad,
                    q,
                    k,
                    v,
                    output,
                    log_sum,
                    0.0,
                    true,
                    None::<&Tensor>,
                    None,
                )
            }
            Kernel::CudaEfficient => {
                let n_heads = q.size()[1];
                let (all_k, all_v) = (repeated(k, n_heads), repeated(v, n_heads));
                // Padded as the forward pads it, so that padded queries get no weight.
                let padding = -q.size()[2] & 31;
                let log_sum = log_sum.contiguous().constant_pad_nd([0, padding]);
                let _ = log_sum.narrow(2, q.size()[2], padding).fill_(f64::INFINITY);
                let unused = Tensor::zeros([], (Kind::Int64, q.device()));
                // This one takes `[B, T, heads, D]`.
                let [grad, q, all_k, all_v, output] =
                    [grad, q, &all_k, &all_v, output].map(|x| x.transpose(1, 2));
                let (by_q, by_k, by_v, _) = Tensor::internal_efficient_attention_backward(
                    &grad,
                    &q,
                    &all_k,
                    &all_v,
                    None::<&Tensor>,
                    &output,
                    None::<&Tensor>,
                    None::<&Tensor>,
                    q.size()[1],
                    q.size()[1],
                    &log_sum,
                    0.0,
                    &unused,
                    &unused,
                    CAUSAL_FROM_TOP_LEFT,
                    false,
                    None,
                    None,
                    None,
                    false,
                );
                let [by_q, by_k, by_v] = [by_q, by_k, by_v].map(|x| x.transpose(1, 2));
                (by_q, summed(&by_k, k.size()[1]), summed(&by_v, v.size()[1]))
            }
            Kernel::Scores => by_scores_backward(saved, grad),
        };
        [by_q, by_k, by_v]
    }
}

/// `[B, heads, T, D] -> [B T, heads, D]`.
fn packed(x: &Tensor) -> Tensor {
    let size = x.size();
    x.transpose(1, 2).reshape([size[0] * size[2], size[1], size[3]])
}

pub(crate) fn concat(mut parts: Vec<Tensor>) -> Tensor {
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

fn by_scores(q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
    let n_heads = q.size()[1];
    let scores = scores(q, &repeated(k, n_heads));
    let log_sum = scores.logsumexp(-1, false); // [B, A, T]
    let output = scores.softmax(-1, Kind::Float).matmul(&repeated(v, n_heads));
    (output, log_sum)
}

fn by_scores_backward(saved: &Group4, grad: &Tensor) -> (Tensor, Tensor, Tensor) {
    let Group4 { q, k, v, output, log_sum } = *saved;
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
    x.reshape([s[0], n_kv_heads, s[1] / n_kv_heads, s[2], s[3]]).sum_dim_intlist(2, false, x.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_equals_the_score_matrix() {
        tch::manual_seed(5);
        let random = |heads| Tensor::randn([11, heads, 6], (Kind::Float, Device::Cpu));
        let rows = Rows::new(&[4, 4, 3], None, Device::Cpu);
        let (q, k, v, grad) = (random(4), random(2), random(2), random(4));
        let (output, log_sums) = forward(&q, &k, &v, &rows);
        assert_eq!(log_sums.size(), [11, 4]);
        let attended = Attended { q: &q, k: &k, v: &v, output: &output, log_sums: &log_sums };
        let kernel = backward(&attended, &grad, &rows);

        let close = |a: &Tensor, b: &Tensor| assert!(a.allclose(b, 1e-5, 1e-5, false), "{a} {b}");
        for group in rows.groups() {
            let own = |x: &Tensor| x.narrow(0, group.start, group.n_rows());
            let [q, k, v, grad] = [&q, &k, &v, &grad].map(|x| Kernel::Scores.sequences(x, group));
            let (plain, log_sum) = by_scores(&q, &k, &v);
            close(&packed(&plain), &own(&output));
            let shape = [group.n_sequences, group.length, 4];
            close(&log_sum, &own(&log_sums).view(shape).transpose(1, 2));
            let saved = Group4 { q: &q, k: &k, v: &v, output: &plain, log_sum: &log_sum };
            let (by_q, by_k, by_v) = by_scores_backward(&saved, &grad);
            for (plain, kernel) in [by_q, by_k, by_v].iter().zip(&kernel) {
                close(&packed(plain), &own(kernel));
            }
        }
    }

    /// Every device's way, on this one.
    #[test]
    fn the_last_rows_see_all_before_them_in_every_way() {
        tch::manual_seed(6);
        let random = |heads, t| Tensor::randn([1, heads, t, 6], (Kind::Float, Device::Cpu));
        let (q, k, v) = (random(4, 9), random(2, 9), random(2, 9));
        let (whole, _) = by_scores(&q, &k, &v);
        for n in [1, 3, 9] {
            let last = q.narrow(2, 9 - n, n);
            let expected = packed(&whole.narrow(2, 9 - n, n));
            let close =
                |found: &Tensor| assert!(found.allclose(&expected, 1e-5, 1e-5, false), "{n}");
            close(&packed(&some_rows(&last, &k, &v)));
            if n == 1 {
                close(&packed(&one_row(&last, &k, &v)));
            }
            close(&forward_next(&packed(&last), &k.squeeze_dim(0), &v.squeeze_dim(0)));
        }
    }
}
