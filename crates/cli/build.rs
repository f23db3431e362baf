//! Where the program finds libtorch, and what `--version` says of its origin.

#[path = "../rpath.rs"]
mod rpath;

#[path = "commit.rs"]
mod commit;

use std::env;
use std::path::PathBuf;

fn main() {
    rpath::main();
    // Beside the build's own libtorch: one that stands beside the program, as in the image.
    println!("cargo:rustc-link-arg-bins=-Wl,-rpath,$ORIGIN/../lib/offshoot");

    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    set("OFFSHOOT_COMMIT", &commit(&package));
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = env::var_os("LIBTORCH").map(PathBuf::from);
    let version = libtorch.and_then(|dir| std::fs::read_to_string(dir.join("build-version")).ok());
    set("OFFSHOOT_LIBTORCH", version.as_deref().map_or("unknown", str::trim));
    set("OFFSHOOT_BUILD", &format!("{}, {}", variable("PROFILE"), variable("TARGET")));
}

fn commit(package: &std::path::Path) -> String {
    println!("cargo:rerun-if-env-changed=OFFSHOOT_COMMIT");
    if let Some(given) = env::var("OFFSHOOT_COMMIT").ok().filter(|given| !given.is_empty()) {
        return given;
    }
    // With the commit in it, a debug build would be made anew for every commit.
    if variable("PROFILE") == "debug" {
        return commit::UNKNOWN.into();
    }
    let found = commit::find(&package.join("../.."), &package.join("commit.txt"));
    for path in found.depends_on {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    found.name
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}

fn set(name: &str, value: &str) {
    println!("cargo:rustc-env={name}={value}");
}
