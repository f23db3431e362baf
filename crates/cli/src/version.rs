//! Which program this is: `offshoot --version`, and what its server says of itself.

use offshoot_server::Build;

/// The same for the server's answers, metrics and traces.
pub const BUILD: Build =
    Build { version: env!("CARGO_PKG_VERSION"), commit: env!("OFFSHOOT_COMMIT") };

/// `-V`.
pub const SHORT: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("OFFSHOOT_COMMIT"), ")");

/// `--version`.
pub const LONG: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit    ",
    env!("OFFSHOOT_COMMIT"),
    "\nlibtorch  ",
    env!("OFFSHOOT_LIBTORCH"),
    "\ndevices   cpu; cuda where a CUDA build of this libtorch is on the library path",
    "\nbuild     ",
    env!("OFFSHOOT_BUILD"),
);
