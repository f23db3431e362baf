//! An adapter as a directory of PEFT's, for PEFT and for servers of LoRA models.

use super::{Adapter, Step, does_not_fit, read, stitch};
use crate::TrainError;
use crate::checkpoint::Saved;
use crate::wire::host_to_tensor;
use offshoot_adapters::LoraSpec;
use offshoot_adapters::peft::{self, PeftAdapter, PeftConfig};
use offshoot_client::{Client, ExportedAdapter, LoraConfig, SessionId};
use std::fs;
use std::path::Path;
use tch::Kind;

const CARD: &str = "README.md";

/// What [`Adapter::export`] writes.
pub struct ExportOptions<'a> {
    /// Must not exist, or be empty.
    pub output_dir: &'a Path,
    /// Path or hub name of the base model, for `AutoPeftModel` and for people.
    pub base_model: &'a str,
    /// dtype of the tensors: float32, bfloat16 or float16.
    pub kind: Kind,
}

impl Adapter {
    /// Writes the adapter as PEFT writes one, with a model card of a few lines.
    pub fn export(&self, options: &ExportOptions<'_>) -> Result<(), TrainError> {
        let ExportOptions { output_dir, base_model, kind } = options;
        refuse_existing(output_dir)?;
        let config =
            PeftConfig { spec: &self.spec, base_model, fan_in_fan_out: self.is_of_conv1d() };
        peft::write_dir_as(output_dir, &config, &self.tensors, *kind)?;
        let path = output_dir.join(CARD);
        fs::write(&path, card(&self.spec, base_model)).map_err(TrainError::io(&path))
    }

    /// Of a model whose linear layers are stored `[in, out]`: GPT-2's.
    fn is_of_conv1d(&self) -> bool {
        let paths = self.tensors.iter().filter_map(|(name, _)| peft::module_path(name));
        paths.take(1).any(|path| path.starts_with("transformer.h."))
    }

    /// The adapter of a session, live or parked: the trunk from the server, bottom and top from the
    /// client's checkpoint of the same step. `source` is that checkpoint, or the run's directory.
    ///
    /// # Errors
    /// If the session is at another step than the checkpoint, or is another one's.
    pub async fn of_session(
        client: &Client,
        source: &Path,
        step: Step,
    ) -> Result<Self, TrainError> {
        let path = read::checkpoint_dir(source, step)?;
        let saved = Saved::read(&path)?;
        let wrong = |problem: String| TrainError::Checkpoint { path: path.clone(), problem };
        let Some((session, _)) = saved.state.snapshot() else {
            return Err(wrong(
                "it names no session of a server; export it without --server".into(),
            ));
        };
        let exported = client.export_session(&SessionId::from(session)).await?;
        let (here, there) = (saved.state.step, exported.step);
        if here != there {
            return Err(wrong(format!(
                "it is of step {here}, and the session {session} is at step {there} on the server; leave --server out to take the trunk as it was at step {here}, or let the run write a checkpoint"
            )));
        }
        let mut parts = stitch::client_parts(&path)?;
        parts.push(("session on the server", of_server(exported)?));
        let mut adapter = stitch::stitch(&path, parts)?;
        adapter.base_model = Some(saved.state.settings.model_name);
        Ok(adapter)
    }

    /// The adapter of a session whose trunk is the only part with LoRA: without a checkpoint of the
    /// client. Whether that is the whole adapter, only a model tells; see [`Adapter::fit`].
    pub async fn of_trunk(client: &Client, session: &SessionId) -> Result<Self, TrainError> {
        let exported = client.export_session(session).await?;
        let origin = format!("session {session}");
        let mut adapter = Adapter::from_peft(of_server(exported)?, Path::new(&origin));
        if adapter.tensors.is_empty() {
            return Err(does_not_fit(&adapter.origin, "its trunk has no LoRA".into()));
        }
        adapter.base_model = Some(client.describe().await?.model_name);
        Ok(adapter)
    }
}

fn of_server(exported: ExportedAdapter) -> Result<PeftAdapter, TrainError> {
    let LoraConfig { r, lora_alpha, lora_dropout, use_rslora, target_modules } = exported.lora;
    let spec = LoraSpec { r: r as usize, lora_alpha, lora_dropout, use_rslora, target_modules };
    spec.validate()?;
    let tensors = exported.tensors.iter();
    let tensors = tensors.map(|(name, tensor)| (name.clone(), host_to_tensor(tensor))).collect();
    Ok(PeftAdapter { spec, tensors, base_model: None })
}

fn refuse_existing(dir: &Path) -> Result<(), TrainError> {
    if !dir.exists() || fs::read_dir(dir).map_err(TrainError::io(dir))?.next().is_none() {
        return Ok(());
    }
    Err(TrainError::Option {
        option: "output",
        value: dir.display().to_string(),
        problem: "it has something in it already; name a new folder, or remove it first".into(),
    })
}

/// What PEFT's own card begins with, and the settings.
fn card(spec: &LoraSpec, base_model: &str) -> String {
    let LoraSpec { r, lora_alpha, use_rslora, target_modules, .. } = spec;
    let scaling = if *use_rslora { " (rank-stabilised scaling)" } else { "" };
    format!(
        "---\nbase_model: {base_model}\nlibrary_name: peft\ntags:\n- lora\n---\n\n\
         A LoRA adapter of {base_model}, trained with Offshoot.\n\n\
         - rank {r}, alpha {lora_alpha}{scaling}\n\
         - target modules: {}\n\n\
         ```python\n\
         from peft import PeftModel\n\
         from transformers import AutoModelForCausalLM\n\n\
         base = AutoModelForCausalLM.from_pretrained({base_model:?})\n\
         model = PeftModel.from_pretrained(base, \"this directory\")\n\
         ```\n",
        target_modules.join(", "),
    )
}
