//! Setting a session back to one of its snapshots.

use super::{Beginning, OwnSession, Registry, blocking, retire, snapshot};
use crate::engine::Settings;
use crate::error::Error;
use crate::quota::Amount;
use crate::residency::{Away, Home};
use crate::session::epoch_now;
use crate::store::SnapshotRecord;

/// A session that was set back.
pub struct Restored {
    pub snapshot: SnapshotRecord,
    pub n_parameters: u64,
    pub adapter_bytes: u64,
    pub settings: Settings,
}

impl Registry {
    /// Sets a session back to a snapshot; empty: the one that it would go on from. Its adapter
    /// comes with the first frame.
    pub async fn restore(&self, session: OwnSession, snapshot: &str) -> Result<Restored, Error> {
        let id = session.id();
        self.refuse_while_draining()?;
        let mut held = self.slots.lock(id).await;
        let live = held.live();
        let tenant = self.owners.of(id).unwrap_or_default();
        let alive = match &live {
            // The one that ends gives its place a moment later.
            Some(_) => {
                let account = self.engine.accounts().of(&tenant);
                self.residency.count_in(account.count(Amount::Sessions, 1))
            }
            None => self.seat(&tenant)?,
        };
        // Nothing is written meanwhile, which might push out what is wanted, or become the head.
        let _in_turn = match &live {
            Some(live) => Some(live.profile.writes.in_turn().await),
            None => None,
        };
        let record = self.record(id).await?;
        let wanted = if snapshot.is_empty() { record.head.as_str() } else { snapshot };
        let found = record.snapshot(wanted).cloned();
        let snapshot = found.ok_or_else(|| record.no_such(id, wanted))?;
        // Read before anything ends: a damaged snapshot leaves the session as it is.
        drop(self.read(id, &record, &snapshot).await?);
        let settings = snapshot::settings(&record)?;
        // Whoever had it before is set back as well, and cannot take over from who restored it.
        let epoch = epoch_now().max(record.epoch);
        retire(held.put(None)).await;
        let (store, head) = (self.store.clone(), snapshot.id.clone());
        blocking(move || store.set_head(id, &head, epoch)).await?;
        let trunk = self.engine.trunk();
        let restored = Restored {
            n_parameters: trunk.n_parameters(&settings.lora),
            adapter_bytes: trunk.adapter_bytes(&settings.lora),
            settings: settings.clone(),
            snapshot,
        };
        let standing = snapshot::standing(&restored.snapshot);
        let profile = self.profile(id, settings, record.metering);
        let home = Home::Away(Away::Disk);
        let resume = standing;
        held.put(Some(self.spawn(Beginning { alive, profile, home, resume, epoch })));
        tracing::info!(session = %id, snapshot = restored.snapshot.id, "session restored");
        Ok(restored)
    }
}
