//! The tenants file on disk: read, changed and replaced as a whole.

use super::edit::Tenants;
use anyhow::{Context, bail};
use offshoot_server::access::{Tenant, parse_tenants};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Only its owner has a use for it.
const NEW_MODE: u32 = 0o600;

pub struct TenantsFile {
    /// Behind links, which stay.
    path: PathBuf,
}

impl TenantsFile {
    pub fn open(path: PathBuf) -> anyhow::Result<TenantsFile> {
        let path = match fs::canonicalize(&path) {
            Ok(behind) => behind,
            // Absolute, too: whoever is told of a new file must find it.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let path =
                    std::path::absolute(&path).with_context(|| format!("{}", path.display()))?;
                let (dir, name) = (path.parent().map(fs::canonicalize), path.file_name());
                // A folder that is not there is told of when the file is written.
                match (dir, name) {
                    (Some(Ok(dir)), Some(name)) => dir.join(name),
                    _ => path,
                }
            }
            Err(error) => return Err(error).context(format!("{}", path.display())),
        };
        Ok(TenantsFile { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn must_exist(self) -> anyhow::Result<TenantsFile> {
        if !self.path.exists() {
            bail!(
                "there is no tenants file {}; `offshoot tenant add NAME` makes one, and --tenants or \
                 --config says where it is",
                self.path.display()
            );
        }
        Ok(self)
    }

    pub fn checked(&self) -> anyhow::Result<Vec<Tenant>> {
        let tenants = parse_tenants(&self.read()?);
        tenants.map_err(|cause| anyhow::anyhow!("{}: {cause}", self.path.display()))
    }

    /// Changes the text, if what comes of it is a tenants file. Changes come one after the other, of
    /// several programs, too; whoever reads meanwhile reads the old file or the new one.
    pub fn change<T>(
        &self,
        change: impl FnOnce(&mut Tenants) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let dir = self.dir();
        let locked = File::open(dir).with_context(|| format!("{}", dir.display()))?;
        // Where folders cannot be locked, an operator takes care not to do two things at once.
        let _ = locked.lock();
        let name = self.path.display();
        let tenants = Tenants::parse(&self.read()?);
        let mut tenants = tenants.with_context(|| format!("{name} is broken; mend it first"))?;
        let done = change(&mut tenants)?;
        let text = tenants.into_text();
        let text = text.with_context(|| format!("{name} stays as it was"))?;
        self.replace(&text).with_context(|| format!("cannot write {}", self.path.display()))?;
        locked.sync_all().with_context(|| format!("{}", dir.display()))?;
        Ok(done)
    }

    fn dir(&self) -> &Path {
        match self.path.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        }
    }

    /// Empty if it is not there yet.
    fn read(&self) -> anyhow::Result<String> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).context(format!("cannot read {}", self.path.display())),
        }
    }

    fn replace(&self, text: &str) -> anyhow::Result<()> {
        let before = fs::metadata(&self.path).ok();
        let half = self.path.with_extension(format!("new-{}", std::process::id()));
        let written =
            write(&half, text, before.as_ref()).and_then(|()| Ok(fs::rename(&half, &self.path)?));
        if written.is_err() {
            let _ = fs::remove_file(&half);
        }
        written
    }
}

/// A file that nobody else may read before it has the mode and the owner of the one before.
fn write(path: &Path, text: &str, before: Option<&Metadata>) -> anyhow::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(NEW_MODE).open(path)?;
    file.write_all(text.as_bytes())?;
    if let Some(before) = before {
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (before.uid(), before.gid()) {
            fchown(&file, Some(before.uid()), Some(before.gid())).with_context(|| {
                format!("the file belongs to user {}, and must stay readable for it", before.uid())
            })?;
        }
        file.set_permissions(fs::Permissions::from_mode(before.mode() & 0o7777))?;
    }
    Ok(file.sync_all()?)
}
