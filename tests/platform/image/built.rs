//! The image, made as `docker/Dockerfile` makes it.

use offshoot_platform::{offshoot, root, tool};
use serde_json::{Value, json};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

/// Below the target folder: half a gigabyte is much for a folder in memory.
fn folder(name: &str) -> tempfile::TempDir {
    // Other users, such as the image's, come through.
    let everybody = std::fs::Permissions::from_mode(0o755);
    let mut builder = tempfile::Builder::new();
    builder.prefix(name).permissions(everybody).tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub struct Tree(tempfile::TempDir);

impl Tree {
    /// The root of what the image has.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("tree")
    }
}

/// As the Dockerfile's stage `tree`, of this build's program.
pub fn tree() -> Tree {
    let tree = Tree(folder("image-tree-"));
    let xtask = offshoot().with_file_name("xtask");
    assert!(xtask.is_file(), "{} is not there: run `cargo build -p xtask`", xtask.display());
    let output = done(
        Command::new(xtask)
            .arg("image-tree")
            .arg("--out")
            .arg(tree.path())
            .arg("--binary")
            .arg(offshoot())
            .current_dir(root()),
    );
    println!("{output}");
    std::fs::create_dir(tree.0.path().join("empty")).unwrap();
    tree
}

/// The text of one stage of the Dockerfile.
fn stage(name: &str) -> String {
    let text = std::fs::read_to_string(root().join("docker/Dockerfile")).unwrap();
    let begin = text.find(&format!("FROM scratch AS {name}\n")).expect("the stage is there");
    let rest = &text[begin..];
    let end = rest[1..].find("\nFROM ").map_or(rest.len(), |end| end + 1);
    rest[..end].to_string()
}

pub struct Image {
    folder: tempfile::TempDir,
    /// Kept: the container's root may stand on it.
    _tree: Tree,
    root: PathBuf,
    pub config: Value,
}

impl Image {
    /// The Dockerfile's last stage, over a tree of this build. An error says why none can be built here.
    pub fn build() -> Result<Image, String> {
        let buildah = tool("buildah");
        let has_ids = || Command::new(&buildah).args(["unshare", "true"]).output();
        if !is_root() && !has_ids().is_ok_and(|output| output.status.success()) {
            return Err(
                "buildah needs root, or a user with subordinate ids (/etc/subuid) and the \
                package uidmap; `buildah unshare true` tells what is missing"
                    .into(),
            );
        }
        let tree = tree();
        let folder = folder("image-");
        let dockerfile = folder.path().join("Dockerfile");
        std::fs::write(&dockerfile, stage("runtime-cpu")).unwrap();
        let mut image = Image { folder, _tree: tree, root: PathBuf::new(), config: Value::Null };
        image.buildah(|command| {
            command
                .args(["bud", "--isolation", "chroot", "--format", "docker", "--layers=false"])
                .args(["--build-arg", "COMMIT=0123456789ab", "--tag", "offshoot-test"])
                .arg(format!("--build-context=tree={}", image._tree.0.path().display()))
                .arg("--file")
                .arg(&dockerfile)
                .arg(image._tree.0.path().join("empty"))
        });
        let text =
            image.buildah(|command| command.args(["inspect", "--type=image", "offshoot-test"]));
        let inspected: Value = serde_json::from_str(&text).unwrap();
        image.config = inspected["Docker"]["config"].clone();
        let container = image.buildah(|command| command.args(["from", "offshoot-test"]));
        let root = image.buildah(|command| command.args(["mount", container.trim()]));
        image.root = PathBuf::from(root.trim());
        // buildah keeps its folders to itself; the image's user is to come through.
        for folder in image.root.ancestors().skip(1).take_while(|path| *path != image.folder.path())
        {
            let _ = std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711));
        }
        Ok(image)
    }

    fn buildah(&self, arguments: impl FnOnce(&mut Command) -> &mut Command) -> String {
        let mut command = Command::new(tool("buildah"));
        command
            .args(["--storage-driver", "vfs", "--root"])
            .arg(self.folder.path().join("storage"))
            .arg("--runroot")
            .arg(self.folder.path().join("run"));
        done(arguments(&mut command))
    }

    /// Where its files are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn strings(&self, field: &str) -> Vec<String> {
        let values = self.config[field].as_array().unwrap_or_else(|| panic!("{field}"));
        values.iter().map(|value| value.as_str().unwrap().to_string()).collect()
    }

    pub fn health_check(&self) -> Vec<String> {
        let test = self.config["Healthcheck"]["Test"].as_array().expect("a health check");
        assert_eq!(test[0], "CMD", "there is no shell in the image");
        test[1..].iter().map(|word| word.as_str().unwrap().to_string()).collect()
    }

    /// Labels, user, ports, volumes, and what must not be in it.
    pub fn says_what_it_is(&self) {
        let config = &self.config;
        let label = |name: &str| &config["Labels"][format!("org.opencontainers.image.{name}")];
        assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));
        assert_eq!(label("revision"), "0123456789ab");
        assert_eq!(label("licenses"), "Apache-2.0");
        assert_eq!(label("source"), &Value::Null, "an unknown address is not given");
        assert_eq!(config["User"], "10001:10001");
        assert_eq!(config["StopSignal"], "SIGTERM");
        for port in ["50051/tcp", "9464/tcp"] {
            assert_eq!(config["ExposedPorts"][port], json!({}));
        }
        for volume in ["/var/lib/offshoot", "/var/cache/offshoot"] {
            assert_eq!(config["Volumes"][volume], json!({}));
            let data = std::fs::metadata(self.root.join(&volume[1..])).unwrap();
            assert!(data.is_dir());
            if is_root() {
                assert_eq!((data.uid(), data.gid()), (10001, 10001), "{volume}");
            }
        }
        let programs = files_below(&self.root.join("usr/bin"));
        assert_eq!(programs, [self.root.join("usr/bin/offshoot")], "no shell, no tools");
        let other = files_below(&self.root).into_iter().find(|path| {
            let data = path.symlink_metadata().unwrap();
            is_root() && data.uid() != 0
        });
        assert_eq!(other, None, "the files are root's, so that the program cannot change them");
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Mounted folders would keep their storage from being deleted.
        let mut command = Command::new(tool("buildah"));
        let root = self.folder.path().join("storage");
        let _ = command
            .args(["--storage-driver", "vfs", "--root"])
            .arg(root)
            .args(["rm", "--all"])
            .output();
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false if entry.file_type().unwrap().is_file() => found.push(entry.path()),
            false => {}
        }
    }
    found
}

pub fn sha256(path: &Path) -> String {
    let text = done(Command::new("sha256sum").arg(path));
    text.split_whitespace().next().unwrap().to_string()
}

/// By CycloneDX's own schema and library.
pub fn validate(file: &Path) {
    done(Command::new(tool("cyclonedx-validate")).arg(file));
}

/// What a command printed; it must succeed.
fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    text
}
