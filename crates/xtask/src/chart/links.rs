//! What schemas do not see: names by which the objects of one render refer to each other.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::document::{Document, containers, items};

/// References that lead nowhere, names that are taken twice, selectors that find nothing.
pub fn dangling(documents: &[Document]) -> Vec<String> {
    let mut wrong = twice(documents);
    let pods = pods(documents);
    for document in documents {
        let found = match document.kind() {
            "Service" => of_service(document, &pods),
            "PodDisruptionBudget" => of_selector(document, "/spec/selector", &pods),
            "NetworkPolicy" => of_policy(document, &pods),
            "Ingress" => of_ingress(document, documents),
            "GRPCRoute" | "TLSRoute" => of_route(document, documents),
            "BackendTLSPolicy" => of_tls_policy(document, documents),
            "ServiceMonitor" => of_monitor(document, documents),
            "PrometheusRule" => of_rules(document),
            "ConfigMap" => of_config(document),
            _ => of_pod(document, documents),
        };
        wrong.extend(found.into_iter().map(|wrong| format!("{}: {wrong}", document.title())));
    }
    wrong
}

fn twice(documents: &[Document]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let key =
        |document: &Document| (document.text("/metadata/namespace").to_owned(), document.title());
    let again = documents.iter().filter(|document| !seen.insert(key(document)));
    again.map(|document| format!("{} is there twice", document.title())).collect()
}

/// A pod that will be: its labels, with those that a StatefulSet's controller adds, and its template.
struct Pod<'a> {
    labels: Map<String, Value>,
    template: &'a Value,
}

fn pods(documents: &[Document]) -> Vec<Pod<'_>> {
    let mut pods = Vec::new();
    for document in documents {
        let Some(template) = document.pod() else { continue };
        let labels = template.pointer("/metadata/labels").and_then(Value::as_object);
        let labels = labels.cloned().unwrap_or_default();
        let replicas = document.0.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
        for replica in 0..replicas {
            let mut labels = labels.clone();
            if document.kind() == "StatefulSet" {
                let name = format!("{}-{replica}", document.name());
                labels.insert("statefulset.kubernetes.io/pod-name".into(), name.into());
            }
            pods.push(Pod { labels, template });
        }
    }
    pods
}

impl Pod<'_> {
    fn has_port(&self, port: &Value) -> bool {
        containers(self.template).any(|(_, container)| {
            items(container, "/ports")
                .any(|ours| ours["name"] == *port || ours["containerPort"] == *port)
        })
    }
}

fn matches(selector: &Value, labels: &Map<String, Value>) -> bool {
    selector.as_object().into_iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
}

fn of_service(service: &Document, pods: &[Pod]) -> Vec<String> {
    let selector = &service.0["spec"]["selector"];
    let chosen: Vec<_> = pods.iter().filter(|pod| matches(selector, &pod.labels)).collect();
    if chosen.is_empty() {
        return vec![format!("its selector finds no pod: {selector}")];
    }
    let ports = items(&service.0, "/spec/ports").map(|port| &port["targetPort"]);
    let lost = ports.filter(|port| !chosen.iter().all(|pod| pod.has_port(port)));
    lost.map(|port| format!("its pods have no port {port}")).collect()
}

/// Not more than the server's pods, either: those of tests have another component.
fn of_selector(document: &Document, pointer: &str, pods: &[Pod]) -> Vec<String> {
    let selector = document.0.pointer(pointer).map_or(&Value::Null, |found| &found["matchLabels"]);
    let is_server = |pod: &&Pod| pod.labels["app.kubernetes.io/component"] == "server";
    let chosen: Vec<_> = pods.iter().filter(|pod| matches(selector, &pod.labels)).collect();
    let all = pods.iter().filter(is_server).count();
    if chosen.len() == all && chosen.iter().all(is_server) {
        return Vec::new();
    }
    vec![format!("{pointer} finds {} pods, expected the {all} of the server", chosen.len())]
}

fn of_policy(policy: &Document, pods: &[Pod]) -> Vec<String> {
    let mut wrong = of_selector(policy, "/spec/podSelector", pods);
    for rule in items(&policy.0, "/spec/ingress") {
        for port in items(rule, "/ports").map(|port| &port["port"]) {
            if !pods.iter().any(|pod| pod.has_port(port)) {
                wrong.push(format!("no pod has the port {port}"));
            }
        }
    }
    wrong
}

fn service<'a>(documents: &'a [Document], name: &Value) -> Option<&'a Document> {
    documents.iter().find(|document| document.kind() == "Service" && document.name() == name)
}

/// Whether a Service has a port of this name or number.
fn service_has(documents: &[Document], name: &Value, port: &Value) -> bool {
    service(documents, name).is_some_and(|service| {
        items(&service.0, "/spec/ports").any(|ours| ours["port"] == *port || ours["name"] == *port)
    })
}

fn of_ingress(ingress: &Document, documents: &[Document]) -> Vec<String> {
    let mut wrong = Vec::new();
    for rule in items(&ingress.0, "/spec/rules") {
        for path in items(rule, "/http/paths") {
            let backend = &path["backend"]["service"];
            if !service_has(documents, &backend["name"], &backend["port"]["name"]) {
                wrong.push(format!("there is no Service for {backend}"));
            }
        }
        let hosts = || items(&ingress.0, "/spec/tls").flat_map(|tls| items(tls, "/hosts"));
        if !hosts().any(|host| *host == rule["host"]) {
            wrong.push(format!("{} is served without TLS", rule["host"]));
        }
    }
    wrong
}

fn of_route(route: &Document, documents: &[Document]) -> Vec<String> {
    let backends = items(&route.0, "/spec/rules").flat_map(|rule| items(rule, "/backendRefs"));
    let lost = backends.filter(|to| !service_has(documents, &to["name"], &to["port"]));
    lost.map(|to| format!("there is no Service for {to}")).collect()
}

fn of_tls_policy(policy: &Document, documents: &[Document]) -> Vec<String> {
    let targets = items(&policy.0, "/spec/targetRefs");
    let lost = targets.filter(|to| !service_has(documents, &to["name"], &to["sectionName"]));
    lost.map(|to| format!("there is no Service for {to}")).collect()
}

/// One Service, and each pod once: two would count everything twice.
fn of_monitor(monitor: &Document, documents: &[Document]) -> Vec<String> {
    let selector = &monitor.0["spec"]["selector"]["matchLabels"];
    let chosen: Vec<_> = documents
        .iter()
        .filter(|document| document.kind() == "Service")
        .filter(|service| {
            let labels = service.0.pointer("/metadata/labels").and_then(Value::as_object);
            labels.is_some_and(|labels| matches(selector, labels))
        })
        .collect();
    if chosen.len() != 1 {
        return vec![format!("its selector finds {} Services, expected 1", chosen.len())];
    }
    let name = &chosen[0].0["metadata"]["name"];
    let ports = items(&monitor.0, "/spec/endpoints").map(|endpoint| &endpoint["port"]);
    let lost = ports.filter(|port| !service_has(documents, name, port));
    lost.map(|port| format!("Service {name} has no port {port}")).collect()
}

fn of_rules(rules: &Document) -> Vec<String> {
    let count: usize =
        items(&rules.0, "/spec/groups").map(|group| items(group, "/rules").count()).sum();
    if count == 0 { vec!["it has no rules".into()] } else { Vec::new() }
}

/// A file that the chart lacks would be an empty text.
fn of_config(config: &Document) -> Vec<String> {
    let data = config.0["data"].as_object();
    let mut wrong = Vec::new();
    for (name, text) in data.into_iter().flatten() {
        let text = text.as_str().unwrap_or_default();
        if text.trim().is_empty() {
            wrong.push(format!("{name} is empty"));
        } else if name.ends_with(".json") && serde_json::from_str::<Value>(text).is_err() {
            wrong.push(format!("{name} is no JSON"));
        }
    }
    wrong
}

/// Mounts and volumes, and the ConfigMaps and Secrets that the chart should have made.
fn of_pod(document: &Document, documents: &[Document]) -> Vec<String> {
    let Some(pod) = document.pod() else { return Vec::new() };
    let mut wrong = Vec::new();
    let templates = items(&document.0, "/spec/volumeClaimTemplates")
        .filter_map(|claim| claim.pointer("/metadata/name"));
    let volumes: BTreeSet<&str> = items(pod, "/spec/volumes")
        .map(|volume| &volume["name"])
        .chain(templates)
        .filter_map(Value::as_str)
        .collect();
    let mut mounted = BTreeSet::new();
    for (name, container) in containers(pod) {
        for mount in items(container, "/volumeMounts") {
            let volume = mount["name"].as_str().unwrap_or_default();
            mounted.insert(volume);
            if !volumes.contains(volume) {
                wrong.push(format!("container {name} mounts {volume:?}, which is no volume"));
            }
            // A file mounted alone is never renewed.
            if !mount["subPath"].is_null() && volume != "model" {
                wrong.push(format!("container {name} mounts {volume:?} with a subPath"));
            }
        }
    }
    let idle = volumes.difference(&mounted);
    wrong.extend(idle.map(|volume| format!("nothing mounts the volume {volume:?}")));
    for volume in items(pod, "/spec/volumes") {
        let ours = [
            ("ConfigMap", &volume["configMap"]["name"]),
            ("Secret", &volume["secret"]["secretName"]),
            ("PersistentVolumeClaim", &volume["persistentVolumeClaim"]["claimName"]),
        ];
        for (kind, name) in ours {
            let Some(name) = name.as_str().filter(|name| name.starts_with("trunk-offshoot")) else {
                continue;
            };
            if !is_made(documents, kind, name) {
                wrong.push(format!("nothing makes the {kind} {name:?}"));
            }
        }
    }
    let seconds = |pointer: &str| pod.pointer(pointer).and_then(Value::as_u64);
    let grace = seconds("/spec/terminationGracePeriodSeconds");
    let sleep = seconds("/spec/containers/0/lifecycle/preStop/sleep/seconds");
    if sleep.is_some_and(|sleep| grace.is_none_or(|grace| grace < sleep + 15)) {
        wrong.push(format!("a grace period of {grace:?} leaves no time to drain after {sleep:?}"));
    }
    wrong
}

fn is_made(documents: &[Document], kind: &str, name: &str) -> bool {
    documents.iter().any(|document| {
        let by_itself = document.kind() == kind && document.name() == name;
        let by_cert_manager = document.kind() == "Certificate"
            && kind == "Secret"
            && document.text("/spec/secretName") == name;
        by_itself || by_cert_manager
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Vec<Value> {
        let labels = json!({"app.kubernetes.io/component": "server", "x": "y"});
        vec![
            json!({"kind": "StatefulSet", "metadata": {"name": "s"}, "spec": {
                "replicas": 2,
                "volumeClaimTemplates": [{"metadata": {"name": "store"}}],
                "template": {"metadata": {"labels": labels}, "spec": {
                    "volumes": [{"name": "settings", "configMap": {"name": "trunk-offshoot"}}],
                    "containers": [{
                        "name": "c",
                        "ports": [{"name": "grpc", "containerPort": 1}],
                        "volumeMounts": [{"name": "store"}, {"name": "settings"}],
                    }],
                }},
            }}),
            json!({"kind": "ConfigMap", "metadata": {"name": "trunk-offshoot"}, "data": {"a.json": "{}"}}),
            json!({"kind": "Service", "metadata": {"name": "v", "labels": {"l": "m"}}, "spec": {
                "selector": {"x": "y", "statefulset.kubernetes.io/pod-name": "s-1"},
                "ports": [{"name": "grpc", "port": 50051, "targetPort": "grpc"}],
            }}),
            json!({"kind": "GRPCRoute", "metadata": {"name": "r"}, "spec": {
                "rules": [{"backendRefs": [{"name": "v", "port": 50051}]}],
            }}),
            json!({"kind": "PodDisruptionBudget", "metadata": {"name": "p"}, "spec": {
                "selector": {"matchLabels": {"x": "y"}},
            }}),
            json!({"kind": "ServiceMonitor", "metadata": {"name": "m"}, "spec": {
                "selector": {"matchLabels": {"l": "m"}}, "endpoints": [{"port": "grpc"}],
            }}),
        ]
    }

    #[test]
    fn what_fits_passes() {
        let documents: Vec<_> = good().into_iter().map(Document).collect();
        assert_eq!(dangling(&documents), Vec::<String>::new());
    }

    #[test]
    fn each_loose_end_is_found() {
        let cases = [
            (
                0,
                "/spec/template/spec/volumes/0/configMap/name",
                json!("trunk-offshoot-b"),
                "nothing makes the ConfigMap",
            ),
            (
                0,
                "/spec/template/spec/containers/0/volumeMounts/0/name",
                json!("stor"),
                "which is no volume",
            ),
            (0, "/spec/template/spec/containers/0/ports/0/name", json!("http"), "have no port"),
            (0, "/spec/replicas", json!(1), "finds no pod"),
            (2, "/spec/selector/x", json!("z"), "its selector finds no pod"),
            (2, "/metadata/name", json!("w"), "there is no Service for"),
            (2, "/spec/ports/0/port", json!(1), "there is no Service for"),
            (4, "/spec/selector/matchLabels/x", json!("z"), "finds 0 pods"),
            (5, "/spec/selector/matchLabels/l", json!("n"), "finds 0 Services"),
            (5, "/spec/endpoints/0/port", json!("http"), "has no port"),
            (1, "/kind", json!("StatefulSet"), "nothing makes"),
            (1, "/data/a.json", json!(" "), "a.json is empty"),
            (1, "/data/a.json", json!("{"), "a.json is no JSON"),
        ];
        for (which, pointer, value, expected) in cases {
            let mut all = good();
            *all[which].pointer_mut(pointer).unwrap() = value;
            let documents: Vec<_> = all.into_iter().map(Document).collect();
            let found = dangling(&documents).join("\n");
            assert!(found.contains(expected), "{pointer}: {found}");
        }
        let documents: Vec<_> = good().into_iter().chain(good()).map(Document).collect();
        assert!(
            dangling(&documents).join("\n").contains("ConfigMap/trunk-offshoot is there twice")
        );
    }
}
