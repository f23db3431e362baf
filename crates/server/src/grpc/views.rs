//! What the server shows of itself and of sessions, wherever somebody looks at them.

use super::memory;
use crate::access::Caller;
use crate::engine::{EngineClient, TrunkInfo};
use crate::registry::Registry;
use crate::residency::Tier;
use crate::session::{SessionId, SessionView};
use crate::store::Record;
use offshoot_adapters::LoraSpec;
use offshoot_proto::{WireDType, v1};

/// What a caller is told of the server: its bytes, and his own or, on an open server, everybody's.
pub fn describe(
    registry: &Registry,
    engine: &EngineClient,
    caller: &Caller,
) -> v1::DescribeResponse {
    let tenant = &caller.tenant;
    let memory = if registry.access().is_open() {
        memory::of_all(engine, registry.residency())
    } else {
        memory::of_one(engine, tenant, &registry.views(&tenant.name))
    };
    of_trunk(engine.trunk(), registry.limits_for(tenant), memory)
}

/// What an operator is told: the bytes of all.
pub fn describe_all(
    registry: &Registry,
    engine: &EngineClient,
    caller: &Caller,
) -> v1::DescribeResponse {
    let limits = registry.limits_for(&caller.tenant);
    of_trunk(engine.trunk(), limits, memory::of_all(engine, registry.residency()))
}

fn of_trunk(
    trunk: &TrunkInfo,
    limits: v1::Limits,
    memory: v1::MemoryReport,
) -> v1::DescribeResponse {
    v1::DescribeResponse {
        model_name: trunk.model_name.clone(),
        model_type: trunk.model_type.clone(),
        fingerprint: trunk.fingerprint.clone(),
        n_layers: trunk.n_layers as u32,
        split_point_1: trunk.layers.start as u32,
        split_point_2: trunk.layers.end as u32,
        hidden_size: trunk.hidden_size as u32,
        compute_dtype: trunk.compute_dtype.name().into(),
        device: trunk.device.clone(),
        wire_dtypes: WireDType::ALL.iter().map(|dtype| dtype.to_proto() as i32).collect(),
        limits: Some(limits),
        server_version: env!("CARGO_PKG_VERSION").into(),
        lora_modules: trunk.lora_modules.clone(),
        default_target_modules: trunk.default_targets.clone(),
        memory: Some(memory),
    }
}

/// An adapter's settings.
pub fn lora_config(spec: LoraSpec) -> v1::LoraConfig {
    let LoraSpec { r, lora_alpha, lora_dropout, use_rslora, target_modules } = spec;
    v1::LoraConfig { r: r as u32, lora_alpha, lora_dropout, use_rslora, target_modules }
}

/// A session as its record and, if it is live, its view have it; without its snapshots.
pub fn session_info(
    id: SessionId,
    record: &Record,
    live: Option<&SessionView>,
    trunk: &TrunkInfo,
) -> v1::SessionInfo {
    let state = match live {
        Some(live) if live.is_attached => v1::SessionState::Attached,
        Some(_) => v1::SessionState::Detached,
        None => v1::SessionState::Parked,
    };
    let residency = match live.map(|live| live.tier) {
        Some(Tier::Device) => v1::Residency::Device,
        Some(Tier::Host) => v1::Residency::Host,
        Some(Tier::Disk) | None => v1::Residency::Disk,
    };
    let (step, last_applied) = match (live, record.head()) {
        (Some(live), _) => (live.step, live.applied),
        (None, Some(head)) => (head.step, head.sequence),
        (None, None) => (0, 0),
    };
    v1::SessionInfo {
        session_id: id.to_string(),
        state: state as i32,
        step,
        last_applied,
        adapter_bytes: match residency {
            v1::Residency::Device | v1::Residency::Host => trunk.adapter_bytes(&record.lora),
            v1::Residency::Disk | v1::Residency::Unspecified => 0,
        },
        residency: residency as i32,
        tape_bytes: live.map_or(0, |live| live.tape_bytes),
        cache_bytes: live.map_or(0, |live| live.cache_bytes),
        wire_error: live.map(|live| live.wire_error),
        snapshots: Vec::new(),
        lora: Some(lora_config(record.lora.clone())),
        name: record.name.clone(),
    }
}
