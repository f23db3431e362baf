//! What there is to see of sessions, which stay as they are: exports, lists and views. Lists ask no
//! actor.

use super::{OwnSession, Registry, blocking, gone};
use crate::engine::{Exported, export_state};
use crate::error::Error;
use crate::residency::Profile;
use crate::session::{Export, ExportOf, SessionId, SessionView};
use crate::store::Record;
use offshoot_adapters::LoraSpec;
use std::sync::Arc;

/// A session in a list.
pub struct Listed {
    pub id: SessionId,
    pub record: Record,
    /// None: parked.
    pub live: Option<SessionView>,
}

impl Registry {
    /// A session's adapter, and the accumulated gradients if they are wanted. It is taken from
    /// where it is.
    pub async fn export(
        &self,
        session: OwnSession,
        gradients: bool,
    ) -> Result<(LoraSpec, Exported), Error> {
        let id = session.id();
        let held = self.slots.lock(id).await;
        let exported = match held.live() {
            Some(live) => live.actor.send(Export { gradients }).await.map_err(gone)??,
            None => ExportOf::InStore,
        };
        let record = self.record(id).await?;
        let adapters = match exported {
            ExportOf::Device(exported) => return Ok((record.lora, exported)),
            ExportOf::Host(adapters) => adapters,
            ExportOf::InStore => {
                let head = record.head().ok_or_else(|| Error::UnknownSession(id.to_string()))?;
                self.read(id, &record, head).await?.adapters
            }
        };
        let (trunk, lora) = (self.engine.trunk().clone(), record.lora);
        blocking(move || {
            let exported = export_state(&trunk, &lora, &adapters, gradients)?;
            Ok((lora, exported))
        })
        .await
    }

    /// Every session of a tenant, live or not.
    pub async fn list(&self, tenant: &str) -> Result<Vec<Listed>, Error> {
        let own: Vec<_> = self.owners.sessions(tenant).into_iter().map(OwnSession::id).collect();
        let store = self.store.clone();
        let records = blocking(move || Ok(store.records_of(&own))).await?;
        let listed = records.into_iter().map(|(id, record)| {
            let live = self.slots.live(id).map(|live| live.profile.glance.view());
            Listed { id, record, live }
        });
        Ok(listed.collect())
    }

    /// A tenant's live sessions at a glance.
    pub fn views(&self, tenant: &str) -> Vec<SessionView> {
        let all = self.owners.sessions(tenant).into_iter();
        all.filter_map(|own| Some(self.slots.live(own.id())?.profile.glance.view())).collect()
    }

    /// The live sessions of all tenants.
    pub fn all_live(&self) -> Vec<Arc<Profile>> {
        self.slots.all_live()
    }

    /// Looks at what is stored of these sessions, without a copy. Damaged records are passed over.
    pub fn look_at(&self, sessions: &[SessionId], look: impl FnMut(SessionId, &Record)) {
        self.store.look_at(sessions, look);
    }

    /// Looks at what is stored of all sessions.
    pub fn look_at_all(&self, look: impl FnMut(SessionId, &Record)) {
        self.store.look_at_all(look);
    }
}
