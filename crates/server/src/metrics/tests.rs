use super::definition::Type;
use super::*;
use crate::config::TelemetryConfig;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

fn metrics() -> Metrics {
    Metrics::start(&TelemetryConfig::default(), Build::default()).unwrap()
}

/// What the page says of each metric: its type, and the names of its labels.
fn families(page: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut families: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    let typed = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    for (name, kind) in typed.filter_map(|line| line.split_once(' ')) {
        families.insert(name.into(), (kind.into(), BTreeSet::new()));
    }
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels) = line.split_once('{').unwrap_or((line, ""));
        let known = families.iter_mut().find(|(family, _)| {
            let rest = name.strip_prefix(family.as_str());
            rest.is_some_and(|rest| ["", "_bucket", "_sum", "_count"].contains(&rest))
        });
        let Some((_, (_, known))) = known else { continue };
        let keys = labels.split(',').filter_map(|pair| pair.split_once('=')).map(|(key, _)| key);
        known.extend(keys.filter(|key| *key != "le").map(String::from));
    }
    families
}

#[test]
fn the_page_names_things_as_the_definitions_say() {
    let metrics = metrics();
    let series = metrics.tenant(&"blue \"x\"\n".into());
    let execute = Duration::from_millis(30);
    let ran = |kind| Ran { kind, n_tokens: 7, queue: execute, execute, share: execute / 2 };
    for kind in [JobKind::Forward, JobKind::Evaluate, JobKind::Extend, JobKind::Backward] {
        series.ran(ran(kind));
    }
    series.stepped(Phases { wire: execute, queue: execute, execute });
    series.io(Direction::Receive, 10);
    series.snapshot(execute, Ok(100));
    series.snapshot(execute, Err(&Error::TakenOver));
    let _stream = series.stream();
    metrics.instruments().batch("forward", 2, 14);
    metrics.refused("blue \"x\"\n", "quota");
    let page = metrics.page();
    let families = families(&page);
    let mut observed = Vec::new();
    for metric in ALL {
        let Some((kind, labels)) = families.get(&metric.prometheus_name()) else {
            observed.push(metric);
            continue;
        };
        assert_eq!(kind, metric.kind.name(), "{}", metric.name);
        let expected: BTreeSet<String> = metric.labels.iter().map(|l| l.to_string()).collect();
        assert_eq!(*labels, expected, "{}", metric.name);
        assert!(page.contains(&format!("# HELP {} ", metric.prometheus_name())), "{page}");
    }
    // Those that are looked at are not there yet; tests/platform/metrics.rs finds them all.
    assert!(
        observed.iter().all(|metric| !matches!(metric.kind, Type::Histogram(_))),
        "{observed:?}"
    );
    assert_eq!(families.len() + observed.len(), ALL.len(), "{page}");
    let line = r#"offshoot_tokens_total{kind="forward",tenant="blue \"x\"\n"} 7"#;
    assert!(page.contains(line), "{page}");
    let bucket = r#"kind="forward",phase="execute",tenant="blue \"x\"\n",le="0.025"} 0"#;
    assert!(page.contains(bucket) && page.contains(&bucket.replace("0.025\"} 0", "0.05\"} 1")));
    // No scopes and no resource on every line.
    assert!(!page.contains("otel_scope") && !page.contains("target_info"), "{page}");
}

#[test]
fn more_tenants_than_there_is_room_for_share_one_series() {
    let metrics = metrics();
    for n in 0..SERIES_OF_TENANTS + 50 {
        metrics.refused(&format!("tenant-{n}"), "quota");
    }
    let page = metrics.page();
    let lines = page.lines().filter(|line| line.starts_with("offshoot_errors_total{"));
    assert!(lines.clone().count() <= SERIES_OF_TENANTS + 1);
    assert!(lines.clone().any(|line| line.contains("otel_metric_overflow=\"true\"")));
}

/// A row for each metric: OpenTelemetry's name, Prometheus', type, unit, labels, meaning.
fn row(metric: &definition::Definition) -> String {
    let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
    format!(
        "| `{}` | `{}` | {} | `{}` | {} | {} |",
        metric.name,
        metric.prometheus_name(),
        metric.kind.name(),
        metric.unit,
        labels.join(", "),
        metric.about
    )
}

#[test]
fn the_table_in_the_docs_is_what_there_is() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/observability.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- metrics: begin -->\n", "<!-- metrics: end -->");
    let (head, rest) = text.split_once(begin).expect("the table's begin is marked");
    let (told, tail) = rest.split_once(end).expect("the table's end is marked");
    let title = "| OpenTelemetry | Prometheus | Type | Unit | Labels | Meaning |\n|---|---|---|---|---|---|\n";
    let rows: Vec<_> = ALL.iter().map(|metric| row(metric)).collect();
    let expected = format!("{title}{}\n", rows.join("\n"));
    if std::env::var_os("OFFSHOOT_UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{head}{begin}{expected}{end}{tail}")).unwrap();
        return;
    }
    assert!(
        told == expected,
        "the table is not what the program has; OFFSHOOT_UPDATE_DOCS=1 cargo test -p offshoot-server \
         the_table_in_the_docs writes it anew:\n{expected}"
    );
}
