//! The container image's root: the program, libtorch, and of the system only what both need.
//!
//! `docker/Dockerfile` has it put together in one stage and copies it into an empty image in the next.
//! Where no container engine runs, the tests do the same with the same tree.

mod elf;
mod packages;
mod sbom;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::command::{self, in_root};
use crate::{demo, setup};
use packages::Package;

/// Where libtorch is in the image; the program looks there by itself.
const LIBTORCH: &str = "usr/lib/offshoot";
/// What CUDA's part of libtorch loads only when it is used, so that no file names it.
const LOADED_BY_CUDA: [&str; 3] = ["libcudnn_*.so*", "libnvrtc*.so*", "libcaffe2_nvrtc.so"];

/// What the tree is made of.
#[derive(Args, Debug)]
pub struct Options {
    /// A new folder for the tree
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// The program. Default: the release binary
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Folders with libtorch and what it needs beside the system's libraries, with all folders below
    /// them. Default: .libtorch/lib
    #[arg(long, value_name = "FOLDER")]
    libtorch: Vec<PathBuf>,
    /// With the CUDA part of a CUDA build of libtorch
    #[arg(long)]
    cuda: bool,
}

/// Puts the tree together and says how large it is.
pub fn tree(options: &Options) -> Result<()> {
    let binary = options.binary.clone().unwrap_or_else(demo::binary);
    ensure!(
        !options.out.exists(),
        "{} is there already: the tree needs a folder of its own, name a new one",
        options.out.display()
    );
    let ours = match &options.libtorch[..] {
        [] => elf::Folders::below(&[in_root(".libtorch/lib")])?,
        given => elf::Folders::below(given)?,
    };
    let mut roots = vec![binary.clone()];
    if options.cuda {
        roots.push(ours.find("libtorch_cuda.so").with_context(|| {
            format!(
                "no libtorch_cuda.so in {:?}: expected a CUDA build of libtorch",
                options.libtorch
            )
        })?);
        roots.extend(LOADED_BY_CUDA.iter().flat_map(|pattern| ours.matching(pattern)));
    }
    let needed = elf::needed(&roots, &ours)?;
    let tree = Tree { root: options.out.clone() };
    strip(&tree.copy(&binary, "usr/bin/offshoot")?, "--strip-all")?;
    for (name, path) in &needed.ours {
        let place = tree.copy(path, &format!("{LIBTORCH}/{name}"))?;
        // A fifth of torch's own; those of others stay as their makers gave them.
        if ["libtorch", "libc10"].iter().any(|torch| name.starts_with(torch)) {
            strip(&place, "--strip-unneeded")?;
        }
    }
    for (name, path) in &needed.systems {
        tree.copy(path, &place_of(name, path)?)?;
    }
    let packages = packages::of(&needed.systems)?;
    tree.system(&packages)?;
    let files = tree.files()?;
    let parts = sbom::Parts { packages: &packages, libtorch: &needed.ours, files: &files };
    let bill = sbom::make(&parts)?;
    tree.write("usr/share/doc/offshoot/sbom.cdx.json", &serde_json::to_string_pretty(&bill)?)?;
    tree.report()
}

/// The bill of materials of the program alone, without a tree.
pub fn print_sbom() -> Result<()> {
    let (nothing, files) = (BTreeMap::new(), BTreeMap::new());
    let bill = sbom::make(&sbom::Parts { packages: &[], libtorch: &nothing, files: &files })?;
    println!("{}", serde_json::to_string_pretty(&bill)?);
    Ok(())
}

struct Tree {
    root: PathBuf,
}

impl Tree {
    /// What programs of a system expect of it: users, names of hosts, certificates, licences.
    fn system(&self, packages: &[Package]) -> Result<()> {
        for folder in ["bin", "lib", "lib64"] {
            if self.root.join("usr").join(folder).is_dir() {
                symlink(format!("usr/{folder}"), self.root.join(folder))?;
            }
        }
        for (place, text) in [
            ("etc/passwd", "root:x:0:0:root:/:/\noffshoot:x:10001:10001:offshoot:/tmp:/\n"),
            ("etc/group", "root:x:0:\noffshoot:x:10001:\n"),
            ("etc/nsswitch.conf", "hosts: files dns\n"),
        ] {
            self.write(place, text)?;
        }
        self.copy(&in_root("docker/server.toml"), "etc/offshoot/server.toml")?;
        self.copy(&in_root("LICENSE"), "usr/share/doc/offshoot/LICENSE")?;
        let certificates = Path::new("/etc/ssl/certs/ca-certificates.crt");
        ensure!(
            certificates.is_file(),
            "{} is missing: install ca-certificates, clients in the image trust what is in it",
            certificates.display()
        );
        self.copy(certificates, "etc/ssl/certs/ca-certificates.crt")?;
        // Who mounts a driver's libraries, and who looks for known faults, goes by these.
        for name in ["etc/os-release", "etc/debian_version"] {
            let from = Path::new("/").join(name);
            if from.exists() {
                self.copy(&from, name)?;
            }
        }
        for package in packages {
            self.write(&format!("var/lib/dpkg/status.d/{}", package.name), &package.status)?;
            let copyright = PathBuf::from(format!("/usr/share/doc/{}/copyright", package.name));
            if copyright.exists() {
                self.copy(&copyright, &format!("usr/share/doc/{}/copyright", package.name))?;
            }
        }
        // Where whoever starts the image mounts something: under a read-only root nobody can make them.
        for folder in ["dev", "proc", "sys", "tmp"] {
            fs::create_dir_all(self.root.join(folder))?;
        }
        fs::set_permissions(self.root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        Ok(())
    }

    fn copy(&self, from: &Path, place: &str) -> Result<PathBuf> {
        let to = self.root.join(place);
        fs::create_dir_all(to.parent().context("below the root")?)?;
        fs::copy(from, &to)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        Ok(to)
    }

    fn write(&self, place: &str, text: &str) -> Result<()> {
        let to = self.root.join(place);
        fs::create_dir_all(to.parent().context("below the root")?)?;
        fs::write(&to, text).with_context(|| format!("cannot write {}", to.display()))
    }

    /// Every file that is code, with its SHA-256.
    fn files(&self) -> Result<BTreeMap<String, String>> {
        let mut found = Vec::new();
        for folder in ["usr/bin", "usr/lib", "usr/lib64"] {
            elf::files_below(&self.root.join(folder), &mut found);
        }
        let sums = command::output(Command::new("sha256sum").args(&found))?;
        let lines = sums.lines().filter_map(|line| line.split_once("  "));
        lines
            .map(|(sum, path)| {
                let place = Path::new(path).strip_prefix(&self.root)?;
                Ok((place.display().to_string(), sum.to_owned()))
            })
            .collect()
    }

    fn report(&self) -> Result<()> {
        let mut files = Vec::new();
        elf::files_below(&self.root, &mut files);
        let mut sizes = Vec::new();
        for file in &files {
            sizes.push((fs::metadata(file)?.len(), file.strip_prefix(&self.root)?));
        }
        sizes.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
        let total: u64 = sizes.iter().map(|(size, _)| size).sum();
        println!("{}: {:.1} MB in {} files", self.root.display(), megabytes(total), sizes.len());
        for (size, path) in sizes.iter().filter(|(size, _)| *size >= 1_000_000) {
            println!("  {:8.1} MB  {}", megabytes(*size), path.display());
        }
        println!("libtorch {}", setup::VERSION);
        Ok(())
    }
}

/// Takes names and notes out that only debuggers read.
fn strip(file: &Path, how: &str) -> Result<()> {
    command::output(Command::new("strip").arg(how).arg(file)).map(drop)
}

/// The loader stands where the program's header says, every other library where the loader looks.
fn place_of(name: &str, path: &Path) -> Result<String> {
    if name.starts_with('/') {
        return Ok(merged(name));
    }
    let folder = path.parent().context("a library is in a folder")?;
    Ok(format!("{}/{name}", merged(&folder.to_string_lossy())))
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A path of the system as it is in the tree, where `/lib` is `/usr/lib`.
fn merged(path: &str) -> String {
    let path = path.trim_start_matches('/');
    match path.starts_with("lib") {
        true => format!("usr/{path}"),
        false => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_folders_are_merged() {
        assert_eq!(merged("/lib64/ld-linux-x86-64.so.2"), "usr/lib64/ld-linux-x86-64.so.2");
        assert_eq!(merged("/lib/x86_64-linux-gnu"), "usr/lib/x86_64-linux-gnu");
        assert_eq!(merged("/usr/lib/x86_64-linux-gnu"), "usr/lib/x86_64-linux-gnu");
    }
}
