//! What Describe says of bytes and sessions: on an open server of all, with tenants of one's own.

use crate::access::Tenant;
use crate::engine::EngineClient;
use crate::host_memory;
use crate::ledger::Usage;
use crate::residency::{Residency, Tier};
use crate::session::SessionView;
use offshoot_proto::v1;
use std::sync::atomic::Ordering;

/// Of the whole server.
pub(super) fn of_all(engine: &EngineClient, residency: &Residency) -> v1::MemoryReport {
    let Usage { budget, now, peak, peak_total } = engine.ledger().usage();
    let host = residency.host().usage();
    v1::MemoryReport {
        resident_bytes: host_memory::resident_bytes(),
        weights_bytes: now.weights,
        adapter_bytes: now.adapters,
        tape_bytes: now.tapes,
        live_sessions: residency.n_live() as u32,
        open_microbatches: engine.stats().n_tapes.load(Ordering::Relaxed) as u32,
        workspace_bytes: now.workspace,
        budget_bytes: budget.unwrap_or(0),
        peak: Some(v1::PeakBytes {
            adapter_bytes: peak.adapters,
            tape_bytes: peak.tapes,
            workspace_bytes: peak.workspace,
            total_bytes: peak_total,
            cache_bytes: peak.caches,
        }),
        host_bytes: host.now.adapters,
        host_budget_bytes: host.budget.unwrap_or(0),
        sessions_on_device: residency.count(Tier::Device) as u32,
        sessions_on_host: residency.count(Tier::Host) as u32,
        waiting_for_room: residency.n_waiting() as u32,
        cache_bytes: now.caches,
        open_caches: engine.stats().n_caches.load(Ordering::Relaxed) as u32,
    }
}

/// Of one tenant's live sessions, with his quotas as the budget. What counts for all is left out: it
/// would tell of the others.
pub(super) fn of_one(
    engine: &EngineClient,
    tenant: &Tenant,
    views: &[SessionView],
) -> v1::MemoryReport {
    let quotas = tenant.quotas;
    let budget = quotas.adapter_bytes.zip(quotas.open_bytes);
    let on = |tier| views.iter().filter(move |view| view.tier == tier);
    let sum = |bytes: fn(&SessionView) -> u64| views.iter().map(bytes).sum();
    v1::MemoryReport {
        weights_bytes: engine.trunk().weights_bytes,
        adapter_bytes: on(Tier::Device).map(|view| view.adapter_bytes).sum(),
        host_bytes: on(Tier::Host).map(|view| view.adapter_bytes).sum(),
        tape_bytes: sum(|view| view.tape_bytes),
        cache_bytes: sum(|view| view.cache_bytes),
        live_sessions: views.len() as u32,
        open_microbatches: views.iter().map(|view| view.n_microbatches).sum(),
        open_caches: views.iter().map(|view| view.n_caches).sum(),
        sessions_on_device: on(Tier::Device).count() as u32,
        sessions_on_host: on(Tier::Host).count() as u32,
        budget_bytes: budget.map_or(0, |(adapters, open)| adapters.saturating_add(open)),
        ..Default::default()
    }
}
