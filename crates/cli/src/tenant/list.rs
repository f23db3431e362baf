use bytesize::ByteSize;
use offshoot_server::access::{Quotas, Tenant};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::time::SystemTime;

/// Prints tenants as a table, or as JSON.
pub fn print(tenants: &[Tenant], as_json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if as_json {
        let all: Vec<Value> = tenants.iter().map(row).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    let width = tenants.iter().map(|tenant| tenant.name.len()).max().unwrap_or(0).max(6);
    writeln!(out, "{:width$}  weight  tokens; quotas", "tenant")?;
    for tenant in tenants {
        let tokens: Vec<String> = tenant.tokens().map(|(id, end)| said(id, end)).collect();
        let tokens = if tokens.is_empty() { "no token".into() } else { tokens.join(", ") };
        let quotas = quotas(&tenant.quotas);
        let shown = quotas.iter().filter_map(|(key, quota, is_bytes)| {
            let quota = (*quota)?;
            Some(match is_bytes {
                true => format!("{key} {}", ByteSize(quota)),
                false => format!("{key} {quota}"),
            })
        });
        let shown: Vec<String> = shown.collect();
        let shown = if shown.is_empty() { "no quotas".into() } else { shown.join(", ") };
        let role = if tenant.is_operator { "operator; " } else { "" };
        writeln!(out, "{:width$}  {:>6}  {role}{tokens}; {shown}", tenant.name, tenant.weight)?;
    }
    Ok(())
}

fn said(id: &str, end: Option<SystemTime>) -> String {
    match end {
        None => id.to_string(),
        Some(end) if end <= SystemTime::now() => {
            format!("{id} (ended {})", humantime::format_rfc3339_seconds(end))
        }
        Some(end) => format!("{id} (until {})", humantime::format_rfc3339_seconds(end)),
    }
}

fn row(tenant: &Tenant) -> Value {
    let tokens: Vec<Value> = tenant
        .tokens()
        .map(|(id, end)| {
            let expires = end.map(|end| humantime::format_rfc3339_seconds(end).to_string());
            json!({ "id": id, "expires": expires, "is_expired": end.is_some_and(|end| end <= SystemTime::now()) })
        })
        .collect();
    let quotas: Map<String, Value> = quotas(&tenant.quotas)
        .map(|(key, quota, _)| (key.to_string(), json!(quota)))
        .into_iter()
        .collect();
    json!({
        "name": tenant.name,
        "weight": tenant.weight,
        "is_operator": tenant.is_operator,
        "quotas": quotas,
        "tokens": tokens,
    })
}

/// Name, value, and whether it is of bytes.
fn quotas(quotas: &Quotas) -> [(&'static str, Option<u64>, bool); 7] {
    let Quotas {
        sessions,
        stored_sessions,
        adapter_bytes,
        open_bytes,
        tokens_per_second,
        tokens_per_microbatch,
        rank,
    } = *quotas;
    [
        ("sessions", sessions, false),
        ("stored_sessions", stored_sessions, false),
        ("adapter_bytes", adapter_bytes, true),
        ("open_bytes", open_bytes, true),
        ("tokens_per_second", tokens_per_second, false),
        ("tokens_per_microbatch", tokens_per_microbatch, false),
        ("rank", rank, false),
    ]
}
