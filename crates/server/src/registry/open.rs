//! How a session begins.

use super::{Beginning, Copied, Registry, blocking};
use crate::engine::{Admitted, Plan, Settings, Start};
use crate::error::Error;
use crate::meter::Metered;
use crate::residency::Home;
use crate::session::{Resume, SessionId};
use crate::store::{Record, Why, millis_of};
use std::sync::Arc;
use std::time::SystemTime;

/// A new session, checked.
#[derive(Debug)]
pub struct Opening {
    /// For people.
    pub name: String,
    pub settings: Settings,
    pub start: Start,
}

impl Registry {
    /// Starts a session and makes it durable as it begins.
    pub async fn open(&self, opening: Opening) -> Result<(SessionId, Admitted), Error> {
        let Opening { name, settings, start } = opening;
        let alive = self.seat(&settings.tenant)?;
        let stored = self.owners.count(&settings.tenant);
        // Until it is among those that are counted.
        let opening = self.engine.accounts().of(&settings.tenant).take_stored(stored)?;
        let id = SessionId::new();
        let mut held = self.slots.lock(id).await;
        let reserved = self.residency.reserve(&settings).await?;
        let meter = self.meters.begin(&settings.tenant);
        let counted = meter.clone();
        let plan = Plan { reserved, settings: settings.clone(), start, meter: counted };
        let (session, admitted) = self.engine.admit(plan).await?;
        let adapters = Arc::new(session.state().await?);
        let first = Copied { adapters, resume: Resume::default() };
        let (store, record) =
            (self.store.clone(), self.new_record(name, &settings, meter.metered()));
        let name = record.name.clone();
        blocking(move || store.create(id, record, first.encode(Why::Opened))).await?;
        self.owners.insert(id, settings.tenant.clone());
        drop(opening);
        self.meters.enter(id, meter);
        let profile = self.profile(id, settings, Metered::default());
        let home = Home::Device(self.residency.settle_in(&profile, (session, admitted)));
        let resume = Resume::default();
        held.put(Some(self.spawn(Beginning { alive, profile, home, resume, epoch: 0 })));
        tracing::info!(session = %id, name, parameters = admitted.n_parameters, "session opened");
        Ok((id, admitted))
    }

    fn new_record(&self, name: String, settings: &Settings, metering: Metered) -> Record {
        let trunk = self.engine.trunk();
        Record {
            tenant: settings.tenant.to_string(),
            name,
            lora: settings.lora.clone(),
            adamw: settings.adamw.clone(),
            seed: settings.seed,
            wire_dtype: settings.wire_dtype.name().into(),
            fingerprint: trunk.fingerprint.clone(),
            split_point_1: trunk.layers.start,
            split_point_2: trunk.layers.end,
            head: String::new(),
            snapshots: Vec::new(),
            n_snapshots: 0,
            kept: Vec::new(),
            epoch: 0,
            damaged: Vec::new(),
            metering,
            opened_millis: millis_of(SystemTime::now()),
        }
    }
}
