//! Metrics end to end: a real server that is trained on, a real Prometheus that scrapes it, a real collector
//! that takes the same by OTLP; the rules, the dashboard and the documents that build on them.

#[path = "metrics/processes.rs"]
mod processes;

use offshoot_platform::collector::Collector;
use offshoot_platform::metric_sink::MetricSink;
use offshoot_platform::process::wait_for;
use offshoot_platform::{root, tool};
use processes::{Place, Prometheus, Server};
use std::collections::BTreeSet;
use std::process::Command;

/// Those that a machine without a GPU, and a server without failures, do not have.
const ABSENT: [&str; 6] = [
    "offshoot_gpu_memory_usage_bytes",
    "offshoot_gpu_memory_limit_bytes",
    "offshoot_gpu_utilization_ratio",
    "offshoot_gpu_temperature_celsius",
    "offshoot_gpu_power_watts",
    "offshoot_snapshot_failures_total",
];
/// Panels of those.
const EMPTY_PANELS: [&str; 4] =
    ["GPU load", "GPU memory", "GPU temperature and power", "Snapshots that failed"];

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// OpenTelemetry's and Prometheus' names and the types, from the table of the documents.
fn documented() -> Vec<(String, String, String)> {
    let text = read("docs/observability.md");
    let rows = text.lines().filter(|line| line.starts_with("| `offshoot."));
    let name = |cell: &str| cell.trim().trim_matches('`').to_string();
    let rows = rows.map(|row| row.split('|').skip(1).map(name).collect::<Vec<_>>());
    let rows: Vec<_> =
        rows.map(|cells| (cells[0].clone(), cells[1].clone(), cells[2].clone())).collect();
    assert!(rows.len() > 30, "the table was not found");
    rows
}

#[test]
fn a_real_prometheus_and_the_far_end_of_otlp_get_what_the_documents_say() {
    let sink = MetricSink::start();
    let collector = Collector::start(&sink.http());
    let place = Place::new();
    let server = Server::start(&place, &collector.grpc());
    let prometheus = Prometheus::start(&place, &server);
    // Series begin with the first run; what grows is seen in the second.
    for run in 1..=2 {
        place.train(&server);
        place.is_refused(&server);
        let steps = "sum(offshoot_steps_total)";
        let expected = (run * processes::N_STEPS) as f64;
        wait_for("the steps", || prometheus.value(steps) == Some(expected));
        let refused = r#"sum(offshoot_errors_total{label="unauthenticated"})"#;
        wait_for("the refusals", || prometheus.value(refused) >= Some(run as f64));
    }
    everything_is_there(&prometheus);
    the_numbers_are_right(&prometheus);
    panels_show_something(&prometheus);
    let firing = prometheus.labels(r#"ALERTS{alertstate="firing"}"#, "alertname");
    assert!(firing.is_empty(), "{firing:?}");

    let tokens = prometheus.value("sum(offshoot_tokens_total)").unwrap();
    server.ends();
    // The last values go out when the server ends.
    wait_for("the tokens by OTLP", || sink.last().get("offshoot.tokens") == Some(&tokens));
    let last = sink.last();
    for (name, page, _) in documented() {
        assert!(last.contains_key(&name) || ABSENT.contains(&page.as_str()), "{name} did not come");
    }
    let told: f64 = place.metered().iter().map(|line| line["steps"].as_f64().unwrap()).sum();
    assert_eq!(told, 2.0 * processes::N_STEPS as f64, "steps in the metering log");
}

fn everything_is_there(prometheus: &Prometheus) {
    let there = prometheus.labels(r#"{job="trunk"}"#, "__name__");
    for (_, name, kind) in documented() {
        let series = if kind == "histogram" { format!("{name}_bucket") } else { name.clone() };
        let absent = ABSENT.contains(&name.as_str());
        assert_eq!(there.contains(&series), !absent, "{name}: there are {there:?}");
    }
}

fn the_numbers_are_right(prometheus: &Prometheus) {
    let value =
        |query: &str| prometheus.value(query).unwrap_or_else(|| panic!("{query} has no value"));
    let of = |kind| value(&format!(r#"offshoot_tokens_total{{tenant="blue", kind="{kind}"}}"#));
    assert!(of("forward") > 0.0);
    assert_eq!(of("forward"), of("backward"), "each microbatch has its backward");
    // Whoever counts jobs and whoever counts steps agree.
    let jobs = r#"offshoot_job_duration_seconds_count{tenant="blue", kind="step", phase="queue"}"#;
    assert_eq!(value(jobs), value(r#"offshoot_steps_total{tenant="blue"}"#));
    let forwards =
        r#"offshoot_job_duration_seconds_count{tenant="blue", kind="forward", phase="execute"}"#;
    let expected = 2 * processes::N_STEPS * processes::N_MICROBATCHES;
    assert_eq!(value(forwards), expected as f64);
    let busy = value("offshoot_engine_busy_time_seconds_total");
    let shares = value("sum(offshoot_device_time_seconds_total)");
    assert!(shares > 0.0 && shares <= busy, "{shares} s of {busy} s were shared out");
    let held = "max_over_time((sum(offshoot_memory_usage_bytes))[5m:1s])";
    assert!(value(held) <= value("offshoot_memory_budget_bytes"), "more than the budget");
    assert!(value("offshoot_memory_peak_bytes") >= value(held));
    let received = r#"offshoot_network_io_bytes_total{tenant="blue", direction="receive"}"#;
    // Hidden states of 2 bytes a value at least; the fixture is 32 wide or more.
    assert!(value(received) > of("forward") * 32.0 * 2.0);
    assert_eq!(value("offshoot_serving"), 1.0);
}

fn panels_show_something(prometheus: &Prometheus) {
    let text = read("charts/offshoot/files/dashboard.json");
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut n_queries = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            let mut query = query.replace("$__rate_interval", "5m");
            for variable in ["namespace", "instance", "tenant"] {
                query = query.replace(&format!("${variable}"), ".*");
            }
            assert!(!query.contains('$'), "{title}: {query}");
            n_queries += 1;
            if EMPTY_PANELS.contains(&title) {
                assert!(prometheus.value(&query).is_none(), "{title} shows something: {query}");
                continue;
            }
            wait_for(&format!("{title}: {query}"), || {
                prometheus.value(&query).is_some_and(|value| !value.is_nan())
            });
        }
    }
    assert!(n_queries > 40, "{n_queries}");
}

#[test]
fn the_rules_are_what_promtool_takes_and_fire_when_they_should() {
    let files = ["alerts", "recording"].map(|name| format!("charts/offshoot/files/{name}.yaml"));
    let run = |args: &[&str]| {
        let output =
            Command::new(tool("promtool")).args(args).current_dir(root()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    };
    run(&["check", "rules", &files[0], &files[1]]);
    run(&["test", "rules", "tests/platform/metrics/rules_test.yaml"]);
    // Each alert has a test that it fires alone.
    let tests = read("tests/platform/metrics/rules_test.yaml");
    for alert in alerts() {
        assert!(tests.contains(&format!("{{alertname=\"{alert}\"}}")), "{alert} has no test");
    }
}

fn alerts() -> BTreeSet<String> {
    let text = read("charts/offshoot/files/alerts.yaml");
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let names: BTreeSet<String> = names.map(String::from).collect();
    for name in &names {
        let runbook = format!("runbook: docs/operations.md#{}", name.to_lowercase());
        assert!(text.contains(&runbook), "{name} does not name its runbook");
    }
    names
}

#[test]
fn each_alert_has_its_runbook_and_each_runbook_its_alert() {
    let text = read("docs/operations.md");
    let titles = text.lines().filter_map(|line| line.strip_prefix("### Offshoot"));
    let told: BTreeSet<String> = titles.map(|title| format!("Offshoot{title}")).collect();
    assert_eq!(told, alerts());
}

#[test]
fn rules_and_dashboard_name_metrics_that_there_are() {
    let known: BTreeSet<String> = documented().into_iter().map(|(_, name, _)| name).collect();
    for file in ["alerts.yaml", "recording.yaml", "dashboard.json"] {
        let text = read(&format!("charts/offshoot/files/{file}"));
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "_:".contains(c)));
        for word in words.filter(|word| word.starts_with("offshoot_")) {
            let bare = ["_bucket", "_sum", "_count"];
            let bare = bare.iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
            assert!(known.contains(word) || known.contains(bare), "{file}: {word}");
        }
    }
}
