use super::line::{Head, Line};
use super::{Meter, Metered};
use crate::error::Error;
use crate::log_file::LogFile;
use crate::metrics::Metrics;
use crate::session::SessionId;
use crate::store::Store;
use dashmap::DashMap;
use serde::Serialize;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// How often those that stay are written down.
const HOUR: Duration = Duration::from_secs(3600);

/// Why a session has a line in the metering log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Left {
    /// It goes on; an hour is over.
    Running,
    /// Its client was away for longer than its lease, or its tenant was taken out of the tenants file.
    Parked,
    /// Its client is done with it for now.
    Closed,
    /// It was deleted.
    Forgotten,
    /// The server ends.
    Drained,
}

/// The meters of all live sessions, and the metering log.
#[derive(Default)]
pub struct Meters {
    live: DashMap<SessionId, Arc<Meter>>,
    metrics: Option<Arc<Metrics>>,
    log: Option<Mutex<LogFile>>,
}

impl Meters {
    /// Opens the metering log, which must succeed the first time. None: nothing is written down.
    pub fn start(metrics: Option<Arc<Metrics>>, log: Option<&Path>) -> Result<Meters, Error> {
        let log = log.map(LogFile::of_metering).transpose()?.map(Mutex::new);
        Ok(Meters { live: DashMap::new(), metrics, log })
    }

    /// The meter of a session that becomes live: the one that is there still, or one that goes on from
    /// what the store has.
    pub fn of(&self, id: SessionId, tenant: &Arc<str>, before: Metered) -> Arc<Meter> {
        let make = || Arc::new(self.make(tenant, before));
        self.live.entry(id).or_insert_with(make).clone()
    }

    /// The meter of a session that is being opened. It is listed when it is.
    pub fn begin(&self, tenant: &Arc<str>) -> Arc<Meter> {
        Arc::new(self.make(tenant, Metered::default()))
    }

    /// A session was opened.
    pub fn enter(&self, id: SessionId, meter: Arc<Meter>) {
        self.live.insert(id, meter);
    }

    fn make(&self, tenant: &Arc<str>, before: Metered) -> Meter {
        let series = self.metrics.as_ref().map(|metrics| metrics.tenant(tenant));
        Meter::new(series, before)
    }

    /// The meter of a live session.
    pub fn get(&self, id: SessionId) -> Option<Arc<Meter>> {
        self.live.get(&id).map(|meter| meter.value().clone())
    }

    /// A session is not live any more: what it used since the last time is written down. Whether the
    /// store should save the meter for that. Blocks.
    pub fn tell_left(&self, id: SessionId, tenant: &str, why: Left) -> bool {
        self.get(id).is_some_and(|meter| self.tell(&meter, id, tenant, why))
    }

    /// The server ends: writes down those that nobody has parked, such as those whose actors had failed.
    /// Blocks.
    pub fn tell_rest(&self, store: &Store) {
        let ids: Vec<SessionId> = self.live.iter().map(|entry| *entry.key()).collect();
        for id in ids {
            let tenant = store.record(id).ok().flatten().map(|record| record.tenant);
            if tenant.is_some_and(|tenant| self.tell_left(id, &tenant, Left::Drained)) {
                save(store, id);
            }
            self.forget(id);
        }
    }

    /// After that, and after the store has saved it.
    pub fn forget(&self, id: SessionId) {
        self.live.remove(&id);
    }

    /// Writes down those that were used since the last time; which they were. Blocks.
    fn tell_running(&self, tenant_of: impl Fn(SessionId) -> Option<String>) -> Vec<SessionId> {
        let all: Vec<_> = self.live.iter().map(|e| (*e.key(), e.value().clone())).collect();
        let told = all.into_iter().filter(|(id, meter)| {
            let tenant = tenant_of(*id);
            tenant.is_some_and(|tenant| self.tell(meter, *id, &tenant, Left::Running))
        });
        told.map(|(id, _)| id).collect()
    }

    fn tell(&self, meter: &Meter, session: SessionId, tenant: &str, why: Left) -> bool {
        let Some(log) = &self.log else { return false };
        let head = Head { why, tenant: tenant.into(), session };
        meter.tell(|line| append(log, line), head)
    }
}

/// The line is on the disk when this says so, before the store is told; after a crash in between the
/// line comes again with the same `since`.
fn append(log: &Mutex<LogFile>, line: &Line) -> bool {
    // A line of strings and numbers can always be written as JSON.
    let Ok(bytes) = serde_json::to_vec(line) else { return false };
    let written = {
        let mut file = log.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_line(bytes).then(|| file.handle())
    };
    // Without the lock: many sessions that leave together share the disk's time.
    written.flatten().is_some_and(|file| file.sync_data().is_ok())
}

/// Writes down once an hour what live sessions used, as long as the server is there.
pub async fn tell_hourly(meters: Weak<Meters>, store: Weak<Store>) {
    loop {
        tokio::time::sleep(HOUR).await;
        let (Some(meters), Some(store)) = (meters.upgrade(), store.upgrade()) else { return };
        if meters.log.is_none() {
            return;
        }
        let told = tokio::task::spawn_blocking(move || tell_all(&meters, &store)).await;
        if let Err(error) = told {
            tracing::error!(%error, "the hourly lines of the metering log failed");
        }
    }
}

/// One line for each live session that used something. Blocks.
fn tell_all(meters: &Meters, store: &Store) {
    let tenant_of = |id| Some(store.record(id).ok()??.tenant);
    for id in meters.tell_running(tenant_of) {
        save(store, id);
    }
}

fn save(store: &Store, id: SessionId) {
    if let Err(error) = store.save_meter(id) {
        tracing::warn!(session = %id, %error, "what is in the metering log may come there again");
    }
}

#[cfg(test)]
pub(super) fn tell_all_now(meters: &Meters, store: &Store) {
    tell_all(meters, store);
}
