//! What there is to see of sessions, which stay as they are: exports, lists and views.

use super::{OwnSession, Registry, blocking, gone};
use crate::engine::{Exported, export_state};
use crate::error::Error;
use crate::session::{Export, ExportOf, Info, SessionId, SessionView};
use crate::store::Record;
use offshoot_adapters::LoraSpec;

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
        let mut listed = Vec::with_capacity(records.len());
        for (id, record) in records {
            let live = match self.slots.actor(id) {
                Some(actor) => actor.send(Info).await.ok(),
                None => None,
            };
            listed.push(Listed { id, record, live });
        }
        Ok(listed)
    }

    /// A tenant's live sessions at a glance.
    pub async fn views(&self, tenant: &str) -> Vec<SessionView> {
        let mut views = Vec::new();
        for own in self.owners.sessions(tenant) {
            if let Some(actor) = self.slots.actor(own.id()) {
                views.extend(actor.send(Info).await);
            }
        }
        views
    }
}
