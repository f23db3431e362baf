//! Whether an adapter's tensors are those that its settings mean in a model.

use super::{Adapter, does_not_fit, layer_of};
use crate::TrainError;
use offshoot_adapters::Site;
use offshoot_model::{ModelConfig, is_target};
use std::collections::{BTreeMap, HashMap};
use tch::{Kind, Tensor};

/// Tensors that an error names of each kind of problem.
const NAMED: usize = 1;

/// See [`Adapter::fit`].
pub(super) fn fit(mut adapter: Adapter, config: &ModelConfig) -> Result<Adapter, TrainError> {
    let everywhere = config.sites(0..config.n_layers, &["all-linear".to_string()])?;
    let targets = &adapter.spec.target_modules;
    let meant = |site: &&Site| targets.iter().any(|target| is_target(&site.path, target));
    let sites: Vec<&Site> = everywhere.iter().filter(meant).collect();
    if sites.is_empty() {
        return Err(does_not_fit(
            &adapter.origin,
            format!(
                "its target_modules {targets:?} mean no linear layer of a {} block; there are {}{}",
                config.family.name(),
                config.lora_modules().join(", "),
                made_for(&adapter),
            ),
        ));
    }
    let problems = Problems::find(&adapter, &sites);
    if !problems.is_empty() {
        let cause = problems.cause(&adapter, config);
        return Err(does_not_fit(
            &adapter.origin,
            format!("{cause}{}. {problems}", made_for(&adapter)).replace("?.", "?"),
        ));
    }
    adapter.spec.target_modules = shortest_targets(config, &sites);
    Ok(adapter)
}

fn made_for(adapter: &Adapter) -> String {
    match &adapter.base_model {
        Some(name) => format!(". It names {name} as its base model"),
        None => String::new(),
    }
}

#[derive(Default)]
struct Problems {
    missing: Vec<String>,
    unknown: Vec<String>,
    wrong_shape: Vec<String>,
    /// NaN or infinity in them.
    not_finite: Vec<String>,
    /// Set if every tensor has this rank and the settings say another one.
    other_rank: Option<i64>,
}

impl Problems {
    fn find(adapter: &Adapter, sites: &[&Site]) -> Self {
        let mut problems = Problems::default();
        let mut left: BTreeMap<&str, &Tensor> =
            adapter.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let r = adapter.spec.r as i64;
        let mut ranks = Vec::new();
        for site in sites {
            let shapes = [[r, site.d_in], [site.d_out, r]];
            for (name, expected) in site.peft_names().into_iter().zip(shapes) {
                let Some(tensor) = left.remove(name.as_str()) else {
                    problems.missing.push(format!("\"{name}\" {expected:?}"));
                    continue;
                };
                let found = tensor.size();
                if found != expected {
                    let own = found.iter().find(|n| **n != site.d_in && **n != site.d_out);
                    ranks.push(own.copied());
                    problems
                        .wrong_shape
                        .push(format!("\"{name}\" is {found:?}, expected {expected:?}"));
                } else if !tensor.sum(Kind::Double).double_value(&[]).is_finite() {
                    problems.not_finite.push(format!("\"{name}\""));
                }
            }
        }
        problems.unknown = left.keys().map(|name| format!("\"{name}\"")).collect();
        problems.other_rank = match ranks.first() {
            Some(Some(first)) if ranks.iter().all(|rank| *rank == Some(*first)) => Some(*first),
            _ => None,
        };
        problems
    }

    fn kinds(&self) -> [(&'static str, &Vec<String>); 4] {
        [
            ("missing", &self.missing),
            ("of no linear layer that its target_modules mean", &self.unknown),
            ("of another shape", &self.wrong_shape),
            ("not finite", &self.not_finite),
        ]
    }

    fn is_empty(&self) -> bool {
        self.kinds().iter().all(|(_, names)| names.is_empty())
    }

    /// What is likely behind them.
    fn cause(&self, adapter: &Adapter, config: &ModelConfig) -> String {
        let layers = adapter.tensors.iter().filter_map(|(name, _)| layer_of(name)).max();
        let r = adapter.spec.r;
        match (self.other_rank, layers) {
            (Some(rank), _) => format!(
                "its settings say r = {r} and its tensors have rank {rank}: are the two files of one adapter?"
            ),
            (None, Some(last)) if last + 1 != config.n_layers => format!(
                "it has layers 0 to {last}, the model has {}: was it made for another model?",
                config.n_layers
            ),
            _ if !self.not_finite.is_empty() => "its training has diverged".into(),
            _ => "was it made for another model?".into(),
        }
    }
}

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut between = "";
        for (what, names) in self.kinds().into_iter().filter(|(_, names)| !names.is_empty()) {
            let first = names[..names.len().min(NAMED)].join(", ");
            let more = if names.len() > NAMED { ", ..." } else { "" };
            write!(f, "{between}{} {what} ({first}{more})", tensors(names.len()))?;
            between = "; ";
        }
        Ok(())
    }
}

fn tensors(n: usize) -> String {
    if n == 1 { "1 tensor".into() } else { format!("{n} tensors") }
}

/// The shortest `target_modules` that mean exactly these sites: a module's name if all layers have
/// it, its last part where that is not another module's too, and paths for single layers.
fn shortest_targets(config: &ModelConfig, sites: &[&Site]) -> Vec<String> {
    let mut by_module: HashMap<&str, Vec<&Site>> = HashMap::new();
    for site in sites {
        by_module.entry(&site.module).or_default().push(site);
    }
    let is_whole = |module: &str| by_module.get(module).is_some_and(|s| s.len() == config.n_layers);
    let last = |module: &str| module.rsplit('.').next().unwrap_or_default().to_string();
    let modules = config.lora_modules();
    let mut targets = Vec::new();
    for module in modules.iter().copied().filter(|module| by_module.contains_key(module)) {
        let name = last(module);
        if modules.iter().filter(|other| last(other) == name).all(|other| is_whole(other)) {
            targets.push(name);
        } else if is_whole(module) {
            targets.push(module.to_string());
        } else {
            targets.extend(by_module[module].iter().map(|site| site.path.clone()));
        }
    }
    targets.sort();
    targets.dedup();
    targets
}
