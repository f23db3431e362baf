//! Files as they appear in a folder, told by the kernel: quick enough to strike while one is written.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

/// A folder under watch.
pub struct FolderWatch {
    inotify: OwnedFd,
    seen: VecDeque<Appeared>,
}

/// A file or folder that was not there before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appeared {
    pub name: String,
    /// It came under another name into being; otherwise it was created under this one.
    pub renamed: bool,
}

impl FolderWatch {
    /// Watches from now on.
    pub fn new(folder: &Path) -> io::Result<FolderWatch> {
        let inotify = init(CreateFlags::CLOEXEC)?;
        add_watch(&inotify, folder, WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
        Ok(FolderWatch { inotify, seen: VecDeque::new() })
    }

    /// The next one, unless none comes for so long.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Appeared>> {
        if let Some(seen) = self.seen.pop_front() {
            return Ok(Some(seen));
        }
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], Some(&patience))? == 0 {
            return Ok(None);
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = reader.next()?;
            let renamed = event.events().contains(ReadFlags::MOVED_TO);
            let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
            self.seen.extend(name.map(|name| Appeared { name, renamed }));
            if reader.is_buffer_empty() {
                break;
            }
        }
        Ok(self.seen.pop_front())
    }
}
