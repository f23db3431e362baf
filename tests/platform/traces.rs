//! Traces over both processes: a real server, real training runs, and what arrives at the far end, by way
//! of a real collector and without one.

#[path = "traces/processes.rs"]
mod processes;
#[path = "traces/whole.rs"]
mod whole;

use offshoot_platform::collector::Collector;
use offshoot_platform::otlp::{Seen, Sink};
use processes::{Place, Server};
use std::collections::BTreeSet;
use whole::{check_whole, steps_of};

const N_STEPS: u64 = 5;
/// So that several microbatches are in flight.
const N_MICROBATCHES: usize = 3;

/// Whether all steps of a client have a root, and the server's part of each last frame is there.
fn has_steps(spans: &[Seen], session: &str) -> bool {
    let steps = steps_of(spans, session);
    let is_stepped = |root: &&Seen| {
        spans.iter().any(|span| span.trace == root.trace && span.name == "engine.step")
    };
    steps.len() as u64 == N_STEPS && steps.iter().all(is_stepped)
}

#[test]
fn every_step_of_two_tenants_arrives_as_a_whole_trace() {
    let sink = Sink::start();
    let collector = Collector::start(&sink.http());
    let place = Place::new(&["blue", "red"]);
    let server = Server::start(&place, &collector.grpc());
    // One by gRPC and one by HTTP, at the same time.
    let blue = place.train(&server, "blue", &format!("--otlp-endpoint {}", collector.grpc()));
    let http = format!("--otlp-endpoint {} --otlp-protocol http", collector.http());
    let red = place.train(&server, "red", &http);
    let sessions = [blue.ends_well().session, red.ends_well().session];
    server.ends();
    let spans = sink.wait_for("the steps of both", |spans| {
        sessions.iter().all(|session| has_steps(spans, session))
    });
    let mut batches = BTreeSet::new();
    for (session, tenant) in sessions.iter().zip(["blue", "red"]) {
        let steps = steps_of(&spans, session);
        let numbers: BTreeSet<u64> =
            steps.iter().map(|step| step.attribute("offshoot.step").parse().unwrap()).collect();
        assert_eq!(numbers, (1..=N_STEPS).collect(), "each step once");
        for step in &steps {
            batches.extend(check_whole(&spans, step, tenant, N_MICROBATCHES));
        }
    }
    // A batch is a trace of its own, whoever is in it.
    let traces: BTreeSet<&str> = sessions
        .iter()
        .flat_map(|of| steps_of(&spans, of))
        .map(|step| step.trace.as_str())
        .collect();
    assert!(batches.iter().all(|batch| !traces.contains(batch.as_str())));
    let resource = &spans.iter().find(|span| span.service() == "offshoot-server").unwrap().resource;
    for name in ["service.version", "service.instance.id", "deployment.environment"] {
        assert!(resource.get(name).is_some_and(|value| !value.is_empty()), "{name}: {resource:?}");
    }
    // The checkpoint at the end asked for a snapshot.
    let snapshots = spans.iter().filter(|span| span.name == "snapshot.write");
    assert!(snapshots.count() >= 2, "one for each run");
    // Nothing of the texts, and no loss.
    let told = format!("{spans:?}");
    assert!(!told.contains("leaves") && !told.contains("loss"), "a text or a loss is in the spans");
}

#[test]
fn the_clients_decision_wins_and_a_collector_that_is_away_ends_nothing() {
    let sink = Sink::start();
    let place = Place::new(&["blue"]);
    let server = Server::start(&place, &sink.grpc());
    let unsampled = format!("--otlp-endpoint {} --trace-ratio 0", sink.grpc());
    let ended = place.train(&server, "blue", &unsampled).ends_well();
    let unsampled = ended.session;
    // Port 1 of loopback has no collector.
    let away = place.train(&server, "blue", "--otlp-endpoint http://127.0.0.1:1").ends_well();
    let told = away.stderr.matches("traces cannot be delivered to http://127.0.0.1:1").count();
    assert_eq!(told, 1, "once: {}", away.stderr);
    // Without any option nothing is decided, and the server decides.
    let plain = place.train(&server, "blue", "").ends_well();
    assert!(!plain.stderr.contains("traces"), "{}", plain.stderr);
    server.ends();
    let of = |spans: &[Seen], session: &str, name: &str| {
        let is = |span: &&Seen| span.attribute("offshoot.session") == session && span.name == name;
        spans.iter().filter(is).count() as u64
    };
    let spans = sink.wait_for("the server's spans", |spans| {
        of(spans, &away.session, "session.step") == N_STEPS
            && of(spans, &plain.session, "session.step") == N_STEPS
    });
    // What the server does by itself, such as parking the session at the end, is nobody's step.
    let is_of_unsampled = |span: &&Seen| {
        span.attribute("offshoot.session") == unsampled && span.name.starts_with("session.")
    };
    assert_eq!(spans.iter().find(is_of_unsampled), None, "the client said no");
    let roots = |session: &str| {
        let of = |span: &&Seen| span.attribute("offshoot.session") == session;
        spans.iter().filter(of).filter(|span| span.parent.is_empty()).count()
    };
    assert!(roots(&plain.session) > 0, "traces that begin at the server");
    // The client's own spans got lost; the server's are in its traces.
    let steps = spans.iter().filter(|span| span.name == "session.step");
    let of_away = steps.filter(|span| span.attribute("offshoot.session") == away.session);
    assert!(of_away.into_iter().all(|span| !span.parent.is_empty()));
}
