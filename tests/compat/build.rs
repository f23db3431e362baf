//! A client of the oldest release: code generated from its contract, beside today's.

#[path = "../../crates/rpath.rs"]
mod rpath;

/// The contract whose client the tests run.
const FROZEN: &str = "../../proto/compat/0.1.0";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    rpath::main();
    println!("cargo:rerun-if-changed={FROZEN}");
    let files = protox::compile(["offshoot/v1/trunk.proto"], [FROZEN])?;
    tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    Ok(())
}
