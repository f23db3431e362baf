//! What can be done to another process: signals, and a disk that is full for it alone.

pub use rustix::process::Signal;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, kill_process, prlimit};
use std::io;
use std::path::Path;
use std::process::{Child, Command};

/// A command that runs this program in such a way that a file over its limit is an error of the write,
/// as a full disk is, and not the end of the process. The same process: its number is the program's.
pub fn enduring(program: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#]).arg(program);
    command
}

/// Sends a signal to a process that has not been waited for.
pub fn signal(child: &Child, signal: Signal) -> io::Result<()> {
    Ok(kill_process(pid(child), signal)?)
}

/// Writes of this process behind so many bytes of a file fail from now on; none: all succeed again.
pub fn limit_file_size(child: &Child, bytes: Option<u64>) -> io::Result<()> {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit { current: bytes.or(maximum), maximum };
    prlimit(Some(pid(child)), Resource::Fsize, limit)?;
    Ok(())
}

fn pid(child: &Child) -> Pid {
    let number = child.id().try_into().expect("numbers of processes are small");
    Pid::from_raw(number).expect("they are not zero")
}
