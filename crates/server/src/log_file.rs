//! A file that lines are appended to, each in one write, wherever its name leads: it may be moved away at
//! any time, as those do who rotate logs.

use crate::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// See the module's text.
pub struct LogFile {
    /// For people.
    name: &'static str,
    /// What it means that it cannot be written.
    meaning: &'static str,
    path: PathBuf,
    /// None: it could not be opened.
    file: Option<File>,
    /// The last write failed, which was said, and may have left half a line.
    failed: bool,
}

impl LogFile {
    /// The audit log, the first time.
    pub fn of_audit(path: &Path) -> Result<LogFile, Error> {
        LogFile::open("audit log", "lines are lost", path)
            .map_err(|source| Error::AuditLog { path: path.to_path_buf(), source })
    }

    /// The metering log, the first time.
    pub fn of_metering(path: &Path) -> Result<LogFile, Error> {
        LogFile::open("metering log", "what was used is written down when it can be", path)
            .map_err(|source| Error::MeteringLog { path: path.to_path_buf(), source })
    }

    /// Readable for its owner only.
    fn open(name: &'static str, meaning: &'static str, path: &Path) -> io::Result<LogFile> {
        let file = Some(append(path)?);
        Ok(LogFile { name, meaning, path: path.to_path_buf(), file, failed: false })
    }

    /// Forgets the file, so that the next line goes to where the name leads then.
    pub fn reopen(&mut self) {
        self.file = None;
    }

    /// Appends a line, in one write. Whether it is in the file; the first failure is logged.
    pub fn write_line(&mut self, mut line: Vec<u8>) -> bool {
        line.push(b'\n');
        if self.failed {
            // The last one may have been cut off.
            line.insert(0, b'\n');
        }
        let written = self.put(&line);
        let (name, meaning) = (self.name, self.meaning);
        match &written {
            Ok(()) if self.failed => tracing::info!("the {name} can be written again"),
            Err(error) if !self.failed => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "the {name} cannot be written; {meaning}");
            }
            _ => {}
        }
        self.failed = written.is_err();
        written.is_ok()
    }

    /// The file of the last line, to be synced without holding up others.
    pub fn handle(&self) -> Option<File> {
        self.file.as_ref()?.try_clone().ok()
    }

    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        if !self.is_where_its_name_leads() {
            self.file = None;
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(append(&self.path)?),
        };
        file.write_all(line)
    }

    /// Whether nobody has moved it away.
    fn is_where_its_name_leads(&self) -> bool {
        let identity = |of: std::fs::Metadata| (of.dev(), of.ino());
        let ours = self.file.as_ref().and_then(|file| file.metadata().ok()).map(identity);
        ours.is_some() && ours == std::fs::metadata(&self.path).ok().map(identity)
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}
