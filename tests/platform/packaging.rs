//! What stands around the image: the compose file with its parts' settings, and the version that several
//! files name. No engine runs here; each file is checked by the program that reads it, as far as that can
//! be had.

use offshoot_platform::{root, tool};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn yaml(path: &str) -> Value {
    let text = std::fs::read_to_string(root().join(path)).unwrap();
    serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
}

fn words(value: &Value) -> Vec<String> {
    let words = value.as_array().into_iter().flatten();
    words.map(|word| word.as_str().unwrap_or_default().to_string()).collect()
}

/// A program must accept the first file and refuse the second.
fn accepts(command: impl Fn(&Path) -> Command, good: &Path, bad: &Path) {
    let run = |file: &Path| {
        let output = command(file).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let (is_good, said) = run(good);
    assert!(is_good, "{}: {said}", good.display());
    let (is_good, said) = run(bad);
    assert!(!is_good, "accepted {}: {said}", bad.display());
}

#[test]
fn the_compose_file_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let good = root().join("docker/compose.yaml");
    let bad = folder.path().join("compose.yaml");
    let text = std::fs::read_to_string(&good).unwrap();
    std::fs::write(&bad, text.replace("read_only: true", "read_only: 7")).unwrap();
    let check = |file: &Path| {
        let mut command = Command::new(tool("check-jsonschema"));
        command.args(["--builtin-schema", "vendor.compose-spec"]).arg(file);
        command
    };
    accepts(check, &good, &bad);
}

#[test]
fn everything_that_the_compose_file_names_is_there() {
    let compose = yaml("docker/compose.yaml");
    let (services, volumes) = (&compose["services"], keys(&compose["volumes"]));
    let names = keys(services);
    for (name, service) in services.as_object().unwrap() {
        for needed in keys(&service["depends_on"]) {
            assert!(names.contains(&needed), "{name} depends on {needed}");
        }
        for mount in words(&service["volumes"]) {
            let source = mount.split(':').next().unwrap();
            match source.starts_with('.') {
                true => {
                    let path = root().join("docker").join(source);
                    assert!(path.is_file(), "{name} mounts {source}, which is not there");
                }
                false => assert!(volumes.contains(source), "{name} mounts {source}"),
            }
        }
        // Only this machine reaches them.
        for port in words(&service["ports"]) {
            assert!(port.starts_with("127.0.0.1:"), "{name} publishes {port}");
        }
    }
    let tenants = &services["tenants"];
    assert_eq!(tenants["entrypoint"][0], "/demo/tenants.sh");
    // A team's container sees its own token only.
    for team in ["support", "scribe"] {
        let mounts = words(&services[team]["volumes"]);
        let tokens: Vec<_> = mounts.iter().filter(|mount| mount.starts_with("token-")).collect();
        assert_eq!(tokens, [&format!("token-{team}:/tokens/{team}:ro")]);
    }
}

/// Addresses by which the parts reach each other, as `HOST:PORT` in a text.
fn addresses(text: &str, hosts: &BTreeSet<String>) -> BTreeSet<String> {
    let is_part = |c: char| !c.is_alphanumeric() && !"-:.".contains(c);
    let found = text.split(is_part).filter_map(|word| {
        let (host, port) = word.trim_matches(':').split_once(':')?;
        (hosts.contains(host) && port.parse::<u16>().is_ok()).then(|| format!("{host}:{port}"))
    });
    found.collect()
}

#[test]
fn the_parts_find_each_other() {
    let compose = yaml("docker/compose.yaml");
    let hosts = keys(&compose["services"]);
    let mut named = BTreeSet::new();
    for file in [
        "compose.yaml",
        "collector.yaml",
        "prometheus.yaml",
        "grafana/datasources.yaml",
        "demo/team.sh",
    ] {
        let text = std::fs::read_to_string(root().join("docker").join(file)).unwrap();
        named.extend(addresses(&text, &hosts));
    }
    // Where each of them listens, by its own documentation or its settings here.
    let listening = [
        "server:50051",
        "server:9464",
        "collector:4317",
        "collector:8888",
        "jaeger:4317",
        "jaeger:16686",
        "prometheus:9090",
    ];
    assert_eq!(named, listening.map(String::from).into());
    let settings = std::fs::read_to_string(root().join("docker/server.toml")).unwrap();
    assert!(settings.contains("port = 9464"), "{settings}");
}

#[test]
fn prometheus_takes_its_settings_and_rules() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules");
    std::fs::create_dir(&rules).unwrap();
    for name in ["alerts.yaml", "recording.yaml"] {
        let from = root().join("charts/offshoot/files").join(name);
        std::fs::copy(from, rules.join(name)).unwrap();
    }
    let (good, bad) = (folder.path().join("good.yaml"), folder.path().join("bad.yaml"));
    let text = std::fs::read_to_string(root().join("docker/prometheus.yaml")).unwrap();
    std::fs::write(&good, &text).unwrap();
    std::fs::write(&bad, text.replace("scrape_interval: 5s", "scrape_interval: often")).unwrap();
    let check = |file: &Path| {
        let mut command = Command::new(tool("promtool"));
        command.args(["check", "config"]).arg(file);
        command
    };
    accepts(check, &good, &bad);
}

#[test]
fn the_collectors_pipelines_use_what_is_defined() {
    // The collector itself cannot be had here: its own words of the file's shape.
    let config = yaml("docker/collector.yaml");
    let pipelines = config["service"]["pipelines"].as_object().unwrap();
    assert!(pipelines.contains_key("traces"));
    let mut used = BTreeSet::new();
    for (name, pipeline) in pipelines {
        for kind in ["receivers", "processors", "exporters"] {
            let words = words(&pipeline[kind]);
            assert!(!words.is_empty(), "{name} has no {kind}");
            for word in words {
                assert!(keys(&config[kind]).contains(&word), "{name}: {word} is no one of {kind}");
                used.insert(word);
            }
        }
    }
    for kind in ["receivers", "processors", "exporters"] {
        for defined in keys(&config[kind]) {
            assert!(used.contains(&defined), "{defined} is used by no pipeline");
        }
    }
    let grpc = &config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"];
    assert_eq!(grpc, "0.0.0.0:4317");
}

#[test]
fn the_image_and_the_chart_are_of_this_version() {
    let dockerfile = std::fs::read_to_string(root().join("docker/Dockerfile")).unwrap();
    let line = format!("ARG VERSION={}\n", env!("CARGO_PKG_VERSION"));
    assert!(dockerfile.contains(&line), "docker/Dockerfile: expected {line:?}");
    let chart = yaml("charts/offshoot/Chart.yaml");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
