//! The crates that are linked into the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::command::{cargo, in_root, output};

/// What of the bill is from cargo.
pub struct Crates {
    /// The program itself.
    pub program: Value,
    pub components: Vec<Value>,
    pub dependencies: Vec<Value>,
    /// What the program's own package depends on.
    pub direct: Vec<String>,
}

/// Of `offshoot` for this machine's kind, without what only builds, macros or tests use.
pub fn of_the_program() -> Result<Crates> {
    let linked = linked()?;
    let metadata =
        output(cargo().args(["metadata", "--format-version=1", "--locked", "--offline"]))
            .or_else(|_| output(cargo().args(["metadata", "--format-version=1", "--locked"])))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    let sums = checksums()?;
    let mut program = Value::Null;
    let (mut components, mut references) = (Vec::new(), BTreeMap::new());
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        if !linked.contains(&(name.clone(), version.clone())) {
            continue;
        }
        let component = component(package, sums.get(&(name.clone(), version)));
        let reference = text(&component["bom-ref"]);
        references.insert(text(&package["id"]), reference);
        match name == "offshoot" {
            true => program = component,
            false => components.push(component),
        }
    }
    program["type"] = json!("application");
    let (mut dependencies, mut direct) = (Vec::new(), Vec::new());
    for node in metadata["resolve"]["nodes"].as_array().into_iter().flatten() {
        let Some(from) = references.get(&text(&node["id"])) else { continue };
        let targets = node["deps"].as_array().into_iter().flatten().filter(|dep| is_linked(dep));
        let to: BTreeSet<_> =
            targets.filter_map(|dep| references.get(&text(&dep["pkg"]))).cloned().collect();
        match *from == text(&program["bom-ref"]) {
            true => direct.extend(to),
            false => dependencies.push(json!({ "ref": from, "dependsOn": to })),
        }
    }
    Ok(Crates { program, components, dependencies, direct })
}

/// Names and versions as cargo resolves them for this program alone.
fn linked() -> Result<BTreeSet<(String, String)>> {
    let tree = output(cargo().args([
        "tree",
        "--locked",
        "--package=offshoot",
        "--edges=normal,no-proc-macro",
        "--prefix=none",
        "--format={p}",
    ]))?;
    // Such as `tokio v1.54.0`, and of ours with a path behind.
    let pairs = tree.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.trim_start_matches('v').to_owned()))
    });
    Ok(pairs.collect())
}

fn is_linked(dependency: &Value) -> bool {
    let mut kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
    kinds.any(|kind| kind["kind"].is_null())
}

/// SHA-256 of the packages from the registry, by name and version.
fn checksums() -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Value = fs::read_to_string(in_root("Cargo.lock"))?.parse()?;
    let packages = lock["package"].as_array().context("Cargo.lock has packages")?;
    let sums = packages.iter().filter_map(|package| {
        let field = |name: &str| Some(package.get(name)?.as_str()?.to_owned());
        Some(((field("name")?, field("version")?), field("checksum")?))
    });
    Ok(sums.collect())
}

fn component(package: &Value, sum: Option<&String>) -> Value {
    let (name, version) = (text(&package["name"]), text(&package["version"]));
    let purl = format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"));
    let mut component = json!({
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    });
    // Old packages write a slash for "or".
    let license = text(&package["license"]).replace(" / ", "/").replace('/', " OR ");
    component["licenses"] = match license.is_empty() {
        true => json!([{ "license": { "name": "in a file of the package" } }]),
        false => json!([{ "expression": license }]),
    };
    if let Some(sum) = sum {
        component["hashes"] = super::hashes(sum);
    }
    if let Some(repository) = package["repository"].as_str() {
        component["externalReferences"] = json!([{ "type": "vcs", "url": repository }]);
    }
    component
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
