//! The server in a few lines, above its sessions.

use super::rows::Row;
use crate::operate::{age, bytes, count, share};
use offshoot_client::operations::{Overview, Refusal, Sample, TrunkView};

/// Kinds of refusals that are named.
const MOST_REFUSALS: usize = 4;

/// What the server is, what it does, its memory, and its GPU if it has one.
pub fn lines(overview: &Overview, address: &str) -> Vec<String> {
    let server = overview.server.clone().unwrap_or_default();
    let trunk = server.trunk.unwrap_or_default();
    let mut lines = vec![
        format!(
            "offshoot {} at {address}: {}, up {}",
            server.version,
            server.health,
            age(overview.now_millis, server.started_millis)
        ),
        format!(
            "{} layers {}..{} of {}, {} on {}",
            trunk.model_name,
            trunk.split_point_1,
            trunk.split_point_2,
            trunk.n_layers,
            trunk.compute_dtype,
            trunk.device
        ),
        work(overview, server.queued_jobs),
        memory(&trunk),
    ];
    if let Some(device) = server.device {
        lines.push(format!(
            "{}: {} of {} used, {} busy, {:.0} C, {:.0} W",
            device.name,
            bytes(device.memory_used_bytes),
            bytes(device.memory_total_bytes),
            share(device.utilisation),
            device.temperature_celsius,
            device.power_watts
        ));
    }
    lines
}

fn work(overview: &Overview, queued_jobs: u32) -> String {
    let last = overview.samples.last().copied().unwrap_or_default();
    let states: Vec<&str> =
        overview.sessions.iter().map(|view| Row::of(overview, view).state()).collect();
    let n_of = |state: &str| states.iter().filter(|found| **found == state).count();
    let (attached, detached) = (n_of("attached"), n_of("detached"));
    let parked = states.len() - attached - detached + overview.sessions_left_out as usize;
    let mut text = format!(
        "{attached} attached, {detached} detached, {parked} parked; {} tokens/s, {} steps/s",
        count(last.tokens_per_second),
        count(last.steps_per_second)
    );
    if overview.is_operator {
        text.push_str(&format!(
            "; queue {queued_jobs}, busy {}, batches of {} tokens",
            share(last.device_busy),
            count(last.batch_tokens)
        ));
    }
    text
}

fn memory(trunk: &TrunkView) -> String {
    let memory = trunk.memory.unwrap_or_default();
    let used = memory.weights_bytes
        + memory.adapter_bytes
        + memory.tape_bytes
        + memory.workspace_bytes
        + memory.cache_bytes;
    let of = match memory.budget_bytes {
        0 => String::new(),
        budget => format!(" of {}", bytes(budget)),
    };
    format!(
        "memory {}{of}: weights {}, adapters {}, open microbatches {}, caches {}, work {}",
        bytes(used),
        bytes(memory.weights_bytes),
        bytes(memory.adapter_bytes),
        bytes(memory.tape_bytes),
        bytes(memory.cache_bytes),
        bytes(memory.workspace_bytes)
    )
}

/// What was refused in the last hour; none: nothing.
pub fn refused(overview: &Overview) -> Option<String> {
    let one = |refusal: &Refusal| {
        let tenant = if refusal.tenant.is_empty() { "" } else { " of " };
        let last = age(overview.now_millis, refusal.last_millis);
        format!("{} {}{tenant}{} ({last} ago)", refusal.count, refusal.label, refusal.tenant)
    };
    let named: Vec<String> = overview.refusals.iter().take(MOST_REFUSALS).map(one).collect();
    let more = overview.refusals.len().saturating_sub(MOST_REFUSALS);
    let more = if more > 0 { format!(" and {more} kinds more") } else { String::new() };
    (!named.is_empty()).then(|| format!("refused in the last hour: {}{more}", named.join(", ")))
}

/// Tokens per second over the hour, in so many values at most: means of neighbours.
pub fn throughput(samples: &[Sample], width: usize) -> Vec<f64> {
    if width == 0 || samples.is_empty() {
        return Vec::new();
    }
    let each = samples.len().div_ceil(width);
    // The newest stand together, so that the last value is of the last moment.
    let chunks = samples.rchunks(each).map(|chunk| {
        chunk.iter().map(|sample| sample.tokens_per_second).sum::<f64>() / chunk.len() as f64
    });
    let mut values: Vec<f64> = chunks.collect();
    values.reverse();
    values
}

/// The same as a line of bars.
pub fn bars(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = values.iter().copied().fold(0.0, f64::max);
    let bar = |&value: &f64| match most {
        most if most > 0.0 => BARS[((value / most * 7.0).round() as usize).min(7)],
        _ => BARS[0],
    };
    values.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rows::tests::overview;
    use offshoot_client::operations::ServerView;

    #[test]
    fn the_server_is_a_few_lines() {
        let mut overview = overview();
        overview.server = Some(ServerView {
            version: "1.2.3".into(),
            health: "serving".into(),
            started_millis: overview.now_millis - 7_200_000_u64.min(overview.now_millis - 1),
            queued_jobs: 3,
            ..Default::default()
        });
        let tokens_per_second = 1234.0;
        overview.samples =
            vec![Sample { tokens_per_second, device_busy: 0.5, ..Default::default() }];
        let text = lines(&overview, "trunk:1").join("\n");
        println!("{text}");
        assert!(text.contains("offshoot 1.2.3 at trunk:1: serving, up "));
        assert!(text.contains("2 attached, 0 detached, 1 parked; 1234 tokens/s"));
        assert!(text.contains("queue 3, busy 50%"));
        // A tenant learns nothing of the whole.
        overview.is_operator = false;
        assert!(!lines(&overview, "").join("\n").contains("queue"));

        assert_eq!(refused(&overview), None);
        let refusal = |n: u64| Refusal {
            label: format!("kind{n}"),
            count: n,
            last_millis: overview.now_millis,
            ..Default::default()
        };
        overview.refusals = (1..=6).map(refusal).collect();
        let text = refused(&overview).unwrap();
        assert!(
            text.contains("1 kind1 (0s ago), 2 kind2") && text.ends_with("and 2 kinds more"),
            "{text}"
        );
    }

    #[test]
    fn throughput_fits_and_ends_now() {
        let samples: Vec<Sample> = (0..100)
            .map(|n| Sample { tokens_per_second: f64::from(n), ..Default::default() })
            .collect();
        let values = throughput(&samples, 30);
        assert!(values.len() <= 30 && values.len() > 20, "{}", values.len());
        assert_eq!(values.last(), Some(&97.5));
        assert_eq!(throughput(&samples, 100).len(), 100);
        assert!(throughput(&[], 10).is_empty() && throughput(&samples, 0).is_empty());
        assert_eq!(bars(&[0.0, 50.0, 100.0]), "▁▅█");
        assert_eq!(bars(&[0.0, 0.0]), "▁▁");
    }
}
