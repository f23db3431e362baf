//! The container image where no container engine runs: the tree that `docker/Dockerfile` has put together,
//! its last stage built by buildah, and the server started in it as the image says, by a user who is
//! nobody, under a root that nothing can be written to.

#[path = "image/built.rs"]
mod built;
#[path = "image/sandbox.rs"]
mod sandbox;

use built::{Image, tree};
use sandbox::Sandbox;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// As `docker/Dockerfile` says.
const USER: u32 = 10001;

#[test]
fn the_image_serves_as_nobody_under_a_read_only_root_and_drains() {
    let image = match Image::build() {
        Ok(image) => image,
        Err(reason) => {
            assert!(std::env::var_os("CI").is_none(), "no image can be built here: {reason}");
            eprintln!("LEFT OUT: no image can be built here: {reason}");
            return;
        }
    };
    image.says_what_it_is();

    // The image's own command and variables, with a model and what a mounted settings file would say.
    let settings = [
        "OFFSHOOT_MODEL__NAME=/tmp/llama",
        "OFFSHOOT_MODEL__SPLIT_POINT_1=1",
        "OFFSHOOT_MODEL__SPLIT_POINT_2=3",
        "OFFSHOOT_LISTEN__ALLOW_INSECURE_NETWORK=true",
    ];
    let mut sandbox = Sandbox::start(&image, &settings);
    assert_eq!(sandbox.line(), "ready grpc=0.0.0.0:50051 http=0.0.0.0:9464");
    if built::is_root() {
        assert_eq!(sandbox.status_of_the_program("Uid"), [USER; 4]);
    }
    assert_eq!(sandbox.number_inside(), 1, "the program is the container's first process");
    sandbox.root_is_read_only();

    // What an engine would ask every few seconds.
    let health = image.health_check();
    let answer = sandbox.run(&health);
    assert!(answer.status.success(), "{health:?}: {answer:?}");
    // It can fail: nobody serves there.
    let answer = sandbox.run(&["/usr/bin/offshoot", "health", "--server", "127.0.0.1:9"]);
    assert!(!answer.status.success(), "{answer:?}");

    // The first process of a container has no default for signals: it must have asked for this one.
    sandbox.signal_terminate();
    let log = sandbox.ended();
    assert!(log.contains("every session is saved"), "{log}");
    assert!(sandbox.store().join("store").is_dir(), "the store is in its volume");
}

#[test]
fn the_tree_needs_nothing_of_the_machine() {
    let tree = tree();
    let store = tempfile::tempdir().unwrap();
    let libraries = ["usr/lib/offshoot", "usr/lib/x86_64-linux-gnu"];
    let path = libraries.map(|folder| tree.path().join(folder).display().to_string()).join(":");
    let mut server = Command::new(tree.path().join("lib64/ld-linux-x86-64.so.2"))
        .args(["--inhibit-cache", "--library-path", &path])
        .arg(tree.path().join("usr/bin/offshoot"))
        .args(["serve", "--port", "0", "--split-point-1", "1", "--split-point-2", "3"])
        .arg("--model-name")
        .arg(built::fixture("llama"))
        .arg("--store-dir")
        .arg(store.path())
        .env("GOMP_SPINCOUNT", "1")
        .env("OMP_NUM_THREADS", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("ready grpc="), "{line:?}");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", server.id())).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();

    let inside = tree.path().canonicalize().unwrap();
    let libraries: BTreeSet<_> =
        maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..]))).collect();
    let code = libraries.into_iter().filter(|path| path.to_string_lossy().contains(".so"));
    let (ours, others): (Vec<&Path>, Vec<&Path>) = code.partition(|path| path.starts_with(&inside));
    assert!(others.is_empty(), "taken from the machine: {others:?}");
    assert!(ours.iter().any(|path| path.ends_with("libtorch_cpu.so")), "{ours:?}");
}

#[test]
fn the_bill_of_materials_knows_every_file_and_is_valid() {
    let tree = tree();
    let file = tree.path().join("usr/share/doc/offshoot/sbom.cdx.json");
    let bill: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let mut hashes = BTreeSet::new();
    collect(&bill, &mut hashes);
    for folder in ["usr/bin", "usr/lib", "usr/lib64"] {
        for path in built::files_below(&tree.path().join(folder)) {
            let sum = built::sha256(&path);
            assert!(hashes.contains(&sum), "{} is not in the bill", path.display());
        }
    }
    let names: Vec<_> =
        bill["components"].as_array().unwrap().iter().map(|each| &each["name"]).collect();
    for name in ["tokio", "torch", "libc6", "sled"] {
        assert!(names.contains(&&json!(name)), "{name} is not in the bill");
    }
    built::validate(&file);

    // And the validation can fail.
    let mut wrong = bill;
    wrong["components"][0]["type"] = json!("nonsense");
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("sbom.cdx.json");
    std::fs::write(&broken, wrong.to_string()).unwrap();
    assert!(std::panic::catch_unwind(|| built::validate(&broken)).is_err());
}

/// Every hash in the bill.
fn collect(value: &Value, hashes: &mut BTreeSet<String>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| collect(value, hashes)),
        Value::Object(fields) => {
            if let Some(hash) = fields.get("content").and_then(Value::as_str) {
                hashes.insert(hash.to_string());
            }
            fields.values().for_each(|value| collect(value, hashes));
        }
        _ => {}
    }
}
