//! Today's contract beside those that are out there.

use offshoot_compat::breaks;
use prost::Message;
use prost_types::FileDescriptorSet;
use std::path::{Path, PathBuf};

fn contracts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto")
}

/// All `.proto` files below `root`, which is where their imports begin.
fn compile(root: &Path) -> FileDescriptorSet {
    let files: Vec<_> = std::fs::read_dir(root.join("offshoot/v1"))
        .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
        .collect();
    assert!(!files.is_empty(), "no contract in {}", root.display());
    protox::compile(files, [root]).unwrap_or_else(|error| panic!("{error:?}"))
}

fn frozen() -> Vec<(String, FileDescriptorSet)> {
    let mut all: Vec<_> = std::fs::read_dir(contracts().join("compat"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), compile(&path)))
        .collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    assert!(!all.is_empty(), "no contract is frozen");
    all
}

#[test]
fn todays_contract_speaks_to_every_release() {
    let today = compile(&contracts());
    for (release, old) in frozen() {
        let found = breaks(&old, &today);
        assert!(
            found.is_empty(),
            "programs of {release} are out there and would not understand today's contract:\n  {}\n\
             Add fields, values and calls; leave those that are there as they are.",
            found.join("\n  ")
        );
    }
}

#[test]
fn the_compiled_contract_is_the_one_that_is_read_here() {
    // What programs are generated from, so that nobody forgets a file in the build.
    let built = FileDescriptorSet::decode(offshoot_proto::FILE_DESCRIPTOR_SET).unwrap();
    let read = compile(&contracts());
    assert_eq!(breaks(&read, &built), [""; 0], "crates/proto/build.rs leaves something out");
}

/// What somebody might do to the contract, and what must be said of it. The text stands once in it.
const CHANGES: [(&str, &str, &str); 17] = [
    ("uint64 tape_bytes = 2;", "", "PeakBytes: field 2, `uint64 tape_bytes`, is gone"),
    ("uint64 tape_bytes = 2;", "uint64 tape_bytes = 9;", "PeakBytes: field 2, `uint64 tape_b"),
    ("uint64 tape_bytes = 2;", "uint32 tape_bytes = 2;", "and is `uint32 tape_bytes`"),
    ("uint64 tape_bytes = 2;", "uint64 taped_bytes = 2;", "and is `uint64 taped_bytes`"),
    ("uint64 tape_bytes = 2;", "repeated uint64 tape_bytes = 2;", "and is `repeated uint64 tape"),
    ("uint64 tape_bytes = 2;", "optional uint64 tape_bytes = 2;", "and is `optional uint64 tape"),
    ("uint64 tape_bytes = 2;", "oneof x { uint64 tape_bytes = 2; }", "`uint64 tape_bytes of x`"),
    ("Tensor grad = 2;", "NamedTensor grad = 2;", "and is `.offshoot.v1.NamedTensor grad`"),
    ("repeated string keep = 3;", "string keep = 3;", "and is `string keep`"),
    ("    DropCache drop_cache = 9;", "", "`.offshoot.v1.DropCache drop_cache of body`, is gone"),
    ("message DiscardDone {}", "message DiscardAnswer {}", "DiscardDone is gone"),
    ("ERROR_CODE_CACHE = 9;", "", "ErrorCode: ERROR_CODE_CACHE = 9 is gone"),
    ("ERROR_CODE_CACHE = 9;", "ERROR_CODE_CACHE = 19;", "ErrorCode: ERROR_CODE_CACHE = 9 is gone"),
    (
        "ERROR_CODE_CACHE = 9;",
        "ERROR_CODE_LOST = 9;",
        "9 was ERROR_CODE_CACHE, and is ERROR_CODE_L",
    ),
    ("rpc Describe(DescribeRequest)", "rpc Describe2(DescribeRequest)", "/Describe is gone"),
    ("rpc Describe(DescribeRequest)", "rpc Describe(stream DescribeRequest)", "(stream .offshoot"),
    ("package offshoot.v1;", "package offshoot.v2;", "message offshoot.v1.Tensor is gone"),
];

#[test]
fn each_way_to_break_a_contract_is_found() {
    let source = contracts().join("compat/0.1.0/offshoot/v1/trunk.proto");
    let text = std::fs::read_to_string(source).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let changed = folder.path().join("offshoot/v1");
    std::fs::create_dir_all(&changed).unwrap();
    let (_, old) = frozen().remove(0);
    let compiled = |text: &str| {
        std::fs::write(changed.join("trunk.proto"), text).unwrap();
        compile(folder.path())
    };

    for (from, to, said) in CHANGES {
        let mut broken = text.replacen(from, to, 1);
        assert_ne!(broken, text, "{from:?} is not in the contract");
        if from.starts_with("message") {
            broken = broken.replace("DiscardDone discard", "DiscardAnswer discard");
        }
        let found = breaks(&old, &compiled(&broken));
        let is_said = found.iter().any(|each| each.contains(said));
        assert!(is_said, "{from:?} -> {to:?} was told as {found:?}, not with {said:?}");
    }

    // A number that was taken out of use long ago.
    let retired = text.replacen("message Hello {", "message Hello {\n  reserved 9;", 1);
    let used = text.replacen("message Hello {", "message Hello {\n  string late = 9;", 1);
    let found = breaks(&compiled(&retired), &compiled(&used));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("number 9 was retired"), "{found:?}");

    // What is only added is no break.
    let added = text
        .replacen("uint64 tape_bytes = 2;", "uint64 tape_bytes = 2;\n  optional double x = 77;", 1)
        .replacen("message DiscardDone {}", "message DiscardDone {}\nmessage New {}", 1)
        .replacen("ERROR_CODE_CACHE = 9;", "ERROR_CODE_CACHE = 9;\n  ERROR_CODE_NEW = 99;", 1);
    assert_eq!(breaks(&old, &compiled(&added)), [""; 0]);
    assert_eq!(breaks(&old, &old), [""; 0]);
}
