//! Samples that were made before, found again by what they were made of.

use super::source::{Content, DataSource, Record};
use super::{DataOptions, DataSet, LoadStats};
use crate::TrainError;
use crate::tokenizer::Tokenizer;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Of the way from records to samples, and of the file. Raised with every change of either.
const VERSION: u32 = 1;

/// One file of the cache: it has the samples of this key, or is not there.
pub(super) struct Cached {
    path: PathBuf,
}

/// Where samples are kept by default: the folder `OFFSHOOT_CACHE`, or `offshoot/tokens` in the
/// user's cache folder. None if there is no such folder. It may be deleted at any time.
pub fn default_cache_dir() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("OFFSHOOT_CACHE").or_else(|| {
        let of_user = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(of_user.join("offshoot/tokens"))
    })
}

impl Cached {
    /// The key has everything that samples depend on: the records, by a source's own fingerprint or
    /// else one by one; the tokenizer with its chat template; the options.
    pub fn find(
        dir: &Path,
        sources: &[Box<dyn DataSource>],
        options: &DataOptions,
        tokenizer: &Tokenizer,
    ) -> Result<Cached, TrainError> {
        let mut key = Key(blake3::Hasher::new());
        key.add(&VERSION.to_le_bytes());
        // With the chat template that was chosen.
        key.add(tokenizer.fingerprint()?.as_bytes());
        let DataOptions {
            max_seq_length,
            max_samples,
            prompt_format,
            long_samples,
            loss_on,
            chat_template: _,
            cache_dir: _,
        } = options;
        let choices = (max_seq_length, max_samples, prompt_format, long_samples, loss_on);
        key.add(format!("{choices:?}").as_bytes());
        for source in sources {
            match source.fingerprint()? {
                Some(fingerprint) => key.add(fingerprint.as_bytes()),
                None => {
                    for located in source.records()? {
                        key.add_record(&located?.1);
                    }
                }
            }
        }
        let name = key.0.finalize().to_hex();
        Ok(Cached { path: dir.join(format!("{}.safetensors", &name[..32])) })
    }

    /// The samples, if they are there and whole.
    pub fn read(&self) -> Option<DataSet> {
        if !self.path.is_file() {
            return None;
        }
        match self.try_read() {
            Ok(data) => Some(data),
            Err(problem) => {
                let path = self.path.display();
                tracing::warn!(%path, problem, "a damaged file of the token cache; made again");
                None
            }
        }
    }

    fn try_read(&self) -> Result<DataSet, String> {
        let bytes = fs::read(&self.path).map_err(|e| e.to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| e.to_string())?;
        let texts = header.metadata().as_ref().ok_or("it has no metadata")?;
        let text = |name: &str| texts.get(name).ok_or(format!("it has no {name}"));
        let file = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
        let part =
            |name: &str| Ok::<_, String>(file.tensor(name).map_err(|e| e.to_string())?.data());
        let parts = Parts { ids: part("ids")?, learn: part("learn")?, lengths: part("lengths")? };
        let (stats, unit) = (text("stats")?, text("unit")?);
        if *text("blake3")? != parts.sum(stats, unit) {
            return Err("its content is not what its checksum says".into());
        }
        parts.unpack(stats, unit)
    }

    /// Keeps samples. A cache that cannot be written costs time, not the run.
    pub fn write(&self, data: &DataSet) {
        if let Err(problem) = self.try_write(data) {
            let path = self.path.display();
            tracing::warn!(%path, problem, "the tokens are not kept for the next run");
        }
    }

    fn try_write(&self, data: &DataSet) -> Result<(), String> {
        let dir = self.path.parent().ok_or("no folder")?;
        fs::create_dir_all(dir).map_err(|e| e.to_string())?;
        let ids = le_bytes(data.ids.iter().copied());
        let learn = pack_bits(&data.learn);
        let lengths = le_bytes((0..data.len()).map(|i| data.length(i) as u32));
        let parts = Parts { ids: &ids, learn: &learn, lengths: &lengths };
        let stats = serde_json::to_string(&data.stats).map_err(|e| e.to_string())?;
        let unit = data.unit.to_string();
        let sum = parts.sum(&stats, &unit);
        let metadata = [("stats", stats), ("unit", unit), ("blake3", sum)];
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(name, text)| (name.to_string(), text)).collect();
        let views = parts.views()?;
        // Another run may write the same file: whoever is last replaces it as a whole.
        let partial = tempfile::NamedTempFile::new_in(dir).map_err(|e| e.to_string())?;
        serialize_to_file(views, Some(metadata), partial.path()).map_err(|e| e.to_string())?;
        partial.persist(&self.path).map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// The tensors of a file.
struct Parts<'a> {
    /// u32 `[N]`.
    ids: &'a [u8],
    /// `[N / 8]`, a bit for each token, the lowest first.
    learn: &'a [u8],
    /// u32, one for each sample.
    lengths: &'a [u8],
}

impl Parts<'_> {
    fn views(&self) -> Result<Vec<(&'static str, TensorView<'_>)>, String> {
        let view = |dtype, size, bytes| {
            TensorView::new(dtype, vec![<[u8]>::len(bytes) / size], bytes)
                .map_err(|e| e.to_string())
        };
        Ok(vec![
            ("ids", view(Dtype::U32, 4, self.ids)?),
            ("learn", view(Dtype::U8, 1, self.learn)?),
            ("lengths", view(Dtype::U32, 4, self.lengths)?),
        ])
    }

    fn sum(&self, stats: &str, unit: &str) -> String {
        let mut key = Key(blake3::Hasher::new());
        for part in [self.ids, self.learn, self.lengths, stats.as_bytes(), unit.as_bytes()] {
            key.add(part);
        }
        key.0.finalize().to_hex().to_string()
    }

    fn unpack(&self, stats: &str, unit: &str) -> Result<DataSet, String> {
        let numbers = |bytes: &[u8]| -> Vec<u32> {
            bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
        };
        let ids = numbers(self.ids);
        let bit = |i: usize| self.learn[i / 8] >> (i % 8) & 1 == 1;
        if self.learn.len() != ids.len().div_ceil(8) {
            return Err("ids and masks are of different lengths".into());
        }
        let learn = (0..ids.len()).map(bit).collect();
        let mut end = 0;
        let ends = numbers(self.lengths).into_iter().map(|n| {
            end += n as usize;
            end
        });
        let ends: Vec<usize> = ends.collect();
        if ends.last().copied().unwrap_or_default() != ids.len() {
            return Err("ids and samples are of different lengths".into());
        }
        let stats: LoadStats = serde_json::from_str(stats).map_err(|e| e.to_string())?;
        let unit = unit.parse().map_err(|_| "its unit is no number")?;
        Ok(DataSet { ids, learn, ends, unit, stats, cached: true })
    }
}

fn le_bytes(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
    numbers.flat_map(u32::to_le_bytes).collect()
}

fn pack_bits(bits: &[bool]) -> Vec<u8> {
    let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
    bits.chunks(8).map(byte).collect()
}

/// A hash of parts that cannot be taken for parts cut elsewhere.
struct Key(blake3::Hasher);

impl Key {
    fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn add_record(&mut self, record: &Record) {
        let json = |value: &[serde_json::Value]| serde_json::Value::from(value).to_string();
        match record {
            Record::Text(text) => {
                self.add(b"text");
                self.add(text.as_bytes());
            }
            Record::Completion { prompt, completion } => {
                self.add(b"completion");
                self.add(prompt.as_bytes());
                self.add(completion.as_bytes());
            }
            Record::Chat { messages, tools } => {
                self.add(b"chat");
                self.add(json(messages).as_bytes());
                self.add(json(tools).as_bytes());
            }
            Record::Preference { prompt, chosen, rejected } => {
                self.add(b"preference");
                for content in [prompt, chosen, rejected] {
                    match content {
                        Content::Text(text) => {
                            self.add(b"text");
                            self.add(text.as_bytes());
                        }
                        Content::Messages(messages) => {
                            self.add(b"messages");
                            self.add(json(messages).as_bytes());
                        }
                    }
                }
            }
        }
    }
}
