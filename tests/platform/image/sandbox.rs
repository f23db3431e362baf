//! A container without an engine: bubblewrap's namespaces over the image's files.

use crate::built::{self, Image, is_root};
use offshoot_platform::tool;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

pub struct Sandbox {
    process: Child,
    output: BufReader<ChildStdout>,
    log: std::thread::JoinHandle<String>,
    variables: Vec<(String, String)>,
    store: tempfile::TempDir,
    _folders: [tempfile::TempDir; 2],
}

impl Sandbox {
    /// Starts the image's command with its variables and these on top: a network of its own, a root that
    /// nothing can be written to, `/tmp` in memory, and a volume for each that the image names.
    pub fn start(image: &Image, more: &[&str]) -> Sandbox {
        let pair = |text: &str| {
            let (name, value) = text.split_once('=').unwrap();
            (name.to_string(), value.to_string())
        };
        let mut variables: Vec<_> = image.strings("Env").iter().map(|text| pair(text)).collect();
        variables.extend(more.iter().map(|text| pair(text)));
        variables.push(pair("OMP_NUM_THREADS=1"));
        let (store, cache) = (volume(), volume());

        let mut command = as_the_images_user(&tool("bwrap"));
        command.args(["--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session"]);
        command.args(["--cap-drop", "ALL", "--clearenv"]);
        command.arg("--ro-bind").arg(image.root()).arg("/");
        command.args(["--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]);
        command.arg("--bind").arg(store.path()).arg("/var/lib/offshoot");
        command.arg("--bind").arg(cache.path()).arg("/var/cache/offshoot");
        // No folder can be made under the root: the model stands where memory is.
        let model = readable(&built::fixture("llama"));
        command.arg("--ro-bind").arg(model.path()).arg("/tmp/llama");
        for (name, value) in &variables {
            command.args(["--setenv", name, value]);
        }
        command.arg("--chdir").arg(image.config["WorkingDir"].as_str().unwrap());
        command.arg("--").args(image.strings("Entrypoint")).args(image.strings("Cmd"));
        let mut process =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("bwrap starts");
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut errors = process.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).unwrap();
            eprint!("{text}");
            text
        });
        Sandbox { process, output, log, variables, store, _folders: [cache, model] }
    }

    /// The next line on stdout.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    /// The program's own process, as this machine counts: the only child of bubblewrap's.
    fn program(&self) -> u32 {
        let id = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let children: Vec<u32> =
            children.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let [child] = children[..] else { panic!("one process, not {children:?}") };
        child
    }

    /// The numbers in a line of the program's status.
    pub fn status_of_the_program(&self, field: &str) -> Vec<u32> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap().split_whitespace().map(|number| number.parse().unwrap()).collect()
    }

    /// The program's number among the container's processes.
    pub fn number_inside(&self) -> u32 {
        *self.status_of_the_program("NSpid").last().unwrap()
    }

    /// Runs a command of the image beside the program.
    pub fn run(&self, words: &[impl AsRef<std::ffi::OsStr>]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.program().to_string()]);
        command.args(["--user", "--mount", "--net", "--pid", "--preserve-credentials", "--"]);
        command.args(words).env_clear().envs(self.variables.iter().cloned());
        command.output().expect("nsenter is part of util-linux")
    }

    /// What the kernel says of the program's root.
    pub fn root_is_read_only(&self) {
        let path = format!("/proc/{}/mountinfo", self.program());
        let mounts = std::fs::read_to_string(path).unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        let options = root.split(' ').nth(5).unwrap();
        assert!(options.split(',').any(|option| option == "ro"), "{root}");
    }

    /// Its volume.
    pub fn store(&self) -> &Path {
        self.store.path()
    }

    /// To the program, as an engine does.
    pub fn signal_terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.program().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Waits for the program, which must end well; what it logged.
    pub fn ended(&mut self) -> String {
        let status = self.process.wait().unwrap();
        let empty = std::thread::spawn(String::new);
        let log = std::mem::replace(&mut self.log, empty).join().unwrap();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A folder of the image's user.
fn volume() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    if is_root() {
        std::os::unix::fs::chown(folder.path(), Some(super::USER), Some(super::USER)).unwrap();
    }
    folder
}

/// A copy of the folder's files that everybody can read: a checkout's may be its owner's only.
fn readable(from: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let entries = std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path());
    for file in entries.filter(|path| path.is_file()) {
        let to = folder.path().join(file.file_name().unwrap());
        std::fs::copy(&file, &to).unwrap();
        mode(&to, 0o644);
    }
    mode(folder.path(), 0o755);
    folder
}

/// Root can become the image's user; anybody else stays who he is.
fn as_the_images_user(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let user = super::USER.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).arg(program);
    command
}
