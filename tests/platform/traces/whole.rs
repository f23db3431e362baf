//! What a whole trace of a step is.

use offshoot_platform::otlp::Seen;
use std::collections::{BTreeMap, BTreeSet};

/// The roots of a client's steps.
pub fn steps_of<'a>(spans: &'a [Seen], session: &str) -> Vec<&'a Seen> {
    let is =
        |span: &&Seen| span.name == "train.step" && span.attribute("offshoot.session") == session;
    spans.iter().filter(is).collect()
}

/// Checks one step's trace; gives the traces of the batches that it was in.
pub fn check_whole(
    spans: &[Seen],
    step: &Seen,
    tenant: &str,
    n_microbatches: usize,
) -> BTreeSet<String> {
    let of_trace: Vec<&Seen> = spans.iter().filter(|span| span.trace == step.trace).collect();
    let by_id: BTreeMap<&str, &Seen> = of_trace.iter().map(|s| (s.id.as_str(), *s)).collect();
    assert_eq!(by_id.len(), of_trace.len(), "each span once");
    assert!(step.parent.is_empty());
    assert_eq!(step.attribute("offshoot.microbatches"), n_microbatches.to_string());
    assert!(step.attribute("offshoot.tokens").parse::<u64>().unwrap() > 0);
    for span in &of_trace {
        let is_root = span.id == step.id;
        assert!(is_root || by_id.contains_key(span.parent.as_str()), "no parent: {span:#?}");
    }
    check_counts(&of_trace, n_microbatches);
    for span in &of_trace {
        let parent = by_id.get(span.parent.as_str()).map_or("", |parent| parent.name.as_str());
        let expected = match span.name.as_str() {
            "session.forward" => "frame.forward",
            "session.backward" => "frame.backward",
            "session.step" => "frame.step",
            "engine.forward" => "session.forward",
            "engine.backward" => "session.backward",
            "engine.step" => "session.step",
            _ => continue,
        };
        assert_eq!(parent, expected, "parent of {}", span.name);
        if expected.starts_with("frame.") {
            assert_eq!((span.kind, span.attribute("offshoot.tenant")), (2, tenant));
            assert_ne!(by_id[span.parent.as_str()].service(), span.service(), "two processes");
        }
    }
    check_links(spans, &of_trace)
}

fn check_counts(of_trace: &[&Seen], n_microbatches: usize) {
    let count = |name: &str| of_trace.iter().filter(|span| span.name == name).count();
    let each = [
        "bottom.forward",
        "top.forward_backward",
        "frame.forward",
        "frame.backward",
        "session.forward",
        "session.backward",
        "engine.forward",
        "engine.backward",
    ];
    for name in each {
        assert_eq!(count(name), n_microbatches, "{name}");
    }
    for name in ["frame.step", "session.step", "engine.step", "optimizer.step"] {
        assert_eq!(count(name), 1, "{name}");
    }
    // Every job waited, however shortly.
    assert_eq!(count("queue.wait"), 2 * n_microbatches + 1);
}

/// Jobs and their batches name each other.
fn check_links(spans: &[Seen], of_trace: &[&Seen]) -> BTreeSet<String> {
    let mut batches = BTreeSet::new();
    for job in of_trace {
        if !["engine.forward", "engine.backward"].contains(&job.name.as_str()) {
            continue;
        }
        let [(trace, id)] = job.links.as_slice() else { panic!("one batch: {job:#?}") };
        let batch = spans.iter().find(|span| span.trace == *trace && span.id == *id);
        let batch = batch.unwrap_or_else(|| panic!("the batch of {job:#?}"));
        assert_eq!((batch.name.as_str(), batch.parent.as_str()), ("engine.batch", ""));
        let asked = (job.trace.clone(), job.parent.clone());
        assert!(batch.links.contains(&asked), "{batch:#?} does not name {asked:?}");
        assert_eq!(batch.attribute("offshoot.batch.jobs"), batch.links.len().to_string());
        for phase in ["engine.upload", "engine.pass", "engine.download"] {
            let is = |span: &Seen| span.name == phase && span.parent == batch.id;
            assert!(spans.iter().any(is), "{phase} of {batch:#?}");
        }
        batches.insert(trace.clone());
    }
    batches
}
