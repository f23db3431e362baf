//! The three parts of a checkpoint as one adapter.
//!
//! Our parts have the names of the whole model. SplitLearn's parts are models of their own: each
//! counts its layers from 0 and has no name in front of them
//! (`base_model.model.h.0.attn.c_attn...`). It writes a layer for every block, so the parts' counts
//! say where each begins.

use super::{Adapter, does_not_fit};
use crate::TrainError;
use offshoot_adapters::peft::{self, PeftAdapter};
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

const PARTS: [&str; 3] = ["bottom", "trunk", "top"];
const ADAPTERS: &str = "lora_adapters";
/// SplitLearn's name of the list of layers, and the whole model's.
const LISTS: [(&str, &str); 2] = [("h.", "transformer.h."), ("layers.", "model.layers.")];

/// Whether a directory looks like a checkpoint, ours or SplitLearn's.
pub(super) fn is_checkpoint(path: &Path) -> bool {
    PARTS.iter().any(|part| path.join(part).join(ADAPTERS).is_dir())
        || PARTS.iter().all(|part| path.join(part).join("metadata.json").is_file())
}

/// One adapter of the parts in a checkpoint's directory.
pub(super) fn read(path: &Path) -> Result<Adapter, TrainError> {
    let trunk = path.join("trunk").join(ADAPTERS);
    if !trunk.is_dir() && !has_no_lora(&path.join("trunk")) {
        return Err(does_not_fit(
            path,
            "it has no trunk/lora_adapters, so the middle layers' part of the adapter is not here (SplitLearn never saves it). Take a checkpoint of offshoot train, or a whole PEFT adapter".into(),
        ));
    }
    stitch(path, parts(path, &PARTS)?)
}

/// Bottom and top of a checkpoint.
pub(super) fn client_parts(path: &Path) -> Result<Vec<Part>, TrainError> {
    parts(path, &["bottom", "top"])
}

/// A part's name and its adapter.
type Part = (&'static str, PeftAdapter);

fn parts(path: &Path, names: &[&'static str]) -> Result<Vec<Part>, TrainError> {
    let mut parts = Vec::new();
    for part in names {
        let dir = path.join(part).join(ADAPTERS);
        if dir.is_dir() {
            parts.push((*part, peft::read_dir(&dir)?));
        }
    }
    Ok(parts)
}

/// One adapter of parts, lowest layers first where they count from 0.
pub(super) fn stitch(path: &Path, parts: Vec<Part>) -> Result<Adapter, TrainError> {
    let mut first_layer = 0;
    let mut whole: Option<Adapter> = None;
    for (part, mut adapter) in parts {
        if is_local(&adapter) {
            first_layer += renumber(&mut adapter, first_layer);
        }
        match &mut whole {
            None => whole = Some(Adapter::from_peft(adapter, path)),
            Some(whole) => join(whole, part, adapter)?,
        }
    }
    whole.ok_or_else(|| does_not_fit(path, "none of its parts has an adapter".into()))
}

/// Our own metadata say that LoRA has no place in this part.
fn has_no_lora(part: &Path) -> bool {
    let text = std::fs::read_to_string(part.join("metadata.json")).unwrap_or_default();
    let metadata: Value = serde_json::from_str(&text).unwrap_or_default();
    metadata["n_lora_tensors"] == 0
}

fn is_local(adapter: &PeftAdapter) -> bool {
    let local = |name: &str| LISTS.iter().any(|(list, _)| name.starts_with(list));
    adapter.tensors.iter().filter_map(|(name, _)| peft::module_path(name)).any(local)
}

/// Gives a part's tensors their names in the whole model; gives the part's number of layers.
fn renumber(adapter: &mut PeftAdapter, first_layer: usize) -> usize {
    let mut n_layers = 0;
    let mut global = |name: &str| -> Option<String> {
        let name = name.strip_prefix("base_model.model.")?;
        LISTS.iter().find_map(|(list, whole)| {
            let (layer, rest) = name.strip_prefix(list)?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            // A number that no layer has stays: then the name is of no layer of any model.
            let renumbered = first_layer.checked_add(layer).filter(|&n| n < usize::MAX / 4)?;
            n_layers = n_layers.max(layer + 1);
            Some(format!("base_model.model.{whole}{renumbered}.{rest}"))
        })
    };
    for (name, _) in &mut adapter.tensors {
        if let Some(renamed) = global(name) {
            *name = renamed;
        }
    }
    n_layers
}

fn join(whole: &mut Adapter, part: &str, adapter: PeftAdapter) -> Result<(), TrainError> {
    let origin = whole.origin.clone();
    let (was, is) = (&mut whole.spec, adapter.spec);
    for (field, was, is) in [
        ("r", was.r.to_string(), is.r.to_string()),
        ("lora_alpha", was.lora_alpha.to_string(), is.lora_alpha.to_string()),
        ("use_rslora", was.use_rslora.to_string(), is.use_rslora.to_string()),
    ] {
        if was != is {
            return Err(does_not_fit(
                &origin,
                format!(
                    "{field} is {is} in its {part} and {was} in another part; are the parts of one run and step?"
                ),
            ));
        }
    }
    let new: Vec<String> =
        is.target_modules.into_iter().filter(|name| !was.target_modules.contains(name)).collect();
    was.target_modules.extend(new);
    let known: HashSet<&str> = whole.tensors.iter().map(|(name, _)| name.as_str()).collect();
    if let Some((name, _)) = adapter.tensors.iter().find(|(name, _)| known.contains(name.as_str()))
    {
        return Err(does_not_fit(
            &origin,
            format!("\"{name}\" is in its {part} and in another part"),
        ));
    }
    whole.tensors.extend(adapter.tensors);
    Ok(())
}
