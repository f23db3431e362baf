/// Which program a server is part of: what it says of itself to clients and in metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Build {
    /// Such as `0.1.0`.
    pub version: &'static str,
    /// The commit that it was built from, or `unknown`.
    pub commit: &'static str,
}

impl Default for Build {
    /// Of a server inside of another program.
    fn default() -> Build {
        Build { version: env!("CARGO_PKG_VERSION"), commit: "unknown" }
    }
}
