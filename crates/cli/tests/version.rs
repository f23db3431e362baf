//! What the program says of its origin, and how its build finds that out.

#[path = "../commit.rs"]
mod commit;

use std::fs;
use std::path::Path;
use std::process::Command;

fn version(option: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_offshoot")).arg(option).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_program_says_its_version_commit_and_libtorch() {
    let commit = option_env!("OFFSHOOT_COMMIT").filter(|commit| !commit.is_empty());
    let short = version("-V");
    assert!(short.starts_with(concat!("offshoot ", env!("CARGO_PKG_VERSION"), " (")), "{short}");
    // Debug builds are not tied to a commit.
    if cfg!(debug_assertions) {
        let commit = commit.unwrap_or(commit::UNKNOWN);
        assert!(short.trim_end().ends_with(&format!("({commit})")), "{short}");
    }
    let long = version("--version");
    for line in ["commit    ", "libtorch  2.11.0", "devices   cpu; cuda", "build     "] {
        assert!(long.lines().any(|found| found.starts_with(line)), "{line:?} is not in {long}");
    }
}

struct Repository(tempfile::TempDir);

impl Repository {
    fn new() -> Repository {
        let repository = Repository(tempfile::tempdir().unwrap());
        fs::create_dir(repository.path().join("crates")).unwrap();
        fs::write(repository.path().join(".gitattributes"), "commit.txt export-subst\n").unwrap();
        fs::write(repository.path().join("commit.txt"), "$Format:%H$\n").unwrap();
        fs::write(repository.path().join("crates/one.rs"), "1").unwrap();
        repository.git(&["init", "--quiet"]);
        repository.commit();
        repository
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn git(&self, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .arg("-C")
            .arg(self.path())
            .args(["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().into()
    }

    fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", "one"]);
    }

    fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"])[..12].to_string()
    }

    fn found(&self) -> commit::Found {
        commit::find(self.path(), &self.path().join("commit.txt"))
    }
}

#[test]
fn a_build_names_its_commit_and_whether_its_sources_are_other_ones() {
    let repository = Repository::new();
    assert_eq!(repository.found().name, repository.head());
    // A page that is no source makes no other program.
    fs::write(repository.path().join("README.md"), "1").unwrap();
    assert_eq!(repository.found().name, repository.head());
    fs::write(repository.path().join("crates/one.rs"), "2").unwrap();
    assert_eq!(repository.found().name, format!("{}-dirty", repository.head()));
    repository.commit();
    assert_eq!(repository.found().name, repository.head());
    fs::write(repository.path().join("crates/two.rs"), "2").unwrap();
    assert_eq!(repository.found().name, format!("{}-dirty", repository.head()));
}

#[test]
fn a_new_commit_and_a_changed_source_make_the_program_anew() {
    let repository = Repository::new();
    let found = repository.found().depends_on;
    let branch = repository.git(&["symbolic-ref", "HEAD"]);
    for path in ["crates", ".git/HEAD", &format!(".git/{branch}")] {
        let path = repository.path().join(path);
        assert!(found.contains(&path), "{} is not in {found:?}", path.display());
    }
}

#[test]
fn an_archive_knows_the_commit_that_it_is_of() {
    let repository = Repository::new();
    let archive = tempfile::tempdir().unwrap();
    let file = archive.path().join("source.tar");
    repository.git(&["archive", "--output", file.to_str().unwrap(), "HEAD"]);
    let unpacked = archive.path().join("source");
    fs::create_dir(&unpacked).unwrap();
    let tar = Command::new("tar").arg("xf").arg(&file).arg("-C").arg(&unpacked).status().unwrap();
    assert!(tar.success());
    let find = || commit::find(&unpacked, &unpacked.join("commit.txt")).name;
    assert_eq!(find(), repository.head());

    // Also inside of another repository, whose commit says nothing of it.
    let around =
        Command::new("git").arg("-C").arg(archive.path()).args(["init", "--quiet"]).status();
    assert!(around.unwrap().success());
    assert_eq!(find(), repository.head());

    // A copy without either does not know.
    fs::write(unpacked.join("commit.txt"), "$Format:%H$\n").unwrap();
    assert_eq!(find(), commit::UNKNOWN);
    fs::remove_file(unpacked.join("commit.txt")).unwrap();
    assert_eq!(find(), commit::UNKNOWN);
}
