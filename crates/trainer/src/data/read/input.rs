use crate::TrainError;
use crate::data::source::Place;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

/// Every answer of a compressed or plain file comes through a buffer of this size.
const BUFFER_BYTES: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// By the first bytes of a file.
    fn of_bytes(magic: &[u8]) -> Option<Compression> {
        match magic {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// By a file's name, with what is left of it.
    pub(super) fn of_name(name: &str) -> (&str, Option<Compression>) {
        let lower = name.to_lowercase();
        for (ending, compression) in
            [(".gz", Compression::Gzip), (".zst", Compression::Zstd), (".zstd", Compression::Zstd)]
        {
            if lower.ends_with(ending) {
                return (&name[..name.len() - ending.len()], Some(compression));
            }
        }
        (name, None)
    }

    fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }
}

/// What a file is called in messages, and how it is packed.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub name: Arc<str>,
    pub compression: Option<Compression>,
}

impl Origin {
    pub fn whole(&self) -> Place {
        Place::whole(self.name.clone())
    }

    pub fn line(&self, line: usize) -> Place {
        Place::line(self.name.clone(), line)
    }

    pub fn row(&self, row: usize) -> Place {
        Place::row(self.name.clone(), row)
    }

    /// A failed read at `place`: a damaged archive, or the disk.
    pub fn failed(&self, place: &Place, error: &io::Error) -> TrainError {
        place.wrong(match self.compression {
            Some(compression) => format!(
                "the {} data are damaged or cut off ({error}); fetch or pack the file again",
                compression.name()
            ),
            None => format!("cannot be read: {error}"),
        })
    }
}

/// An open file, unpacked as it is read.
pub(super) struct Input {
    pub origin: Origin,
    pub reader: Box<dyn BufRead + Send>,
}

impl Input {
    /// Opens `path`, called `name` in messages. How it is packed is seen from its first bytes; a
    /// name that says otherwise is an error.
    pub fn open(path: &Path, name: &Arc<str>) -> Result<Input, TrainError> {
        let (file, compression) = open(path, name)?;
        let origin = Origin { name: name.clone(), compression };
        let failed = |error| origin.failed(&origin.whole(), &error);
        let reader: Box<dyn BufRead + Send> = match compression {
            None => Box::new(BufReader::with_capacity(BUFFER_BYTES, file)),
            Some(Compression::Gzip) => {
                let unpacked = flate2::read::MultiGzDecoder::new(file);
                Box::new(BufReader::with_capacity(BUFFER_BYTES, unpacked))
            }
            Some(Compression::Zstd) => {
                let unpacked = zstd::Decoder::new(file).map_err(failed)?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, unpacked))
            }
        };
        Ok(Input { origin, reader })
    }

    /// A file in which one can go back and forth, as Parquet needs it: a packed one is unpacked
    /// into a file that has no name and goes away by itself.
    pub fn open_seekable(path: &Path, name: &Arc<str>) -> Result<(Origin, File), TrainError> {
        let mut input = Input::open(path, name)?;
        let origin = input.origin.clone();
        let failed = |error| origin.failed(&origin.whole(), &error);
        if origin.compression.is_none() {
            let file = File::open(path).map_err(failed)?;
            return Ok((origin, file));
        }
        let mut unpacked = tempfile::tempfile().map_err(TrainError::io(&std::env::temp_dir()))?;
        io::copy(&mut input.reader, &mut unpacked).map_err(failed)?;
        unpacked.rewind().map_err(failed)?;
        Ok((origin, unpacked))
    }
}

fn open(path: &Path, name: &Arc<str>) -> Result<(File, Option<Compression>), TrainError> {
    let whole = Place::whole(name.clone());
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => whole.wrong("there is no such file"),
        _ => whole.wrong(format!("cannot be read: {error}")),
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut magic = Vec::new();
    (&mut file).take(4).read_to_end(&mut magic).map_err(failed)?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let found = Compression::of_bytes(&magic);
    let (_, named) = Compression::of_name(name);
    match named {
        Some(named) if found != Some(named) => Err(whole.wrong(match magic.is_empty() {
            true => "the file is empty".to_string(),
            false => format!(
                "the name says {}, the first bytes do not: the file is damaged, or it was unpacked already and should be called without the ending",
                named.name()
            ),
        })),
        _ => Ok((file, found)),
    }
}
