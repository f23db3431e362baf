//! Whether model, tokenizer and server fit together, with the errors that say what does not.

use crate::TrainError;
use crate::tokenizer::Tokenizer;
use offshoot_client::{ServerDescription, WireDType};
use offshoot_model::ModelConfig;

fn mismatch<T>(problem: String) -> Result<T, TrainError> {
    Err(TrainError::Mismatch { problem })
}

/// Split points that somebody asked for are the server's. `address` names the server in errors.
pub fn split_points(
    address: &str,
    server: &ServerDescription,
    wanted: [Option<usize>; 2],
) -> Result<(), TrainError> {
    for (name, wanted, has) in [
        ("--split-point-1", wanted[0], server.split_point_1 as usize),
        ("--split-point-2", wanted[1], server.split_point_2 as usize),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != has) {
            return mismatch(format!(
                "{name} is {wanted} here and {has} at the server {address}, whose trunk is the layers {} to {} of {}; leave {name} out to take the server's, or start the server with {name} {wanted}",
                server.split_point_1, server.split_point_2, server.n_layers,
            ));
        }
    }
    Ok(())
}

/// The server speaks the wire dtype.
pub fn wire_dtype(server: &ServerDescription, wanted: WireDType) -> Result<(), TrainError> {
    if server.wire_dtypes.contains(&wanted) {
        return Ok(());
    }
    let known: Vec<_> = server.wire_dtypes.iter().map(|dtype| dtype.name()).collect();
    mismatch(format!("--wire-dtype is {}, the server takes {}", wanted.name(), known.join(", ")))
}

/// The server lets an adapter have this rank.
pub fn rank(server: &ServerDescription, rank: usize) -> Result<(), TrainError> {
    let most = server.limits.max_rank as usize;
    if rank <= most {
        return Ok(());
    }
    Err(TrainError::Option {
        option: "lora-rank",
        value: rank.to_string(),
        problem: format!(
            "the server takes at most {most}; lower it, or raise the server's limits.max_rank or the tenant's quota rank"
        ),
    })
}

/// A family that somebody asked for is the model's.
pub fn model_type(
    model_name: &str,
    config: &ModelConfig,
    wanted: Option<&str>,
) -> Result<(), TrainError> {
    let family = config.family.name();
    match wanted.filter(|wanted| *wanted != family) {
        None => Ok(()),
        Some(wanted) => Err(TrainError::Option {
            option: "model-type",
            value: wanted.into(),
            problem: format!(
                "{model_name} is of type {family}; leave the option out, or name another model"
            ),
        }),
    }
}

/// The server holds the model that was loaded here as `model_name`, by its fingerprint.
pub fn fingerprint(
    server: &ServerDescription,
    model_name: &str,
    config: &ModelConfig,
    fingerprint: &str,
) -> Result<(), TrainError> {
    if server.fingerprint == fingerprint {
        return Ok(());
    }
    mismatch(format!(
        "the models differ. The server holds {} ({}, {} layers, fingerprint {}); this client loaded {model_name} ({}, {} layers, fingerprint {fingerprint}). Use the same files, revision and quantisation on both sides",
        server.model_name,
        server.model_type,
        server.n_layers,
        server.fingerprint,
        config.family.name(),
        config.n_layers,
    ))
}

/// The highest token id of a text is one of the model's.
pub fn vocabulary(
    highest: i64,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<(), TrainError> {
    if highest < config.vocab_size {
        return Ok(());
    }
    Err(tokenizer.wrong(format!(
        "it does not belong to this model: the text has token {highest}, the model knows 0 to {} (the tokenizer has {} tokens). Was a token added to the tokenizer only, or is it another model's? Use the tokenizer files that came with the model",
        config.vocab_size - 1,
        tokenizer.vocab_size(),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::{DataSpec, Sources};
    use crate::data::{DataOptions, DataSet};
    use serde_json::Value;
    use std::path::Path;

    #[test]
    fn a_tokenizer_of_another_model_is_refused() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text");
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let mut model: Value = serde_json::from_str(&text).unwrap();
        let tokenizer = Tokenizer::from_dir(&dir, &model).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "The trunk holds the branches.").unwrap();
        let Sources { train, .. } = DataSpec::files(vec![path]).open().unwrap();
        let data = DataSet::load(&train, &DataOptions::default(), &tokenizer).unwrap();
        let highest = data.highest_id();

        let own = ModelConfig::from_json(&model).unwrap();
        assert!(vocabulary(highest, &tokenizer, &own).is_ok());
        // The smallest vocabulary that has the token, and one without it.
        model["vocab_size"] = Value::from(highest + 1);
        let enough = ModelConfig::from_json(&model).unwrap();
        assert!(vocabulary(highest, &tokenizer, &enough).is_ok());
        model["vocab_size"] = Value::from(highest);
        let small = ModelConfig::from_json(&model).unwrap();
        let error = vocabulary(highest, &tokenizer, &small).unwrap_err().to_string();
        let expected = format!(
            "tokenizer.json: it does not belong to this model: the text has token {highest}, the model knows 0 to {} (the tokenizer has {} tokens). Was a token added",
            highest - 1,
            tokenizer.vocab_size()
        );
        assert!(error.contains(&expected), "{error}");
    }
}
