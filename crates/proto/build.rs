//! Compiles the .proto files without protoc.
use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    let files = protox::compile(["offshoot/v1/trunk.proto"], ["../../proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".offshoot.v1.Tensor").compile_fds(files)?;
    Ok(())
}
