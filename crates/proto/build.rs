//! Compiles the .proto files without protoc.
use prost::Message;

const PROTOS: [&str; 2] = ["offshoot/v1/trunk.proto", "offshoot/v1/operations.proto"];

/// Also printed as JSON: what operations.proto answers with, and what is in that.
const SHOWN: [&str; 25] = [
    "OverviewResponse",
    "ServerView",
    "DeviceView",
    "SessionView",
    "Metering",
    "Sample",
    "Refusal",
    "ListSnapshotsResponse",
    "SnapshotView",
    "EvictSessionResponse",
    "PinSessionResponse",
    "DeleteSessionResponse",
    "DeleteSnapshotResponse",
    "ListTenantsResponse",
    "TenantView",
    "QuotaView",
    "TokenView",
    "SessionInfo",
    "SnapshotInfo",
    "LoraConfig",
    "WireError",
    "DescribeResponse",
    "Limits",
    "MemoryReport",
    "PeakBytes",
];

/// Enums among their fields, and how each is written.
const NAMED: [(&str, &str); 3] = [
    ("SessionInfo.state", "state"),
    ("SessionInfo.residency", "residency"),
    ("DescribeResponse.wire_dtypes", "dtypes"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    let files = protox::compile(PROTOS, ["../../proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptor.bin"), files.encode_to_vec())?;
    let mut code = tonic_prost_build::configure().bytes(".offshoot.v1.Tensor");
    for message in SHOWN {
        code =
            code.type_attribute(format!(".offshoot.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    for (field, name) in NAMED {
        let with = format!("#[serde(serialize_with = \"crate::shown::{name}\")]");
        code = code.field_attribute(format!(".offshoot.v1.{field}"), with);
    }
    code.compile_fds(files)?;
    Ok(())
}
