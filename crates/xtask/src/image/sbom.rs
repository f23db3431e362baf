//! The bill of materials, in CycloneDX's JSON: every crate in the program, libtorch's wheels, and the
//! packages of the system's libraries, each with its licence and what it depends on.

mod crates;
mod wheels;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::packages::Package;

/// Where the program is in a tree.
const PROGRAM: &str = "usr/bin/offshoot";

/// What a tree is made of.
pub struct Parts<'a> {
    pub packages: &'a [Package],
    /// Libraries that come with the program, by name.
    pub libtorch: &'a BTreeMap<String, PathBuf>,
    /// Every file of the tree that is code, with its SHA-256. Each must belong to something.
    pub files: &'a BTreeMap<String, String>,
}

/// The bill of these parts.
pub fn make(parts: &Parts) -> Result<Value> {
    let crates = crates::of_the_program()?;
    let mut components = crates.components;
    let mut dependencies = crates.dependencies;
    let mut of_the_program = crates.direct;
    let mut open = parts.files.clone();
    for wheel in wheels::of(parts.libtorch)? {
        let files = take(&mut open, &wheel.libraries);
        of_the_program.push(wheel.reference.clone());
        components.push(with_files(wheel.component, files));
    }
    for package in parts.packages {
        let component = of_package(package);
        of_the_program.push(component["bom-ref"].as_str().unwrap_or_default().to_owned());
        components.push(with_files(component, take(&mut open, &package.libraries)));
    }
    let program = open.remove(PROGRAM);
    // Without packages the system's libraries are nobody's.
    ensure!(
        open.is_empty() || parts.packages.is_empty(),
        "the bill of materials does not know where these files are from: {:?}",
        open.keys()
    );
    components.extend(open.iter().map(|(place, sum)| file(place, sum)));

    let mut described = crates.program;
    if let Some(sum) = program {
        described["hashes"] = hashes(&sum);
    }
    dependencies.push(json!({ "ref": described["bom-ref"], "dependsOn": of_the_program }));
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": humantime::format_rfc3339_seconds(now()?).to_string(),
            "lifecycles": [{ "phase": "build" }],
            "tools": { "components": [{
                "type": "application", "name": "xtask", "group": "offshoot",
                "version": env!("CARGO_PKG_VERSION"),
            }] },
            "component": described,
        },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// The same input makes the same bill where SOURCE_DATE_EPOCH is set.
fn now() -> Result<SystemTime> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => {
            let seconds = seconds.parse().context("SOURCE_DATE_EPOCH is no number of seconds")?;
            Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
        }
        Err(_) => Ok(SystemTime::now()),
    }
}

/// Takes the libraries' files out of those that are still open.
fn take(open: &mut BTreeMap<String, String>, libraries: &[String]) -> Vec<(String, String)> {
    let name_of = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let names: Vec<_> = libraries.iter().map(|library| name_of(library)).collect();
    let (mine, others) =
        std::mem::take(open).into_iter().partition(|(place, _)| names.contains(&name_of(place)));
    *open = others;
    let mine: BTreeMap<String, String> = mine;
    mine.into_iter().collect()
}

fn with_files(mut component: Value, files: Vec<(String, String)>) -> Value {
    if !files.is_empty() {
        component["components"] = files.iter().map(|(place, sum)| file(place, sum)).collect();
    }
    component
}

fn file(place: &str, sum: &str) -> Value {
    json!({ "type": "file", "bom-ref": format!("file:/{place}"), "name": format!("/{place}"), "hashes": hashes(sum) })
}

fn hashes(sum: &str) -> Value {
    json!([{ "alg": "SHA-256", "content": sum }])
}

fn of_package(package: &Package) -> Value {
    let Package { name, version, architecture, .. } = package;
    // A version may have characters that mean something in an address.
    let escaped = version.replace('+', "%2B").replace(':', "%3A").replace('~', "%7E");
    let purl = format!("pkg:deb/debian/{name}@{escaped}?arch={architecture}");
    json!({
        "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
        "licenses": [{ "license": { "name": format!("see /usr/share/doc/{name}/copyright") } }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package() -> Package {
        Package {
            name: "libc6".into(),
            version: "2.36-9+deb12u1".into(),
            architecture: "amd64".into(),
            status: String::new(),
            libraries: vec!["libc.so.6".into(), "/lib64/ld-linux-x86-64.so.2".into()],
        }
    }

    fn files(places: &[&str]) -> BTreeMap<String, String> {
        places.iter().map(|place| (place.to_string(), "00".repeat(32))).collect()
    }

    #[test]
    fn every_crate_and_every_file_has_its_place() {
        let libtorch =
            BTreeMap::from([("libc10.so".to_string(), PathBuf::from("/nowhere/libc10.so"))]);
        let files = files(&[
            "usr/bin/offshoot",
            "usr/lib/offshoot/libc10.so",
            "usr/lib/x86_64-linux-gnu/libc.so.6",
            "usr/lib64/ld-linux-x86-64.so.2",
        ]);
        let parts = Parts { packages: &[package()], libtorch: &libtorch, files: &files };
        let bill = make(&parts).unwrap();
        assert_eq!(bill["metadata"]["component"]["name"], "offshoot");
        assert!(bill["metadata"]["component"]["hashes"].is_array());
        let components = bill["components"].as_array().unwrap();
        let find = |name: &str| {
            components.iter().find(|each| each["name"] == name).unwrap_or_else(|| panic!("{name}"))
        };
        assert_eq!(
            find("tokio")["purl"].as_str().unwrap().split('@').next(),
            Some("pkg:cargo/tokio")
        );
        assert_eq!(find("tch")["hashes"][0]["alg"], "SHA-256");
        assert_eq!(find("offshoot-server")["licenses"][0]["expression"], "Apache-2.0");
        assert_eq!(find("torch")["components"][0]["name"], "/usr/lib/offshoot/libc10.so");
        assert_eq!(find("libc6")["components"].as_array().unwrap().len(), 2);
        assert_eq!(find("libc6")["purl"], "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64");
        // What only tests or builds use is not in the program.
        for absent in ["rcgen", "proptest", "xtask", "offshoot-tests", "prost-derive"] {
            assert!(components.iter().all(|each| each["name"] != absent), "{absent}");
        }
        references_are_known(&bill);
    }

    /// Each reference names one component, and each dependency one that is there.
    fn references_are_known(bill: &Value) {
        fn collect(component: &Value, known: &mut Vec<String>) {
            known.push(component["bom-ref"].as_str().expect("a reference").to_owned());
            component["components"]
                .as_array()
                .into_iter()
                .flatten()
                .for_each(|c| collect(c, known));
        }
        let mut known = Vec::new();
        collect(&bill["metadata"]["component"], &mut known);
        bill["components"].as_array().unwrap().iter().for_each(|c| collect(c, &mut known));
        let n_known = known.len();
        known.sort();
        known.dedup();
        assert_eq!(known.len(), n_known, "a reference stands twice");
        for each in bill["dependencies"].as_array().unwrap() {
            let depended = each["dependsOn"].as_array().unwrap().iter();
            for reference in depended.chain([&each["ref"]]) {
                assert!(known.iter().any(|known| reference == known), "{reference} is not there");
            }
        }
    }

    #[test]
    fn a_file_of_unknown_origin_is_an_error() {
        let files = files(&["usr/lib/x86_64-linux-gnu/libstranger.so.1"]);
        let parts = Parts { packages: &[package()], libtorch: &BTreeMap::new(), files: &files };
        let error = make(&parts).unwrap_err().to_string();
        assert!(error.contains("libstranger.so.1"), "{error}");
    }
}
