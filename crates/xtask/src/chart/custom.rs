//! Custom resources: the fields of them that the chart writes, as their definitions have them (Gateway API
//! 1.5, prometheus-operator 0.90, cert-manager 1.20). A field that is not listed is a mistake: a cluster
//! would drop it without a word.

use serde_json::Value;

use super::document::Document;

/// One field: its path below the object ("*" is any item of a list, "**" anything below), its type, and
/// whether it must be there when what it stands in is.
struct Field {
    path: &'static str,
    kind: &'static str,
    required: bool,
}

const fn must(path: &'static str, kind: &'static str) -> Field {
    Field { path, kind, required: true }
}

const fn may(path: &'static str, kind: &'static str) -> Field {
    Field { path, kind, required: false }
}

/// Of every object.
const METADATA: [Field; 6] = [
    must("/apiVersion", "string"),
    must("/kind", "string"),
    must("/metadata/name", "string"),
    must("/metadata/namespace", "string"),
    may("/metadata/labels/**", "string"),
    may("/metadata/annotations/**", "string"),
];

const ROUTE: [Field; 9] = [
    may("/spec/parentRefs/*/group", "string"),
    may("/spec/parentRefs/*/kind", "string"),
    must("/spec/parentRefs/*/name", "string"),
    may("/spec/parentRefs/*/namespace", "string"),
    may("/spec/parentRefs/*/sectionName", "string"),
    may("/spec/parentRefs/*/port", "integer"),
    must("/spec/hostnames/*", "hostname"),
    must("/spec/rules/*/backendRefs/*/name", "string"),
    must("/spec/rules/*/backendRefs/*/port", "integer"),
];

const BACKEND_TLS: [Field; 9] = [
    must("/spec/targetRefs/*/group", "string"),
    must("/spec/targetRefs/*/kind", "string"),
    must("/spec/targetRefs/*/name", "string"),
    may("/spec/targetRefs/*/sectionName", "string"),
    must("/spec/validation/caCertificateRefs/*/group", "string"),
    must("/spec/validation/caCertificateRefs/*/kind", "string"),
    must("/spec/validation/caCertificateRefs/*/name", "string"),
    may("/spec/validation/wellKnownCACertificates", "string"),
    must("/spec/validation/hostname", "hostname"),
];

const CERTIFICATE: [Field; 12] = [
    must("/spec/secretName", "string"),
    may("/spec/duration", "duration"),
    may("/spec/renewBefore", "duration"),
    may("/spec/privateKey/algorithm", "string"),
    may("/spec/privateKey/size", "integer"),
    may("/spec/privateKey/rotationPolicy", "string"),
    may("/spec/usages/*", "string"),
    must("/spec/dnsNames/*", "hostname"),
    may("/spec/ipAddresses/*", "string"),
    must("/spec/issuerRef/name", "string"),
    may("/spec/issuerRef/kind", "string"),
    may("/spec/issuerRef/group", "string"),
];

const SERVICE_MONITOR: [Field; 16] = [
    may("/spec/jobLabel", "string"),
    must("/spec/selector/matchLabels/**", "string"),
    must("/spec/endpoints/*/port", "string"),
    may("/spec/endpoints/*/path", "string"),
    may("/spec/endpoints/*/interval", "duration"),
    may("/spec/endpoints/*/scrapeTimeout", "duration"),
    must("/spec/endpoints/*/scheme", "string"),
    may("/spec/endpoints/*/authorization/type", "string"),
    must("/spec/endpoints/*/authorization/credentials/name", "string"),
    must("/spec/endpoints/*/authorization/credentials/key", "string"),
    may("/spec/endpoints/*/tlsConfig/serverName", "hostname"),
    may("/spec/endpoints/*/tlsConfig/insecureSkipVerify", "boolean"),
    must("/spec/endpoints/*/tlsConfig/ca/secret/name", "string"),
    must("/spec/endpoints/*/tlsConfig/ca/secret/key", "string"),
    may("/spec/endpoints/*/relabelings/**", "string"),
    may("/spec/endpoints/*/metricRelabelings/**", "string"),
];

const PROMETHEUS_RULE: [Field; 9] = [
    must("/spec/groups/*/name", "string"),
    may("/spec/groups/*/interval", "duration"),
    may("/spec/groups/*/rules/*/record", "string"),
    may("/spec/groups/*/rules/*/alert", "string"),
    must("/spec/groups/*/rules/*/expr", "string"),
    may("/spec/groups/*/rules/*/for", "duration"),
    may("/spec/groups/*/rules/*/keep_firing_for", "duration"),
    may("/spec/groups/*/rules/*/labels/**", "string"),
    may("/spec/groups/*/rules/*/annotations/**", "string"),
];

fn fields(document: &Document) -> Option<&'static [Field]> {
    Some(match (document.text("/apiVersion"), document.kind()) {
        ("gateway.networking.k8s.io/v1", "GRPCRoute" | "TLSRoute") => &ROUTE,
        ("gateway.networking.k8s.io/v1", "BackendTLSPolicy") => &BACKEND_TLS,
        ("cert-manager.io/v1", "Certificate") => &CERTIFICATE,
        ("monitoring.coreos.com/v1", "ServiceMonitor") => &SERVICE_MONITOR,
        ("monitoring.coreos.com/v1", "PrometheusRule") => &PROMETHEUS_RULE,
        _ => return None,
    })
}

/// Fields that are unknown, missing or of another type.
pub fn mistakes(document: &Document) -> Vec<String> {
    let Some(own) = fields(document) else {
        return vec![format!(
            "{}: no fields are known of {}: list them in custom.rs",
            document.title(),
            document.text("/apiVersion")
        )];
    };
    let mut leaves = Vec::new();
    collect(&document.0, String::new(), &mut leaves);
    let known = || METADATA.iter().chain(own);
    let mut wrong = Vec::new();
    for (path, value) in &leaves {
        match known().find(|field| covers(field.path, path)) {
            None => wrong.push(format!("{path} is no field of it")),
            Some(field) if !is_a(field.kind, value) => {
                wrong.push(format!("{path} is {value}: expected a {}", field.kind));
            }
            Some(_) => {}
        }
    }
    for field in known().filter(|field| field.required) {
        for place in places(&document.0, field.path) {
            wrong.push(format!("{place} is missing"));
        }
    }
    wrong.into_iter().map(|wrong| format!("{}: {wrong}", document.title())).collect()
}

/// Everything that has nothing below it, an empty list or object too.
fn collect<'a>(value: &'a Value, path: String, leaves: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(key, value)| {
                collect(value, format!("{path}/{}", escaped(key)), leaves)
            });
        }
        Value::Array(items) if !items.is_empty() => {
            items
                .iter()
                .enumerate()
                .for_each(|(i, value)| collect(value, format!("{path}/{i}"), leaves));
        }
        _ => leaves.push((path, value)),
    }
}

/// Labels have slashes in their names.
fn escaped(key: &str) -> String {
    key.replace('/', "~1")
}

fn covers(pattern: &str, path: &str) -> bool {
    let (mut pattern, mut path) = (pattern.split('/'), path.split('/'));
    loop {
        match (pattern.next(), path.next()) {
            (Some("**"), Some(_)) | (None, None) => return true,
            (Some("*"), Some(item)) if item.parse::<usize>().is_ok() => {}
            (Some(expected), Some(found)) if expected == found => {}
            _ => return false,
        }
    }
}

fn is_a(kind: &str, value: &Value) -> bool {
    match (kind, value) {
        ("string", Value::String(_)) | ("boolean", Value::Bool(_)) => true,
        ("integer", Value::Number(number)) => number.is_u64(),
        ("hostname", Value::String(text)) => {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
            let text = text.strip_prefix("*.").unwrap_or(text);
            !text.is_empty() && text.chars().all(good) && !text.starts_with(['.', '-'])
        }
        ("duration", Value::String(text)) => {
            let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            let unit = &text[digits.len()..];
            digits.parse::<u64>().is_ok() && ["ms", "s", "m", "h", "d"].contains(&unit)
        }
        _ => false,
    }
}

/// Where a field is missing although what it stands in is there. Lists on the way must be there, too, and
/// have an item, unless they stand in something that may be absent.
fn places(root: &Value, path: &str) -> Vec<String> {
    let steps: Vec<&str> = path.split('/').skip(1).collect();
    let mut missing = Vec::new();
    walk(root, &steps, String::new(), &mut missing);
    missing
}

fn walk(value: &Value, steps: &[&str], at: String, missing: &mut Vec<String>) {
    match steps {
        [] => {}
        ["**"] => {
            if value.as_object().is_none_or(serde_json::Map::is_empty) {
                missing.push(at);
            }
        }
        ["*", rest @ ..] => match value.as_array().filter(|items| !items.is_empty()) {
            None => missing.push(at),
            Some(items) => {
                let walk = |(i, item)| walk(item, rest, format!("{at}/{i}"), missing);
                items.iter().enumerate().for_each(walk);
            }
        },
        [key, rest @ ..] => match value.get(key) {
            Some(value) => walk(value, rest, format!("{at}/{key}"), missing),
            // Something optional that is not there has nothing in it.
            None if OPTIONAL.contains(key) => {}
            None => missing.push(format!("{at}/{key}")),
        },
    }
}

/// What may be absent with all its required fields.
const OPTIONAL: [&str; 5] = ["authorization", "tlsConfig", "ca", "caCertificateRefs", "parentRefs"];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn route() -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GRPCRoute",
            "metadata": {"name": "r", "namespace": "n", "labels": {"a/b": "c"}},
            "spec": {
                "parentRefs": [{"name": "g"}],
                "hostnames": ["trunk.example.com"],
                "rules": [{"backendRefs": [{"name": "s", "port": 50051}]}],
            },
        })
    }

    #[test]
    fn what_the_definitions_have_passes() {
        assert_eq!(mistakes(&Document(route())), Vec::<String>::new());
        let monitor = json!({
            "apiVersion": "monitoring.coreos.com/v1", "kind": "ServiceMonitor",
            "metadata": {"name": "m", "namespace": "n"},
            "spec": {"selector": {"matchLabels": {"a": "b"}}, "endpoints": [{"port": "http", "scheme": "http", "interval": "30s"}]},
        });
        assert_eq!(mistakes(&Document(monitor)), Vec::<String>::new());
    }

    #[test]
    fn unknown_missing_and_wrong_fields_are_told() {
        let cases = [
            ("/spec/rules/0/backendRefs/0", "port", json!("50051"), "expected a integer"),
            ("/spec/rules/0/backendRefs/0", "wheight", json!(1), "/wheight is no field of it"),
            ("/spec/rules/0", "backendRefs", json!([]), "/spec/rules/0/backendRefs is missing"),
            ("/spec", "hostnames", json!([]), "/spec/hostnames is missing"),
            ("/spec", "hostnames", json!(["Trunk example"]), "expected a hostname"),
            ("/spec", "hostname", json!("x"), "/spec/hostname is no field of it"),
            ("/spec/parentRefs/0", "name", Value::Null, "expected a string"),
            ("", "spec", json!({}), "/spec/rules is missing"),
            ("", "kind", json!("HTTPRoute"), "no fields are known"),
            ("", "apiVersion", json!("gateway.networking.k8s.io/v1beta1"), "no fields are known"),
            ("/metadata", "labels", json!({"a": 1}), "expected a string"),
        ];
        for (place, key, value, expected) in cases {
            let mut document = route();
            document.pointer_mut(place).unwrap()[key] = value;
            let found = mistakes(&Document(document)).join("\n");
            assert!(found.contains(expected), "{place}/{key}: {found}");
        }
    }
}
