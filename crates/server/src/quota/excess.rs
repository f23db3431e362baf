use offshoot_proto::v1;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tonic_types::QuotaViolation;

/// A quota, by its name in the tenants file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    Sessions,
    StoredSessions,
    AdapterBytes,
    OpenBytes,
    TokensPerSecond,
    TokensPerMicrobatch,
    Rank,
}

impl Quota {
    /// As in the tenants file.
    pub fn name(self) -> &'static str {
        match self {
            Quota::Sessions => "sessions",
            Quota::StoredSessions => "stored_sessions",
            Quota::AdapterBytes => "adapter_bytes",
            Quota::OpenBytes => "open_bytes",
            Quota::TokensPerSecond => "tokens_per_second",
            Quota::TokensPerMicrobatch => "tokens_per_microbatch",
            Quota::Rank => "rank",
        }
    }

    /// What helps.
    fn advice(self) -> &'static str {
        match self {
            Quota::Sessions => "close a session that is done",
            Quota::StoredSessions => "delete a session that is not needed any more",
            Quota::AdapterBytes => "take a lower rank or fewer targets, or close a session",
            Quota::OpenBytes => "send fewer tokens at once, or fewer microbatches at a time",
            Quota::TokensPerSecond => "send less",
            Quota::TokensPerMicrobatch => "split the microbatch",
            Quota::Rank => "take a lower rank",
        }
    }
}

/// What a tenant may not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excess {
    pub tenant: Arc<str>,
    pub quota: Quota,
    pub limit: u64,
    /// What it would have been.
    pub value: u64,
    /// None: it never fits.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Excess { tenant, quota, limit, value, retry_after } = self;
        let (name, advice) = (quota.name(), quota.advice());
        write!(f, "quota {name} of tenant \"{tenant}\" is {limit}, this would make it {value}; ")?;
        match retry_after {
            Some(after) => {
                // Not a moment too early.
                let seconds = (after.as_secs_f64() * 10.0).ceil() / 10.0;
                match quota {
                    Quota::TokensPerSecond => write!(f, "try again in {seconds} s"),
                    _ => write!(f, "{advice}, or try again in {seconds} s"),
                }
            }
            None => write!(f, "it never fits: {advice}, or ask the operator for more"),
        }
    }
}

impl Excess {
    /// For the status of a unary call.
    pub fn to_violation(&self) -> QuotaViolation {
        let Excess { tenant, quota, limit, value, .. } = self;
        let mut violation = QuotaViolation::new(format!("tenant:{tenant}"), self.to_string());
        violation.api_service = "offshoot.v1.TrunkService".into();
        violation.quota_metric = format!("offshoot/{}", quota.name());
        violation.quota_id = quota.name().into();
        violation.quota_value = i64::try_from(*limit).unwrap_or(i64::MAX);
        violation.quota_dimensions.insert("value".into(), value.to_string());
        violation
    }

    /// Beside a refused frame.
    pub fn to_proto(&self) -> v1::QuotaViolation {
        let Excess { quota, limit, value, .. } = self;
        v1::QuotaViolation { quota: quota.name().into(), limit: *limit, value: *value }
    }
}
