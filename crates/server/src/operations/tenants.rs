//! The tenants with what they use and may use.

use super::Operations;
use crate::access::{Caller, Tenant};
use crate::quota::{Account, Amount};
use crate::store::millis_of;
use offshoot_proto::v1;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

impl Operations {
    /// The tenants by name: all for an operator, or the caller himself. Those who are not in the tenants
    /// file and still have sessions have no weight.
    pub fn tenants(&self, caller: &Caller) -> v1::ListTenantsResponse {
        let (access, stored) = (self.registry.access(), self.registry.owners().counts());
        let known: Vec<Arc<Tenant>> = match caller.is_operator() {
            true => access.tenants(),
            false => vec![caller.tenant.clone()],
        };
        let known: BTreeMap<String, Arc<Tenant>> =
            known.into_iter().map(|tenant| (tenant.name.clone(), tenant)).collect();
        let mut names: BTreeSet<String> = known.keys().cloned().collect();
        if caller.manages_all() {
            names.extend(stored.keys().map(|name| name.to_string()));
        }
        let used = self.used(&names);
        let view = |name: &String| {
            let n_stored = stored.get(name.as_str()).copied().unwrap_or(0);
            let tenant = known.get(name).map(Arc::as_ref);
            let metering = used.get(name.as_str()).copied().unwrap_or_default();
            self.tenant(name, tenant, (n_stored as u64, metering))
        };
        v1::ListTenantsResponse { tenants: names.iter().map(view).collect() }
    }

    fn tenant(
        &self,
        name: &str,
        tenant: Option<&Tenant>,
        (n_stored, metering): (u64, v1::Metering),
    ) -> v1::TenantView {
        let account = self.engine.accounts().of(name);
        let [live, adapters, open] = [Amount::Sessions, Amount::AdapterBytes, Amount::OpenBytes]
            .map(|amount| account.amount(amount));
        v1::TenantView {
            name: name.into(),
            is_operator: tenant.is_some_and(|tenant| tenant.is_operator),
            weight: tenant.map_or(0, |tenant| tenant.weight),
            sessions_live: u32::try_from(live).unwrap_or(u32::MAX),
            sessions_stored: u32::try_from(n_stored).unwrap_or(u32::MAX),
            adapter_bytes: adapters,
            open_bytes: open,
            quotas: tenant.map_or_else(Vec::new, |tenant| quotas(tenant, &account, n_stored)),
            tokens: tenant.map_or_else(Vec::new, tokens),
            metering: Some(metering),
        }
    }

    /// What the sessions of these tenants have used that there still are.
    fn used(&self, names: &BTreeSet<String>) -> HashMap<String, v1::Metering> {
        let live: HashMap<_, _> = self.registry.all_live().into_iter().map(|p| (p.id, p)).collect();
        let mut used: HashMap<String, v1::Metering> = HashMap::new();
        self.registry.look_at_all(|id, record| {
            if !names.contains(&record.tenant) {
                return;
            }
            let own = match live.get(&id) {
                Some(profile) => profile.meter.snapshot(),
                None => record.metering.used.to_proto(),
            };
            let sum = used.entry(record.tenant.clone()).or_default();
            sum.tokens += own.tokens;
            sum.device_seconds += own.device_seconds;
            sum.bytes_in += own.bytes_in;
            sum.bytes_out += own.bytes_out;
            // Peaks of several sessions were not at one moment: the largest says what one needed.
            sum.peak_bytes = sum.peak_bytes.max(own.peak_bytes);
            sum.steps += own.steps;
        });
        used
    }
}

/// Those that are set, with what there is of each now.
fn quotas(tenant: &Tenant, account: &Account, n_stored: u64) -> Vec<v1::QuotaView> {
    let quotas = tenant.quotas;
    let all = [
        ("sessions", quotas.sessions, account.amount(Amount::Sessions)),
        ("stored_sessions", quotas.stored_sessions, n_stored),
        ("adapter_bytes", quotas.adapter_bytes, account.amount(Amount::AdapterBytes)),
        ("open_bytes", quotas.open_bytes, account.amount(Amount::OpenBytes)),
        // What is asked of each frame and each adapter is not used up.
        ("tokens_per_second", quotas.tokens_per_second, 0),
        ("tokens_per_microbatch", quotas.tokens_per_microbatch, 0),
        ("rank", quotas.rank, 0),
    ];
    let set = all.into_iter().filter_map(|(name, limit, value)| {
        Some(v1::QuotaView { quota: name.into(), limit: limit?, value })
    });
    set.collect()
}

fn tokens(tenant: &Tenant) -> Vec<v1::TokenView> {
    let now = std::time::SystemTime::now();
    let valid = tenant.tokens().filter(|(_, end)| end.is_none_or(|end| end > now));
    let view = |(id, end): (&str, Option<_>)| v1::TokenView {
        id: id.into(),
        expires_millis: end.map_or(0, millis_of),
    };
    valid.map(view).collect()
}
