//! `offshoot tenants`: what the tenants of a running server use.

use crate::operate::{self, Column, PlaceArgs, bytes, count, of_quota};
use clap::Args;
use offshoot_client::operations::TenantView;
use std::process::ExitCode;

/// Show what the tenants of a running server use, with their quotas.
///
/// An operator's token shows all tenants, another one its own. To add tenants, tokens and quotas, or to
/// take them away, edit the server's tenants file with offshoot tenant.
#[derive(Args)]
pub struct TenantsArgs {
    /// Print JSON: the TenantView messages of offshoot/v1/operations.proto.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Runs the command.
pub fn run(args: TenantsArgs) -> anyhow::Result<ExitCode> {
    let tenants = operate::run(async {
        let client = args.place.connect().await?;
        Ok(client.list_tenants().await?)
    })?;
    match args.json {
        true => operate::print_json(&tenants)?,
        false => operate::print(&table(&tenants)),
    }
    Ok(ExitCode::SUCCESS)
}

fn table(tenants: &[TenantView]) -> String {
    const COLUMNS: [Column; 10] = [
        Column::text("tenant"),
        Column::text(""),
        Column::number("weight"),
        Column::number("live"),
        Column::number("stored"),
        Column::number("adapters"),
        Column::number("open"),
        Column::number("tokens used"),
        Column::number("device s"),
        Column::text("tokens to log in"),
    ];
    operate::table(&COLUMNS, &tenants.iter().map(row).collect::<Vec<_>>())
}

fn row(view: &TenantView) -> Vec<String> {
    let limit = |quota: &str| view.quotas.iter().find(|q| q.quota == quota).map(|q| q.limit);
    let metering = view.metering.unwrap_or_default();
    let plain = |value: u64, quota: &str| {
        of_quota(value.to_string(), limit(quota).map(|limit| limit.to_string()))
    };
    let sized = |value: u64, quota: &str| of_quota(bytes(value), limit(quota).map(bytes));
    let role = match (view.is_operator, view.weight) {
        (_, 0) => "not in the file",
        (true, _) => "operator",
        (false, _) => "",
    };
    let tokens: Vec<&str> = view.tokens.iter().map(|token| token.id.as_str()).collect();
    vec![
        if view.name.is_empty() { "(everybody)".into() } else { view.name.clone() },
        role.into(),
        view.weight.to_string(),
        plain(view.sessions_live.into(), "sessions"),
        plain(view.sessions_stored.into(), "stored_sessions"),
        sized(view.adapter_bytes, "adapter_bytes"),
        sized(view.open_bytes, "open_bytes"),
        count(metering.tokens as f64),
        format!("{:.1}", metering.device_seconds),
        tokens.join(" "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_client::operations::{QuotaView, TokenView};

    #[test]
    fn a_tenant_is_a_line_with_its_use_and_quotas() {
        let quotas = [("sessions", 8, 2), ("adapter_bytes", 2 << 30, 1 << 30)];
        let quotas =
            quotas.map(|(quota, limit, value)| QuotaView { quota: quota.into(), limit, value });
        let blue = TenantView {
            name: "blue".into(),
            weight: 2,
            sessions_live: 2,
            sessions_stored: 5,
            adapter_bytes: 1 << 30,
            quotas: quotas.to_vec(),
            tokens: vec![TokenView { id: "t1".into(), expires_millis: 0 }],
            ..Default::default()
        };
        let gone = TenantView { name: "gone".into(), sessions_stored: 1, ..Default::default() };
        let text = table(&[blue, gone]);
        println!("{text}");
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..6], ["blue", "2", "2", "of", "8", "5"]);
        assert!(text.contains("1.0 GiB of 2.0 GiB") && lines[1].last() == Some(&"t1"));
        assert!(text.lines().nth(2).unwrap().contains("not in the file"));
    }
}
