//! One rendered object.

use anyhow::{Context, Result};
use serde_json::Value;

/// A Kubernetes object as helm rendered it.
pub struct Document(pub Value);

/// All objects of a rendered chart, without the empty ones between them.
pub fn read(text: &str) -> Result<Vec<Document>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("the rendered YAML")?;
    Ok(documents.into_iter().filter(|value| !value.is_null()).map(Document).collect())
}

impl Document {
    /// The text at a pointer such as `/metadata/name`; empty without one.
    pub fn text(&self, pointer: &str) -> &str {
        self.0.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    pub fn kind(&self) -> &str {
        self.text("/kind")
    }

    pub fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// `Kind/name`.
    pub fn title(&self) -> String {
        format!("{}/{}", self.kind(), self.name())
    }

    /// The pod that it is or makes, with its metadata.
    pub fn pod(&self) -> Option<&Value> {
        let pointer = match self.kind() {
            "Pod" => "",
            "StatefulSet" | "Deployment" | "DaemonSet" | "ReplicaSet" | "Job" => "/spec/template",
            "CronJob" => "/spec/jobTemplate/spec/template",
            _ => return None,
        };
        self.0.pointer(pointer)
    }
}

/// The items of a list at a pointer; none without it.
pub fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// All containers of a pod, with a name for people.
pub fn containers(pod: &Value) -> impl Iterator<Item = (&str, &Value)> {
    ["/spec/initContainers", "/spec/containers", "/spec/ephemeralContainers"]
        .into_iter()
        .flat_map(|list| items(pod, list))
        .map(|container| (container["name"].as_str().unwrap_or("?"), container))
}
