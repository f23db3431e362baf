//! `offshoot health`: for probes of containers, and for people.

use crate::operate::{self, PlaceArgs};
use clap::Args;
use offshoot_client::{Health, health};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Ask a server by gRPC's health check whether it takes work; the exit status is 0 if it does.
///
/// Needs no token, and asks once. 1: the server drains, loads its trunk again, does not know the service,
/// or does not answer in time. With a server that asks for certificates the --tls options are as in other
/// commands.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct HealthArgs {
    /// The service asked about [default: the server as a whole].
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    service: String,
    /// How long the answer may take.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print JSON: status is serving, not_serving, unknown_service or unreachable, with its cause.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

const EXAMPLES: &str = "\
Examples:
  offshoot health --server-port 50051
  offshoot health --server https://trunk.local:50051 --tls-ca ca.pem --timeout 2s";

/// Runs the command.
pub fn run(args: HealthArgs) -> anyhow::Result<ExitCode> {
    // The token, if there is one, is not sent, and need not be whole.
    let (address, options) = (args.place.address(), args.place.without_token());
    let asked =
        operate::run(async { Ok(health(&address, &options, &args.service, args.timeout).await) })?;
    let (status, cause) = match asked {
        Ok(Health::Serving) => ("serving", None),
        Ok(Health::NotServing) => ("not_serving", None),
        Ok(Health::Unknown) => ("unknown_service", None),
        Err(error) => ("unreachable", Some(error)),
    };
    match (args.json, cause) {
        (true, cause) => {
            let cause = cause.map(|error| error.to_string());
            operate::print_json(&json!({ "status": status, "cause": cause }))?;
        }
        (false, Some(error)) => return Err(error.into()),
        (false, None) => operate::print(&format!("{}\n", status.replace('_', " "))),
    }
    Ok(if status == "serving" { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
