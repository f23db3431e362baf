use std::time::SystemTime;

/// Somebody with sessions of his own. Immutable: a reload of the tenants file makes new ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Empty for everybody on a server without a tenants file.
    pub name: String,
    /// Share of the device against other tenants, 1 to 1000.
    pub weight: u32,
    /// Whether it may see and manage everybody's sessions, and everything of the server.
    pub is_operator: bool,
    pub quotas: Quotas,
    pub(super) tokens: Vec<TokenEntry>,
}

/// What a tenant may have. None: the server's own limits only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Live ones.
    pub sessions: Option<u64>,
    /// Those in the store, live ones included.
    pub stored_sessions: Option<u64>,
    /// Adapters, gradients and moments of the tenant's sessions on the device.
    pub adapter_bytes: Option<u64>,
    /// Tapes and caches.
    pub open_bytes: Option<u64>,
    /// Of forwards, averaged over a few seconds.
    pub tokens_per_second: Option<u64>,
    pub tokens_per_microbatch: Option<u64>,
    /// LoRA's r.
    pub rank: Option<u64>,
}

/// A token as the tenants file knows it: by its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenEntry {
    pub id: String,
    pub hash: super::TokenHash,
    pub expires: Option<SystemTime>,
}

impl Tenant {
    /// Its tokens by id, and when each ends. None: never.
    pub fn tokens(&self) -> impl Iterator<Item = (&str, Option<SystemTime>)> {
        self.tokens.iter().map(|token| (token.id.as_str(), token.expires))
    }

    /// Who calls a server without a tenants file.
    pub fn anybody() -> Tenant {
        let (name, quotas, tokens) = Default::default();
        Tenant { name, weight: 1, is_operator: true, quotas, tokens }
    }
}
