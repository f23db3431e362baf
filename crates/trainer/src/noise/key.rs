use super::PrivacyOptions;
use crate::TrainError;
use crate::checkpoint::Saved;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// In the output directory of a run with noise.
const FILE: &str = "noise_key";

/// What noise is a function of, and what no server may know: whoever has it can subtract the noise.
#[derive(Clone, PartialEq)]
pub struct NoiseKey([u8; 32]);

impl NoiseKey {
    /// One that nobody has.
    pub fn draw() -> Self {
        NoiseKey(rand::random())
    }

    /// One of your own, for runs that are to be repeated to the bit.
    pub fn of(bytes: [u8; 32]) -> Self {
        NoiseKey(bytes)
    }

    pub(super) fn hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.0)
    }

    /// Into a run's folder, for nobody else to read.
    fn write(&self, dir: &Path) -> Result<(), TrainError> {
        let path = dir.join(FILE);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        let text = blake3::Hash::from(self.0).to_hex();
        let written = file.and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(TrainError::io(&path))
    }

    /// None: there is none.
    fn read(dir: &Path) -> Result<Option<Self>, TrainError> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        match blake3::Hash::from_hex(text.trim()) {
            Ok(hash) => Ok(Some(NoiseKey(*hash.as_bytes()))),
            Err(_) => Err(TrainError::Checkpoint {
                path,
                problem: "expected the key of the run's noise, 64 hexadecimal digits; put the file back, or delete it to go on with other noise".into(),
            }),
        }
    }
}

/// Nothing that is printed may have it.
impl std::fmt::Debug for NoiseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("NoiseKey(..)")
    }
}

impl PrivacyOptions {
    /// Whether any noise is added.
    fn adds_noise(&self) -> bool {
        self.hidden.noise > 0.0 || self.gradients.noise > 0.0
    }

    /// Keeps the key for resumed runs, if there is noise that needs it.
    pub(crate) fn write_key(&self, dir: &Path) -> Result<(), TrainError> {
        match &self.noise_key {
            Some(key) if self.adds_noise() => key.write(dir),
            _ => Ok(()),
        }
    }
}

/// The key of a run: the one it is given, the one of the run that it goes on from, or a new one.
pub(crate) fn of_run(
    options: &PrivacyOptions,
    resumed: Option<&Saved>,
) -> Result<NoiseKey, TrainError> {
    if let Some(key) = &options.noise_key {
        return Ok(key.clone());
    }
    let Some(saved) = resumed.filter(|_| options.adds_noise()) else { return Ok(NoiseKey::draw()) };
    if let Some(dir) = saved.path.parent()
        && let Some(key) = NoiseKey::read(dir)?
    {
        return Ok(key);
    }
    let settings = &saved.state.settings;
    if settings.hidden_noise > 0.0 || settings.gradient_noise > 0.0 {
        tracing::warn!(
            checkpoint = %saved.path.display(),
            "the run's {FILE} is not beside its checkpoint: the noise from here on is not the one that the uninterrupted run would have had"
        );
    }
    Ok(NoiseKey::draw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_file_and_is_printed_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(NoiseKey::read(dir.path()).unwrap(), None);
        let key = NoiseKey::draw();
        assert_ne!(key, NoiseKey::draw());
        key.write(dir.path()).unwrap();
        assert_eq!(NoiseKey::read(dir.path()).unwrap(), Some(key.clone()));
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(!format!("{key:?}").contains(&text[..8]));
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join(FILE), "abc").unwrap();
        let error = NoiseKey::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("64 hexadecimal digits"), "{error}");
    }
}
