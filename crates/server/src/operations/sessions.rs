//! The sessions of an overview.

use super::Operations;
use crate::access::Caller;
use crate::grpc::views::session_info;
use crate::overview::Rates;
use crate::residency::Profile;
use crate::session::SessionId;
use crate::store::{Record, millis_of};
use offshoot_proto::v1;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

/// More are not sent: nobody reads them, and a message has its limit.
const MAX_SESSIONS: usize = 5000;

impl Operations {
    /// What a caller manages, live ones first and then the last parked; and how many more there are.
    pub(super) fn sessions(&self, caller: &Caller) -> (Vec<v1::SessionView>, u32) {
        let owners = self.registry.owners();
        let mut ids: Vec<SessionId> = owners.managed(caller).into_iter().map(|s| s.id()).collect();
        let live: HashMap<SessionId, Arc<Profile>> = match ids.is_empty() {
            true => HashMap::new(),
            false => self.registry.all_live().into_iter().map(|p| (p.id, p)).collect(),
        };
        let n_left_out = ids.len().saturating_sub(MAX_SESSIONS);
        if n_left_out > 0 {
            ids = self.most_recent(&ids, &live);
        }
        let own: Vec<_> = ids.iter().filter_map(|id| live.get(id).cloned()).collect();
        let rates = self.hour.rates(&own);
        let mut views = Vec::with_capacity(ids.len());
        self.registry.look_at(&ids, |id, record| {
            let rates = rates.get(&id).copied().unwrap_or_default();
            views.push(self.view(id, record, live.get(&id).map(|profile| (&**profile, rates))));
        });
        let order = |view: &v1::SessionView| {
            let info = view.info.as_ref();
            let state = info.map_or(0, |info| info.state);
            (state, view.tenant.clone(), Reverse(view.opened_millis))
        };
        views.sort_by_cached_key(order);
        (views, u32::try_from(n_left_out).unwrap_or(u32::MAX))
    }

    fn most_recent(
        &self,
        ids: &[SessionId],
        live: &HashMap<SessionId, Arc<Profile>>,
    ) -> Vec<SessionId> {
        let mut ranked = Vec::with_capacity(ids.len());
        self.registry.look_at(ids, |id, record| {
            let taken = record.head().map_or(0, |head| head.taken_millis);
            ranked.push((Reverse((live.contains_key(&id), taken)), id));
        });
        ranked.sort_unstable();
        ranked.into_iter().take(MAX_SESSIONS).map(|(_, id)| id).collect()
    }

    fn view(
        &self,
        id: SessionId,
        record: &Record,
        live: Option<(&Profile, Rates)>,
    ) -> v1::SessionView {
        let shown = live.map(|(profile, _)| profile.glance.view());
        let info = session_info(id, record, shown.as_ref(), self.engine.trunk());
        let metering = match live {
            Some((profile, _)) => profile.meter.snapshot(),
            None => record.metering.used.to_proto(),
        };
        let stored = v1::SessionView {
            info: Some(info),
            tenant: record.tenant.clone(),
            opened_millis: record.opened_millis,
            metering: Some(metering),
            durable_step: record.head().map_or(0, |head| head.step),
            ..Default::default()
        };
        let Some((profile, rates)) = live else { return stored };
        let unused = self.registry.residency().unused_for(profile);
        v1::SessionView {
            pinned: profile.pinned.is_pinned(),
            last_frame_millis: unused.map_or(0, |unused| millis_of(SystemTime::now() - unused)),
            tokens_per_second: rates.tokens_per_second,
            shared_loss: profile.meter.shared_loss(),
            device_share: rates.device_share,
            queue_seconds: rates.queue_seconds,
            ..stored
        }
    }
}
