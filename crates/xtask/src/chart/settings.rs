//! Every setting of docs/server.toml can be given below `config` of the chart's values, and nothing else.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use super::CHART;
use crate::command::in_root;

/// Settings that one side has and the other does not. That docs/server.toml is the program's own list, a
/// test of the program says.
pub fn compare() -> Result<Vec<String>> {
    let toml = fs::read_to_string(in_root("docs/server.toml"))?;
    let schema = fs::read_to_string(in_root(CHART).join("values.schema.json"))?;
    let schema: Value = serde_json::from_str(&schema).context("values.schema.json")?;
    Ok(differences(&of_toml(&toml), &of_schema(&schema)))
}

fn differences(server: &BTreeSet<String>, chart: &BTreeSet<String>) -> Vec<String> {
    let missing = server
        .difference(chart)
        .map(|key| format!("values.schema.json: config.{key} is missing, docs/server.toml has it"));
    let unknown = chart
        .difference(server)
        .map(|key| format!("values.schema.json: config.{key} is no setting of docs/server.toml"));
    missing.chain(unknown).collect()
}

/// `limits.max_rank` and its like, those behind a "#" too.
fn of_toml(text: &str) -> BTreeSet<String> {
    let mut part = "";
    let mut keys = BTreeSet::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            part = name;
        }
        let Some((key, _)) = line.trim_start_matches("# ").split_once(" = ") else { continue };
        if key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            keys.insert(format!("{part}.{key}"));
        }
    }
    keys
}

fn of_schema(schema: &Value) -> BTreeSet<String> {
    let properties = |value: &Value| value["properties"].as_object().cloned().unwrap_or_default();
    let parts = properties(&schema["properties"]["config"]);
    let keys = parts.iter().flat_map(|(part, schema)| {
        properties(schema).into_iter().map(move |(key, _)| format!("{part}.{key}"))
    });
    keys.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_sides_are_read_and_a_difference_is_told() {
        let toml = "# A b = c d.\n[listen]\nport = 1\n# Of x.\n# host = \"a\"\n\n[limits]\n# memory_bytes = \"8GiB\"\n";
        let server = of_toml(toml);
        let expected = ["limits.memory_bytes", "listen.host", "listen.port"];
        assert!(server.iter().eq(expected), "{server:?}");
        let part = |keys: Value| json!({"properties": keys});
        let schema = part(json!({"config": part(json!({
            "listen": part(json!({"port": {}, "host": {}})), "limits": part(json!({"memory": {}})),
        }))}));
        let wrong = differences(&server, &of_schema(&schema)).join("\n");
        assert!(wrong.contains("config.limits.memory_bytes is missing"), "{wrong}");
        assert!(wrong.contains("config.limits.memory is no setting"), "{wrong}");
        assert_eq!(wrong.lines().count(), 2);
    }
}
