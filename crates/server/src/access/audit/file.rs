use crate::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file that lines are appended to, wherever its name leads.
pub(super) struct LogFile {
    path: PathBuf,
    /// None: it could not be opened.
    file: Option<File>,
    /// The last write failed, which was said, and may have left half a line.
    failed: bool,
}

impl LogFile {
    /// The first time. Readable for its owner only.
    pub fn open(path: &Path) -> Result<LogFile, Error> {
        let file = append(path).map_err(|source| {
            let path = path.to_path_buf();
            Error::AuditLog { path, source }
        })?;
        Ok(LogFile { path: path.to_path_buf(), file: Some(file), failed: false })
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
        match &written {
            Ok(()) if self.failed => tracing::info!("the audit log can be written again"),
            Err(error) if !self.failed => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "the audit log cannot be written; lines are lost");
            }
            _ => {}
        }
        self.failed = written.is_err();
        written.is_ok()
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
