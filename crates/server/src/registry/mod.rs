//! Which sessions there are: live, with an actor, or in the store only. It opens them, finds them,
//! brings them back, parks them and drains them. Where a live session's adapter is, `residency`
//! knows.
//!
//! Everything that makes, moves or ends a session's actor happens under that session's own lock, so
//! a client that comes back while its session is being parked waits and then gets it revived.
//! Frames do not come this way: a stream holds its actor's address.

mod drain;
mod look;
mod loss;
mod manage;
mod open;
mod owners;
mod parking;
mod removed;
mod restore;
mod slots;
mod snapshot;

pub use drain::Hurry;
pub use look::Listed;
pub use open::Opening;
pub use owners::{ManagedSession, OwnSession, Owners};
pub use restore::Restored;
pub use slots::Slots;
pub use snapshot::{Copied, fits, to_proto as snapshot_info};

use crate::access::{Access, Tenant};
use crate::engine::{EngineClient, Settings};
use crate::error::Error;
use crate::meter::{Left, Meter, Metered, Meters};
use crate::pool::ActorPool;
use crate::quota::Amount;
use crate::refusals::Refusals;
use crate::residency::{Activity, Alive, Away, Home, Pinned, Profile, Residency, Writes};
use crate::session::{
    Attach, DRAIN_RETRY, Glance, Greeting, Permit, Reason, Resume, Retire, SessionActor, SessionId,
    SessionSeed, SnapshotEvery, StreamEnds,
};
use crate::store::{Record, SnapshotRecord, Store};
use actix::{Actor, Addr};
use offshoot_proto::{WireDType, v1};
use slots::{Held, Live};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// See the module's text.
pub struct Registry {
    access: Arc<Access>,
    owners: Owners,
    slots: Arc<Slots>,
    residency: Arc<Residency>,
    refusals: Arc<Refusals>,
    engine: EngineClient,
    store: Arc<Store>,
    meters: Arc<Meters>,
    pool: ActorPool,
    limits: v1::Limits,
    lease: Duration,
    snapshots: SnapshotEvery,
    idle: mpsc::Sender<SessionId>,
    max_live_sessions: usize,
    draining: AtomicBool,
}

/// What a registry is made from.
pub struct Parts {
    pub access: Arc<Access>,
    pub owners: Owners,
    pub engine: EngineClient,
    pub store: Arc<Store>,
    pub meters: Arc<Meters>,
    pub slots: Arc<Slots>,
    pub residency: Arc<Residency>,
    pub refusals: Arc<Refusals>,
    pub pool: ActorPool,
    pub limits: v1::Limits,
    pub lease: Duration,
    /// How often sessions are made durable while they train.
    pub snapshots: SnapshotEvery,
    pub max_live_sessions: usize,
}

/// What a live session begins with.
struct Beginning {
    alive: Alive,
    profile: Arc<Profile>,
    home: Home,
    resume: Resume,
    epoch: u64,
}

/// A stream that is attached.
pub struct AttachedStream {
    pub actor: Addr<SessionActor>,
    pub session: SessionId,
    /// Among the streams of the session.
    pub number: u64,
    pub wire_dtype: WireDType,
    pub meter: Arc<Meter>,
}

/// A stream that wants to be.
pub struct StreamEnd {
    pub greeting: Greeting,
    pub hello: Permit,
    pub farewell: Permit,
    pub ends: StreamEnds,
}

impl Registry {
    /// An empty registry over a store, and the task that parks idle sessions.
    pub fn start(parts: Parts) -> Arc<Registry> {
        let (idle, expired) = mpsc::channel(64);
        let changes = parts.access.changes();
        let registry = Arc::new(Registry {
            access: parts.access,
            owners: parts.owners,
            slots: parts.slots,
            residency: parts.residency,
            refusals: parts.refusals,
            engine: parts.engine,
            store: parts.store,
            meters: parts.meters,
            pool: parts.pool,
            limits: parts.limits,
            lease: parts.lease,
            snapshots: parts.snapshots,
            idle,
            max_live_sessions: parts.max_live_sessions,
            draining: AtomicBool::new(false),
        });
        registry.count_unreachable();
        tokio::spawn(parking::park_expired(Arc::downgrade(&registry), expired));
        tokio::spawn(removed::park_removed(Arc::downgrade(&registry), changes));
        registry
    }

    /// What every session is told.
    pub fn limits(&self) -> v1::Limits {
        self.limits
    }

    /// What a tenant's sessions are told: the same, within his quotas.
    pub fn limits_for(&self, tenant: &Tenant) -> v1::Limits {
        let least = |limit: u32, quota: Option<u64>| {
            quota.map_or(limit, |quota| u32::try_from(quota).unwrap_or(u32::MAX).min(limit))
        };
        let (limits, quotas) = (self.limits, tenant.quotas);
        v1::Limits {
            max_tokens_per_microbatch: least(
                limits.max_tokens_per_microbatch,
                quotas.tokens_per_microbatch,
            ),
            max_rank: least(limits.max_rank, quotas.rank),
            ..limits
        }
    }

    /// Who gets in.
    pub fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// Whose the sessions are.
    pub fn owners(&self) -> &Owners {
        &self.owners
    }

    /// What was refused.
    pub fn refusals(&self) -> &Arc<Refusals> {
        &self.refusals
    }

    /// Where the adapters are.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Attaches a stream. A parked session becomes live; its adapter comes with the first frame.
    pub async fn attach(
        &self,
        session: OwnSession,
        end: StreamEnd,
    ) -> Result<AttachedStream, Error> {
        let id = session.id();
        let mut held = self.slots.lock(id).await;
        let record = match held.live() {
            Some(_) => self.record(id).await?,
            None => self.whole(id).await?,
        };
        let live = self.revive(&mut held, id, &record)?;
        let StreamEnd { greeting, hello, farewell, ends } = end;
        let durable = record.head().map(snapshot::to_proto);
        let snapshots = record.newest_first().map(snapshot::to_proto).collect();
        let attach = Attach { greeting, durable, snapshots, farewell, ends };
        let attached = live.actor.send(attach).await.map_err(gone)??;
        if attached.epoch > record.epoch {
            self.note_epoch(id, attached.epoch).await;
        }
        hello.send(Ok(attached.hello));
        let (number, wire_dtype) = (attached.number, live.profile.settings.wire_dtype);
        let meter = live.profile.meter.clone();
        Ok(AttachedStream { actor: live.actor, session: id, number, wire_dtype, meter })
    }

    /// Makes a session durable as it is after frame `after`. Of older snapshots, those named in
    /// `keep` stay, too.
    pub async fn snapshot(
        &self,
        session: OwnSession,
        after: u64,
        keep: Vec<String>,
    ) -> Result<SnapshotRecord, Error> {
        let id = session.id();
        let held = self.slots.lock(id).await;
        let store = self.store.clone();
        blocking(move || store.keep(id, &keep)).await?;
        match held.live() {
            Some(live) => self.write_cut(id, &live, Reason::Snapshot { after }).await,
            None => {
                let head = self.head(id).await?;
                let (server, client) = (head.sequence, after);
                if server != client {
                    return Err(Error::Point { server, client });
                }
                self.claim_head(id).await
            }
        }
    }

    /// Parks a session, or deletes it with all its snapshots.
    pub async fn close(
        &self,
        session: OwnSession,
        forget: bool,
    ) -> Result<Option<SnapshotRecord>, Error> {
        if forget {
            return self.forget(session.into()).await.map(|()| None);
        }
        let id = session.id();
        let mut held = self.slots.lock(id).await;
        let head = self.head(id).await?;
        let snapshot = match held.live() {
            Some(_) => self.park(id, &mut held, Reason::Close).await?,
            None => head,
        };
        tracing::info!(session = %id, step = snapshot.step, "session closed");
        Ok(Some(snapshot))
    }

    /// The live session, made from its record if need be.
    fn revive(&self, held: &mut Held<'_>, id: SessionId, record: &Record) -> Result<Live, Error> {
        if let Some(live) = held.live() {
            return Ok(live);
        }
        let alive = self.seat(&record.tenant)?;
        let head = record.head().ok_or_else(|| Error::UnknownSession(id.to_string()))?;
        fits(id, record, head, self.engine.trunk())?;
        let profile = self.profile(id, snapshot::settings(record)?, record.metering);
        let (home, resume) = (Home::Away(Away::Disk), snapshot::standing(head));
        let live = self.spawn(Beginning { alive, profile, home, resume, epoch: record.epoch });
        tracing::info!(session = %id, step = head.step, "session revived");
        held.put(Some(live.clone()));
        Ok(live)
    }

    /// Its meter goes on, from what is in the record if it was not live.
    fn profile(&self, id: SessionId, settings: Settings, before: Metered) -> Arc<Profile> {
        Arc::new(Profile {
            id,
            meter: self.meters.of(id, &settings.tenant, before),
            settings,
            activity: Activity::default(),
            glance: Glance::default(),
            pinned: Pinned::default(),
            writes: Writes::default(),
        })
    }

    fn spawn(&self, beginning: Beginning) -> Live {
        let Beginning { alive, profile, home, resume, epoch } = beginning;
        let (lease, idle) = (self.lease, self.idle.clone());
        let tenant = self.access.tenant(&profile.settings.tenant);
        let limits = tenant.map_or(self.limits, |tenant| self.limits_for(&tenant));
        let (residency, known) = (self.residency.clone(), profile.clone());
        let snapshots = self.snapshots;
        profile.glance.begin(&home, &resume);
        let seed = SessionSeed {
            alive,
            profile,
            residency,
            refusals: self.refusals.clone(),
            home,
            resume,
            epoch,
            limits,
            snapshots,
            lease,
            idle,
        };
        let start = move |_: &mut _| SessionActor::new(seed);
        let actor = SessionActor::start_in_arbiter(self.pool.arbiter(), start);
        Live { actor, profile: known }
    }

    async fn read(
        &self,
        id: SessionId,
        record: &Record,
        snapshot: &SnapshotRecord,
    ) -> Result<Copied, Error> {
        fits(id, record, snapshot, self.engine.trunk())?;
        let (store, snapshot) = (self.store.clone(), snapshot.clone());
        blocking(move || Copied::decode(store.read(id, &snapshot)?)).await
    }

    /// The record of a session that begins again, at its newest whole snapshot.
    async fn whole(&self, id: SessionId) -> Result<Record, Error> {
        self.refuse_while_draining()?;
        let store = self.store.clone();
        blocking(move || store.whole_head(id)).await
    }

    /// A new client has begun: told before it is, so that those before it cannot come back even if
    /// this server dies now. A store that cannot be written keeps nobody from training.
    async fn note_epoch(&self, id: SessionId, epoch: u64) {
        let store = self.store.clone();
        if let Err(error) = blocking(move || store.set_epoch(id, epoch)).await {
            tracing::warn!(session = %id, %error, "the newest client is known until the next start only");
        }
    }

    async fn claim_head(&self, id: SessionId) -> Result<SnapshotRecord, Error> {
        let store = self.store.clone();
        blocking(move || store.claim_head(id)).await
    }

    async fn record(&self, id: SessionId) -> Result<Record, Error> {
        let store = self.store.clone();
        let record = blocking(move || store.record(id)).await?;
        record.ok_or_else(|| Error::UnknownSession(id.to_string()))
    }

    async fn head(&self, id: SessionId) -> Result<SnapshotRecord, Error> {
        let record = self.record(id).await?;
        record.head().cloned().ok_or_else(|| Error::UnknownSession(id.to_string()))
    }

    /// A place among the live sessions, all of them and those of the tenant.
    fn seat(&self, tenant: &str) -> Result<Alive, Error> {
        self.refuse_while_draining()?;
        let seat = self.engine.accounts().of(tenant).take(Amount::Sessions, 1)?;
        let (alive, limit) = (self.residency.count_in(seat), self.max_live_sessions);
        if self.residency.n_live() > limit {
            return Err(Error::LiveSessions { limit });
        }
        Ok(alive)
    }

    fn refuse_while_draining(&self) -> Result<(), Error> {
        if self.is_draining() {
            return Err(Error::Draining { retry_after: DRAIN_RETRY });
        }
        self.engine.check()
    }

    /// A tenant's live sessions.
    pub fn live(&self, tenant: &str) -> usize {
        self.engine.accounts().of(tenant).amount(Amount::Sessions) as usize
    }

    /// A session is not live any more: what it used is written down. Under its lock. A failure keeps
    /// nobody from leaving.
    async fn meter_left(&self, id: SessionId, why: Left) {
        let tenant = self.owners.of(id).unwrap_or_default();
        let (meters, store) = (self.meters.clone(), self.store.clone());
        let saved = blocking(move || {
            let told = meters.tell_left(id, &tenant, why);
            let saved = if told { store.save_meter(id) } else { Ok(()) };
            meters.forget(id);
            saved
        });
        if let Err(error) = saved.await {
            tracing::warn!(session = %id, %error, "what is in the metering log may come there again");
        }
    }

    /// Whether the server is about to end.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// Ends an actor whose session is set back or deleted; what was being written of it has landed.
async fn end(live: Option<Live>) {
    if let Some(live) = live {
        let profile = live.profile.clone();
        retire(Some(live)).await;
        drop(profile.writes.in_turn().await);
    }
}

/// Ends an actor. One that has died already is fine, too.
async fn retire(live: Option<Live>) {
    if let Some(live) = live {
        let _ = live.actor.send(Retire).await;
    }
}

fn gone(_: actix::MailboxError) -> Error {
    Error::Gone { part: "session" }
}

/// Runs what blocks beside the runtime's threads.
pub async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let span = tracing::Span::current();
    let run = move || span.in_scope(run);
    tokio::task::spawn_blocking(run).await.map_err(|_| Error::Gone { part: "store" })?
}
