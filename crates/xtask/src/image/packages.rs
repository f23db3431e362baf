//! Which of Debian's packages the system's libraries are of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::output;

/// A package, as dpkg knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub architecture: String,
    /// Its entry in dpkg's list.
    pub status: String,
    /// Those of its libraries that were asked for, by the names under which they were.
    pub libraries: Vec<String>,
}

/// The packages of these libraries, each once. None where the system is not of Debian's kind.
pub fn of(libraries: &BTreeMap<String, PathBuf>) -> Result<Vec<Package>> {
    if !Path::new("/var/lib/dpkg/status").exists() {
        eprintln!(
            "this is no Debian: the bill of materials names the system's libraries by file only"
        );
        return Ok(vec![]);
    }
    let mut owners = BTreeMap::<String, Vec<String>>::new();
    for (library, path) in libraries {
        owners.entry(owner(path)?).or_default().push(library.clone());
    }
    owners.into_iter().map(|(name, libraries)| package(&name, libraries)).collect()
}

fn owner(file: &Path) -> Result<String> {
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    // dpkg knows a file by the path that its package had, from before /lib became /usr/lib.
    let spelled = |path: &Path| output(Command::new("dpkg-query").arg("--search").arg(path));
    let found = match (spelled(&file), file.strip_prefix("/usr")) {
        (Err(_), Ok(rest)) => spelled(&Path::new("/").join(rest)),
        (found, _) => found,
    };
    let found = found.with_context(|| format!("no package has {}", file.display()))?;
    let name = found.split(':').next().context("dpkg names the package first")?;
    Ok(name.to_owned())
}

fn package(name: &str, libraries: Vec<String>) -> Result<Package> {
    let status = output(Command::new("dpkg-query").args(["--status", name]))?;
    let field = |field: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(": "));
        value.map(str::to_owned).with_context(|| format!("dpkg tells no {field} of {name}"))
    };
    Ok(Package {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
        status,
        libraries,
    })
}
