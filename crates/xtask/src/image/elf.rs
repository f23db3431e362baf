//! Which libraries programs need, as their headers say.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::output;

/// The driver's own, which come from the machine that the image runs on.
const DRIVERS: [&str; 3] = ["libcuda.so", "libnvidia-ml.so", "libnvidia-ptxjitcompiler.so"];

/// Libraries of these folders, by name.
pub struct Folders {
    files: BTreeMap<String, PathBuf>,
}

impl Folders {
    /// The folders with all that are below them; of one name in several the first counts.
    pub fn below(folders: &[PathBuf]) -> Result<Folders> {
        let mut files = BTreeMap::new();
        for folder in folders {
            let mut found = Vec::new();
            files_below(folder, &mut found);
            anyhow::ensure!(!found.is_empty(), "no files in {}", folder.display());
            for path in found {
                if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                    files.entry(name.to_owned()).or_insert(path);
                }
            }
        }
        Ok(Folders { files })
    }

    pub fn find(&self, name: &str) -> Option<PathBuf> {
        self.files.get(name).cloned()
    }

    /// Those that a pattern with stars fits.
    pub fn matching(&self, pattern: &str) -> Vec<PathBuf> {
        let fits = |name: &&String| fits(pattern, name);
        self.files.keys().filter(fits).map(|name| self.files[name].clone()).collect()
    }
}

/// All files below a folder, links included.
pub fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        // Not into links to folders: what they lead to is found by itself.
        match path.is_dir() && !path.is_symlink() {
            true => files_below(&path, found),
            false if path.is_file() => found.push(path),
            false => {}
        }
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).filter_map(|at| rest.get(at..)).any(|rest| fits(after, rest))
        }),
    }
}

/// What programs need, by the name under which they ask for it.
#[derive(Default)]
pub struct Needed {
    /// From the given folders.
    pub ours: BTreeMap<String, PathBuf>,
    /// The system's; the loader under its whole path.
    pub systems: BTreeMap<String, PathBuf>,
}

/// Follows the headers from these files on. The first is the program.
pub fn needed(roots: &[PathBuf], ours: &Folders) -> Result<Needed> {
    let mut needed = Needed::default();
    let mut open: Vec<PathBuf> = roots.to_vec();
    for root in &roots[1..] {
        let name = root.file_name().context("a library has a name")?.to_string_lossy();
        needed.ours.insert(name.into_owned(), root.clone());
    }
    let loader = loader(&roots[0])?;
    needed.systems.insert(loader.clone(), PathBuf::from(&loader));
    while let Some(path) = open.pop() {
        for name in libraries_of(&path)? {
            let is_known = needed.ours.contains_key(&name)
                || needed.systems.contains_key(&name)
                || loader.ends_with(&format!("/{name}"))
                || DRIVERS.iter().any(|driver| name.starts_with(driver));
            if is_known {
                continue;
            }
            if let Some(found) = ours.find(&name) {
                open.push(found.clone());
                needed.ours.insert(name, found);
            } else if let Some(found) = of_the_system(&name)? {
                open.push(found.clone());
                needed.systems.insert(name, found);
            } else {
                bail!(
                    "{} needs {name}, which is neither in the given folders nor a library of this \
                     system",
                    path.display()
                );
            }
        }
    }
    Ok(needed)
}

/// The program that starts it, such as `/lib64/ld-linux-x86-64.so.2`.
fn loader(program: &Path) -> Result<String> {
    let headers =
        output(Command::new("readelf").args(["--wide", "--program-headers"]).arg(program))?;
    let (_, rest) = headers
        .split_once("program interpreter: ")
        .with_context(|| format!("{} is no program of this system", program.display()))?;
    let (path, _) = rest.split_once(']').context("readelf closes the bracket")?;
    Ok(path.to_owned())
}

fn libraries_of(path: &Path) -> Result<Vec<String>> {
    let dynamic = output(Command::new("readelf").args(["--wide", "--dynamic"]).arg(path))?;
    let names = dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    Ok(names.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.into())).collect())
}

/// Where the loader would find it: its cache knows.
fn of_the_system(name: &str) -> Result<Option<PathBuf>> {
    let program =
        ["/sbin/ldconfig", "/usr/sbin/ldconfig"].into_iter().find(|p| Path::new(p).exists());
    let cache = output(Command::new(program.unwrap_or("ldconfig")).arg("--print-cache"))?;
    // The first is the one that is taken; those of other architectures have other folders.
    let of_this_machine = format!("/{}-", std::env::consts::ARCH);
    let mut paths = cache.lines().filter_map(|line| {
        let (found, path) = line.trim().split_once(" => ")?;
        let is_it = found.split_whitespace().next() == Some(name);
        (is_it && path.contains(&of_this_machine)).then(|| PathBuf::from(path))
    });
    Ok(paths.next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_names() {
        assert!(fits("libcudnn_*.so*", "libcudnn_ops.so.9"));
        assert!(fits("libnvrtc*.so*", "libnvrtc.so.13"));
        assert!(!fits("libnvrtc*.so*", "libcudart.so.13"));
        assert!(fits("libcaffe2_nvrtc.so", "libcaffe2_nvrtc.so"));
        assert!(!fits("libcaffe2_nvrtc.so", "libcaffe2_nvrtc.so.1"));
    }

    #[test]
    fn a_program_needs_its_loader_and_the_c_library() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("libnothing.so"), "").unwrap();
        let ours = Folders::below(&[folder.path().to_owned()]).unwrap();
        let program = std::env::current_exe().unwrap();
        let needed = needed(&[program], &ours).unwrap();
        assert!(needed.ours.is_empty(), "nothing of it is needed");
        let names: Vec<_> = needed.systems.keys().collect();
        assert!(names.iter().any(|name| name.starts_with("/lib")), "{names:?}");
        assert!(names.iter().any(|name| *name == "libc.so.6"), "{names:?}");
    }
}
