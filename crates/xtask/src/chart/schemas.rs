//! Kubernetes' own schemas, by PyPI's kubernetes-validate; custom resources by [super::custom].

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::custom;
use super::document::{Document, items};
use super::{KUBERNETES, Rendered};
use crate::command::target_dir;
use crate::tools::program;

/// What is not valid in any of the sets.
pub fn mistakes(sets: &[Rendered]) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for set in sets {
        let found = set.documents.iter().filter(|document| is_custom(document));
        let found = found.flat_map(custom::mistakes);
        wrong.extend(found.map(|mistake| format!("{}: {mistake}", set.name)));
    }
    for version in KUBERNETES {
        wrong.extend(of_version(sets, version)?);
    }
    Ok(wrong)
}

/// Kubernetes' own groups have no dot, or end with k8s.io; Gateway API does so too, but is installed apart.
fn is_custom(document: &Document) -> bool {
    let group = document.text("/apiVersion").split_once('/').map_or("", |(group, _)| group);
    let own = group.ends_with(".k8s.io") && group != "gateway.networking.k8s.io";
    group.contains('.') && !own
}

/// One process for all sets: starting it takes longer than checking.
fn of_version(sets: &[Rendered], version: &str) -> Result<Vec<String>> {
    let folder = target_dir().join("tools/chart").join(version);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let mut files = Vec::new();
    for set in sets.iter().filter(|set| version == KUBERNETES[1] || !needs_newest(set)) {
        let own = set.documents.iter().filter(|document| !is_custom(document));
        let text: Vec<_> = own.map(|document| document.0.to_string()).collect();
        let file = format!("{}.yaml", set.name);
        fs::write(folder.join(&file), text.join("\n---\n"))?;
        files.push(file);
    }
    fs::write(folder.join(WRONG), WRONG_TEXT)?;
    files.push(WRONG.into());
    let said = Command::new(program("kubernetes-validate")?)
        .current_dir(&folder)
        .args(["--strict", "--quiet", "-k", version])
        .args(&files)
        .stdin(Stdio::null())
        .output()
        .context("cannot start kubernetes-validate")?;
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // A kind that it does not know is a warning, and no less a mistake here.
    let (expected, others): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.contains(WRONG));
    ensure!(
        expected.iter().any(|line| line.contains("replicas")),
        "kubernetes-validate takes {WRONG_TEXT:?} for valid in {version} ({}): {text}",
        said.status
    );
    Ok(others.into_iter().map(|line| format!("Kubernetes {version}: {line}")).collect())
}

/// What it must refuse each time, so that its silence means something.
const WRONG: &str = "a-wrong-one.yaml";
const WRONG_TEXT: &str = r#"{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "wrong"}, "spec":
    {"replicas": "two", "selector": {}, "template": {}}}"#;

/// Image volumes are refused by the chart on an older Kubernetes.
fn needs_newest(set: &Rendered) -> bool {
    let mut pods = set.documents.iter().filter_map(Document::pod);
    pods.any(|pod| items(pod, "/spec/volumes").any(|volume| !volume["image"].is_null()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn kubernetes_own_groups_are_told_from_others() {
        for (version, custom) in [
            ("v1", false),
            ("apps/v1", false),
            ("networking.k8s.io/v1", false),
            ("gateway.networking.k8s.io/v1", true),
            ("monitoring.coreos.com/v1", true),
        ] {
            let document = Document(json!({"apiVersion": version}));
            assert_eq!(is_custom(&document), custom, "{version}");
        }
    }
}
