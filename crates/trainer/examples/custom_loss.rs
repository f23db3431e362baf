//! Training with a loss of one's own: the focal loss (arXiv 1708.02002), which counts tokens less that
//! the model already knows, `-(1 - p)^2 log p`.
//!
//! ```text
//! offshoot serve --model-name MODEL --split-point-1 2 --split-point-2 20
//! cargo run --release -p offshoot-trainer --example custom_loss -- MODEL HOST:PORT TEXT OUTPUT_DIR
//! ```

use offshoot_trainer::loss::FromLogits;
use offshoot_trainer::options::LossOptions;
use offshoot_trainer::{CancelToken, TrainOptions, train};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Of each token, `[c]`, from logits `[c, V]` and the tokens that follow `[c]`.
fn focal(logits: &Tensor, labels: &Tensor) -> Tensor {
    let log_p = logits.log_softmax(-1, Kind::Float); // [c, V]
    let log_p = log_p.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1); // [c]
    let unsure: Tensor = 1.0 - log_p.exp();
    -(unsure.square() * log_p)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, server, text, output] = args.as_slice() else {
        return Err("expected four arguments: MODEL HOST:PORT TEXT OUTPUT_DIR".into());
    };
    let mut options = TrainOptions::new(model, server, text.into(), output.into());
    options.loss = LossOptions::Custom(Arc::new(FromLogits::new("focal", focal)));
    options.steps.max_steps = Some(20);
    options.output.log_interval = 1;

    // The trainer computes on this thread; the connection's tasks run on the runtime's own.
    let runtime = tokio::runtime::Runtime::new()?;
    let summary = runtime.block_on(train(options, CancelToken::default()))?;
    println!("losses: {:.3?}", summary.losses);
    Ok(())
}
