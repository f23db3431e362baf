//! Checks of charts/offshoot with the real helm: `cargo xtask chart`.
//!
//! Each file of charts/offshoot/ci is a set of values. It is linted and rendered; what comes out must be
//! valid for Kubernetes and for the custom resources' own schemas, keep to the restricted Pod Security
//! Standard, refer only to what is there, and be, byte for byte, what somebody has read: ci/golden. Values
//! that do not go together must be refused with the text that says why.

mod custom;
mod document;
mod golden;
mod helm;
mod links;
mod refused;
mod schemas;
mod settings;
mod standard;

use anyhow::{Result, bail, ensure};

use crate::command::in_root;
use document::Document;
use helm::Helm;

/// The chart's folder in the repository.
const CHART: &str = "charts/offshoot";
/// The oldest Kubernetes that Chart.yaml allows, and the newest that the schemas know.
const KUBERNETES: [&str; 2] = ["1.30", "1.35"];
/// The issue asks for as many, at least.
const FEWEST_SETS: usize = 10;

#[derive(clap::Args)]
pub struct Options {
    /// Write what is rendered to ci/golden instead of comparing: read the difference before you commit it
    #[arg(long)]
    update: bool,
}

/// One set of values and what it becomes.
struct Rendered {
    name: String,
    text: String,
    /// What is told after an installation.
    notes: String,
    documents: Vec<Document>,
}

/// All checks; every mistake of all sets is told before it fails.
pub fn check(options: &Options) -> Result<()> {
    let helm = Helm::new()?;
    let mut mistakes = settings::compare()?;
    let mut sets = Vec::new();
    for values in helm::value_sets()? {
        helm.lint(&values)?;
        let text = helm.render(&values)?;
        let documents = document::read(&text)?;
        let (name, notes) = (helm::name_of(&values), helm.notes(&values)?);
        sets.push(Rendered { name, text, notes, documents });
    }
    ensure!(
        sets.len() >= FEWEST_SETS,
        "{} sets of values in {CHART}/ci: expected at least {FEWEST_SETS}",
        sets.len()
    );
    for set in &sets {
        let wrong = set.documents.iter().flat_map(standard::violations);
        let wrong = wrong.chain(links::dangling(&set.documents));
        mistakes.extend(wrong.map(|wrong| format!("{}: {wrong}", set.name)));
    }
    mistakes.extend(schemas::mistakes(&sets)?);
    mistakes.extend(refused::accepted(&helm)?);
    let folder = in_root(CHART).join("ci/golden");
    match options.update {
        true => golden::write(&folder, &sets)?,
        false => mistakes.extend(golden::differences(&folder, &sets)?),
    }
    if !mistakes.is_empty() {
        bail!("{} mistakes in {CHART}:\n{}", mistakes.len(), mistakes.join("\n"));
    }
    let documents: usize = sets.iter().map(|set| set.documents.len()).sum();
    eprintln!(
        "chart: {} sets of values, {documents} objects: valid for Kubernetes {}, restricted, as reviewed; {} \
         wrong sets refused",
        sets.len(),
        KUBERNETES.join(" and "),
        refused::CASES.len()
    );
    Ok(())
}
