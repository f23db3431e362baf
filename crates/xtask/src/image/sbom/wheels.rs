//! The Python wheels that libtorch and its libraries are from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::setup;

/// A wheel and which of its libraries are taken.
pub struct Wheel {
    pub reference: String,
    pub component: Value,
    pub libraries: Vec<String>,
}

/// The wheels of these libraries, each once.
pub fn of(libraries: &BTreeMap<String, PathBuf>) -> Result<Vec<Wheel>> {
    let mut wheels = BTreeMap::<(String, String), Vec<String>>::new();
    let mut installed = BTreeMap::new();
    for (library, path) in libraries {
        let wheel = match site_of(path) {
            Some(site) => {
                let known = installed.entry(site.clone()).or_insert_with(|| records(&site));
                let place = path.strip_prefix(&site).unwrap_or(path).display().to_string();
                known.get(&place).cloned()
            }
            None => None,
        };
        wheels.entry(wheel.unwrap_or_else(|| usual(library))).or_default().push(library.clone());
    }
    Ok(wheels
        .into_iter()
        .map(|((name, version), libraries)| wheel(&name, &version, libraries))
        .collect())
}

fn wheel(name: &str, version: &str, libraries: Vec<String>) -> Wheel {
    let purl = format!("pkg:pypi/{name}@{}", version.replace('+', "%2B"));
    let licenses = match name {
        "torch" => json!([{ "expression": "BSD-3-Clause" }]),
        "triton" => json!([{ "expression": "MIT" }]),
        _ => json!([{ "license": { "name": "NVIDIA Software License Agreement" } }]),
    };
    let component = json!({
        "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
        "licenses": licenses,
    });
    Wheel { reference: purl, component, libraries }
}

/// The folder that wheels are installed to, if the library stands in one.
fn site_of(library: &Path) -> Option<PathBuf> {
    let is_site = |folder: &&Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".dist-info"))
    };
    library.ancestors().skip(1).take(6).find(is_site).map(Path::to_owned)
}

/// Which installed wheel has which file.
fn records(site: &Path) -> BTreeMap<String, (String, String)> {
    let mut known = BTreeMap::new();
    for entry in fs::read_dir(site).into_iter().flatten().flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        let Some((name, version)) =
            folder.strip_suffix(".dist-info").and_then(|wheel| wheel.rsplit_once('-'))
        else {
            continue;
        };
        let record = fs::read_to_string(entry.path().join("RECORD")).unwrap_or_default();
        for line in record.lines() {
            let place = line.split(',').next().unwrap_or_default();
            known.insert(place.to_owned(), (name.replace('_', "-"), version.to_owned()));
        }
    }
    known
}

/// What `cargo xtask setup` took a library from.
fn usual(library: &str) -> (String, String) {
    let of = |name: &str| {
        let version = setup::wheels().find_map(|wheel| {
            let (found, version) = wheel.split_once("==")?;
            (found == name).then(|| version.to_owned())
        });
        (name.to_owned(), version.unwrap_or_else(|| setup::VERSION.into()))
    };
    match library {
        name if name.starts_with("libcudart") => of("nvidia-cuda-runtime"),
        name if name.starts_with("libcupti") => of("nvidia-cuda-cupti"),
        _ => of("torch"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installed_wheel_says_what_is_its_own() {
        let site = tempfile::tempdir().unwrap();
        let lib = site.path().join("nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(site.path().join("nvidia_cublas-13.1.0.dist-info")).unwrap();
        let record = "nvidia/cu13/lib/libcublas.so.13,sha256=x,1\n";
        fs::write(site.path().join("nvidia_cublas-13.1.0.dist-info/RECORD"), record).unwrap();
        fs::write(lib.join("libcublas.so.13"), "").unwrap();
        let libraries = BTreeMap::from([
            ("libcublas.so.13".into(), lib.join("libcublas.so.13")),
            ("libcudart.so.13".into(), PathBuf::from("/nowhere/libcudart.so.13")),
        ]);
        let found = of(&libraries).unwrap();
        let names: Vec<_> = found.iter().map(|wheel| wheel.reference.as_str()).collect();
        assert_eq!(
            names,
            ["pkg:pypi/nvidia-cublas@13.1.0", "pkg:pypi/nvidia-cuda-runtime@13.0.96"]
        );
        assert_eq!(found[0].libraries, ["libcublas.so.13"]);
    }
}
