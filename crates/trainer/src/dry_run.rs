use crate::TrainError;
use crate::describe;
use crate::options::TrainOptions;
use crate::origin::Origin;
use crate::resume;
use crate::setup::{self, Prepared};

/// Does what [`train`](crate::train()) does before it opens a session: checks the options, reads the
/// data, compares with the server and loads bottom and top. Gives what would be trained, in lines
/// for people. It writes nothing, except for the cache of tokens.
pub async fn dry_run(options: &TrainOptions) -> Result<Vec<String>, TrainError> {
    let origin = Origin::find(options)?;
    let resumed = origin.checkpoint().cloned();
    resume::check_output_dir(options, resumed.as_ref())?;
    let prepared = setup::prepare(options, None, origin).await?;
    let mut lines = describe::lines(options, &prepared);
    if let Some(saved) = &resumed {
        lines.push(format!("goes on at step {} from {}", saved.state.step, saved.path.display()));
        lines.extend(resume::check_settings(saved, &prepared)?);
    }
    lines.extend(costs(options, &prepared));
    Ok(lines)
}

/// What the steps of the first epoch take.
fn costs(options: &TrainOptions, prepared: &Prepared) -> Vec<String> {
    let Prepared { plan, data, config, settings, split, server, .. } = prepared;
    let n_steps = plan.n_steps(1).min(settings.n_steps);
    let (mut n_microbatches, mut n_tokens, mut largest) = (0, 0, 0);
    for step in 0..n_steps {
        for microbatch in plan.microbatches(step) {
            let tokens = data.batch(&microbatch).n_tokens();
            n_microbatches += 1;
            n_tokens += tokens;
            largest = largest.max(tokens);
        }
    }
    let steps = n_steps.max(1) as f64;
    let value_bytes = options.compute.wire_dtype.size() as f64;
    // Hidden states there and back, gradients there, and back where the bottom learns.
    let ways = if split.adapters()[0].is_some() { 4.0 } else { 3.0 };
    let wire = n_tokens as f64 / steps * config.hidden_size as f64 * value_bytes * ways;
    // Parameters, gradients and two moments, in f32.
    let adapters = |n_values: i64| 16.0 * n_values as f64;
    let trunk = settings.split_point_1..settings.split_point_2;
    let mega = 1e6;
    vec![
        format!(
            "a step: {:.1} microbatches, {:.0} tokens, {:.1} MB over the wire; the largest microbatch has {largest} tokens, the server takes {}",
            n_microbatches as f64 / steps,
            n_tokens as f64 / steps,
            wire / mega,
            server.limits.max_tokens_per_microbatch,
        ),
        format!(
            "adapter with optimizer: {:.1} MB here, {:.1} MB in the trunk",
            adapters(split.n_parameters()) / mega,
            adapters(describe::n_values(&settings.lora, config, trunk)) / mega,
        ),
        "dry run: nothing was trained, and no session was opened".into(),
    ]
}
