//! Sessions that stay on the device however idle they are: counted before they do, since the others
//! take turns in what is left.

use super::{Profile, Residency};
use crate::error::Error;
use crate::ledger::BytesKind;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whose pins are too many, as its client is told: everybody's together.
pub const PINS_OF_ALL: &str = "half of what adapters can have there";
/// One tenant's, by his weight.
const PINS_OF_TENANT: &str = "this tenant's share of the half that can be pinned";
/// One tenant's, by his quota.
const PINS_OF_QUOTA: &str = "half of this tenant's adapter_bytes";

/// The adapters that are pinned.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<HashMap<Arc<str>, u64>>);

/// One of them. Dropping it gives its bytes back.
#[derive(Debug)]
struct Pin {
    pins: Arc<Pins>,
    tenant: Arc<str>,
    bytes: u64,
}

/// A session's pin, if it has one. It ends with the session's life: whoever is parked has none.
#[derive(Debug, Default)]
pub struct Pinned(Mutex<Option<Pin>>);

/// A tenant's weight, and that of all tenants together.
#[derive(Debug, Clone, Copy)]
pub struct WeightShare {
    pub own: u64,
    pub all: u64,
}

impl Pinned {
    /// Whether there is one.
    pub fn is_pinned(&self) -> bool {
        lock(&self.0).is_some()
    }

    /// Ends it.
    pub fn end(&self) {
        let pin = lock(&self.0).take();
        drop(pin);
    }
}

impl Residency {
    /// Pins a session to the device, where it is from its next frame on. `share`: of the tenant, if a
    /// tenant does this to his own.
    pub fn pin(&self, profile: &Profile, share: Option<WeightShare>) -> Result<(), Error> {
        let mut pinned = lock(&profile.pinned.0);
        if pinned.is_some() {
            return Ok(());
        }
        let tenant = &profile.settings.tenant;
        let all = self.engine.ledger().most(BytesKind::Adapters).map(|most| most / 2);
        let by_weight = |all: u64, share: WeightShare| {
            // In 128 bits, so that bytes times a weight always fit.
            let part = u128::from(all) * u128::from(share.own) / u128::from(share.all.max(1));
            u64::try_from(part).unwrap_or(all)
        };
        let of_tenant = all.zip(share).map(|(all, share)| by_weight(all, share));
        let quota = self.engine.accounts().of(tenant).quotas().adapter_bytes;
        let limits = Limits { all, of_tenant, of_quota: quota.map(|quota| quota / 2) };
        let bytes = self.engine.trunk().adapter_bytes(&profile.settings.lora);
        *pinned = Some(self.pins.take(tenant.clone(), bytes, limits)?);
        Ok(())
    }
}

/// The most bytes that may be pinned. None: any.
#[derive(Debug, Clone, Copy, Default)]
struct Limits {
    all: Option<u64>,
    of_tenant: Option<u64>,
    of_quota: Option<u64>,
}

impl Pins {
    fn take(self: &Arc<Self>, tenant: Arc<str>, bytes: u64, limits: Limits) -> Result<Pin, Error> {
        let mut pinned = lock(&self.0);
        let own = pinned.get(&tenant).copied().unwrap_or(0) + bytes;
        let all = pinned.values().sum::<u64>() + bytes;
        for (value, limit, share) in [
            (own, limits.of_quota, PINS_OF_QUOTA),
            (own, limits.of_tenant, PINS_OF_TENANT),
            (all, limits.all, PINS_OF_ALL),
        ] {
            if let Some(limit) = limit.filter(|&limit| value > limit) {
                return Err(Error::PinRoom { value, limit, share });
            }
        }
        pinned.insert(tenant.clone(), own);
        Ok(Pin { pins: self.clone(), tenant, bytes })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pinned = lock(&self.pins.0);
        if let Some(bytes) = pinned.get_mut(&self.tenant) {
            *bytes -= self.bytes;
            if *bytes == 0 {
                pinned.remove(&self.tenant);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use is whole even if another thread panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_counted_for_all_and_for_each_tenant_and_given_back() {
        let pins = Arc::<Pins>::default();
        let limits = Limits { all: Some(10), of_tenant: Some(6), of_quota: None };
        let take = |tenant: &str, bytes| pins.take(tenant.into(), bytes, limits);
        let told = |result: Result<Pin, Error>| match result.unwrap_err() {
            Error::PinRoom { value, limit, share } => (value, limit, share),
            other => panic!("{other}"),
        };
        let first = take("blue", 4).unwrap();
        assert_eq!(told(take("blue", 3)), (7, 6, PINS_OF_TENANT));
        let second = take("red", 5).unwrap();
        assert_eq!(told(take("blue", 2)), (11, 10, PINS_OF_ALL));
        drop(second);
        let third = take("blue", 2).unwrap();
        drop((first, third));
        assert!(lock(&pins.0).is_empty());
        let quota = Limits { of_quota: Some(1), ..Limits::default() };
        assert_eq!(told(pins.take("red".into(), 2, quota)), (2, 1, PINS_OF_QUOTA));
        pins.take("red".into(), u64::MAX, Limits::default()).unwrap();
    }
}
