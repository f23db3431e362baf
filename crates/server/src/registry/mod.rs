//! Which sessions there are: live, with an actor, or in the store only. It opens them, finds them,
//! brings them back, parks them and drains them. Where a live session's adapter is, `residency`
//! knows.
//!
//! Everything that makes, moves or ends a session's actor happens under that session's own lock, so
//! a client that comes back while its session is being parked waits and then gets it revived.
//! Frames do not come this way: a stream holds its actor's address.

mod loss;
mod parking;
mod slots;
mod snapshot;

pub use slots::Slots;
pub use snapshot::{Copied, fits, to_proto as snapshot_info};

use crate::engine::{Admitted, EngineClient, Exported, Plan, Settings, Start, export_state};
use crate::error::Error;
use crate::pool::ActorPool;
use crate::residency::{Activity, Away, Home, Profile, Residency, Writes};
use crate::session::{
    Attach, DRAIN_RETRY, Export, ExportOf, Greeting, Info, Permit, Reason, Resume, Retire,
    SessionActor, SessionId, SessionSeed, SessionView, SnapshotEvery, StreamEnds, epoch_now,
};
use crate::store::{Origin, Record, SnapshotRecord, Store};
use actix::{Actor, Addr};
use offshoot_adapters::LoraSpec;
use offshoot_proto::{WireDType, v1};
use slots::{Held, Live};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// See the module's text.
pub struct Registry {
    slots: Arc<Slots>,
    residency: Arc<Residency>,
    engine: EngineClient,
    store: Arc<Store>,
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
    pub engine: EngineClient,
    pub store: Arc<Store>,
    pub slots: Arc<Slots>,
    pub residency: Arc<Residency>,
    pub pool: ActorPool,
    pub limits: v1::Limits,
    pub lease: Duration,
    /// How often sessions are made durable while they train.
    pub snapshots: SnapshotEvery,
    pub max_live_sessions: usize,
}

/// A new session, checked.
#[derive(Debug)]
pub struct Opening {
    /// For people.
    pub name: String,
    pub settings: Settings,
    pub start: Start,
}

/// A stream that is attached.
pub struct AttachedStream {
    pub actor: Addr<SessionActor>,
    /// Among the streams of the session.
    pub number: u64,
    pub wire_dtype: WireDType,
}

/// A stream that wants to be.
pub struct StreamEnd {
    pub greeting: Greeting,
    pub hello: Permit,
    pub farewell: Permit,
    pub ends: StreamEnds,
}

/// A session that was set back.
pub struct Restored {
    pub snapshot: SnapshotRecord,
    pub n_parameters: u64,
    pub adapter_bytes: u64,
    pub settings: Settings,
}

/// A session in a list.
pub struct Listed {
    pub id: SessionId,
    pub record: Record,
    /// None: parked.
    pub live: Option<SessionView>,
}

impl Registry {
    /// An empty registry over a store, and the task that parks idle sessions.
    pub fn start(parts: Parts) -> Arc<Registry> {
        let (idle, expired) = mpsc::channel(64);
        let registry = Arc::new(Registry {
            slots: parts.slots,
            residency: parts.residency,
            engine: parts.engine,
            store: parts.store,
            pool: parts.pool,
            limits: parts.limits,
            lease: parts.lease,
            snapshots: parts.snapshots,
            idle,
            max_live_sessions: parts.max_live_sessions,
            draining: AtomicBool::new(false),
        });
        tokio::spawn(parking::park_expired(Arc::downgrade(&registry), expired));
        registry
    }

    /// What every session is told.
    pub fn limits(&self) -> v1::Limits {
        self.limits
    }

    /// Where the adapters are.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Starts a session and makes it durable as it begins.
    pub async fn open(&self, opening: Opening) -> Result<(SessionId, Admitted), Error> {
        self.refuse_one_more()?;
        let Opening { name, settings, start } = opening;
        let id = SessionId::new();
        let mut held = self.slots.lock(id).await;
        let reserved = self.residency.reserve(&settings.lora).await?;
        let plan = Plan { reserved, settings: settings.clone(), start };
        let (session, admitted) = self.engine.admit(plan).await?;
        let adapters = Arc::new(session.state().await?);
        let first = Copied { adapters, resume: Resume::default() };
        let (store, record) = (self.store.clone(), self.new_record(name, &settings));
        let name = record.name.clone();
        blocking(move || store.create(id, record, first.encode(Origin::Server))).await?;
        let profile = profile(id, settings);
        let home = Home::Device(self.residency.settle_in(&profile, (session, admitted)));
        held.put(Some(self.spawn(profile, home, Resume::default(), 0)));
        tracing::info!(session = %id, name, parameters = admitted.n_parameters, "session opened");
        Ok((id, admitted))
    }

    fn new_record(&self, name: String, settings: &Settings) -> Record {
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
        }
    }

    /// Attaches a stream. A parked session becomes live; its adapter comes with the first frame.
    pub async fn attach(&self, id: SessionId, end: StreamEnd) -> Result<AttachedStream, Error> {
        let mut held = self.slots.lock(id).await;
        let record = self.record(id).await?;
        let live = self.revive(&mut held, id, &record)?;
        let StreamEnd { greeting, hello, farewell, ends } = end;
        let durable = record.head().map(snapshot::to_proto);
        let snapshots = record.newest_first().map(snapshot::to_proto).collect();
        let attach = Attach { greeting, durable, snapshots, hello, farewell, ends };
        let attached = live.actor.send(attach).await.map_err(gone)??;
        let (number, wire_dtype) = (attached.number, live.profile.settings.wire_dtype);
        Ok(AttachedStream { actor: live.actor, number, wire_dtype })
    }

    /// Makes a session durable as it is after frame `after`. Of older snapshots, those named in
    /// `keep` stay, too.
    pub async fn snapshot(
        &self,
        id: SessionId,
        after: u64,
        keep: Vec<String>,
    ) -> Result<SnapshotRecord, Error> {
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

    /// Sets a session back to a snapshot; empty: the one that it would go on from. Its adapter
    /// comes with the first frame.
    pub async fn restore(&self, id: SessionId, snapshot: &str) -> Result<Restored, Error> {
        self.refuse_while_draining()?;
        let mut held = self.slots.lock(id).await;
        if held.live().is_none() {
            self.refuse_one_more()?;
        }
        let record = self.record(id).await?;
        let wanted = if snapshot.is_empty() { record.head.as_str() } else { snapshot };
        let Some(snapshot) = record.snapshot(wanted).cloned() else {
            let known: Vec<&str> = record.snapshots.iter().map(|s| s.id.as_str()).collect();
            let (session, known) = (id, known.join(", "));
            return Err(Error::UnknownSnapshot { session, snapshot: wanted.into(), known });
        };
        // Read before anything ends: a damaged snapshot leaves the session as it is.
        drop(self.read(id, &record, &snapshot).await?);
        let settings = snapshot::settings(&record)?;
        end(held.put(None)).await;
        let (store, head) = (self.store.clone(), snapshot.id.clone());
        blocking(move || store.set_head(id, &head)).await?;
        let trunk = self.engine.trunk();
        let restored = Restored {
            n_parameters: trunk.n_parameters(&settings.lora),
            adapter_bytes: trunk.adapter_bytes(&settings.lora),
            settings: settings.clone(),
            snapshot,
        };
        let standing = snapshot::standing(&restored.snapshot);
        // Whoever had it before is set back as well, and cannot take over from who restored it.
        let epoch = epoch_now();
        held.put(Some(self.spawn(profile(id, settings), Home::Away(Away::Disk), standing, epoch)));
        tracing::info!(session = %id, snapshot = restored.snapshot.id, "session restored");
        Ok(restored)
    }

    /// A session's adapter, and the accumulated gradients if they are wanted. It is taken from
    /// where it is.
    pub async fn export(
        &self,
        id: SessionId,
        gradients: bool,
    ) -> Result<(LoraSpec, Exported), Error> {
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

    /// Every session, live or not.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        let store = self.store.clone();
        let records = blocking(move || store.records()).await?;
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

    /// Parks a session, or deletes it with all its snapshots.
    pub async fn close(
        &self,
        id: SessionId,
        forget: bool,
    ) -> Result<Option<SnapshotRecord>, Error> {
        let mut held = self.slots.lock(id).await;
        let head = self.head(id).await?;
        if !forget {
            let snapshot = match held.live() {
                Some(_) => self.park(id, &mut held, Reason::Close).await?,
                None => head,
            };
            tracing::info!(session = %id, step = snapshot.step, "session closed");
            return Ok(Some(snapshot));
        }
        end(held.put(None)).await;
        let store = self.store.clone();
        blocking(move || store.forget(id)).await?;
        tracing::info!(session = %id, "session forgotten");
        Ok(None)
    }

    /// The live session, made from its record if need be.
    fn revive(&self, held: &mut Held<'_>, id: SessionId, record: &Record) -> Result<Live, Error> {
        if let Some(live) = held.live() {
            return Ok(live);
        }
        self.refuse_one_more()?;
        let head = record.head().ok_or_else(|| Error::UnknownSession(id.to_string()))?;
        fits(id, record, head, self.engine.trunk())?;
        let profile = profile(id, snapshot::settings(record)?);
        let live = self.spawn(profile, Home::Away(Away::Disk), snapshot::standing(head), 0);
        tracing::info!(session = %id, step = head.step, "session revived");
        held.put(Some(live.clone()));
        Ok(live)
    }

    fn spawn(&self, profile: Arc<Profile>, home: Home, resume: Resume, epoch: u64) -> Live {
        let (limits, lease, idle) = (self.limits, self.lease, self.idle.clone());
        let (residency, known) = (self.residency.clone(), profile.clone());
        let alive = residency.count_in();
        let snapshots = self.snapshots;
        let seed = SessionSeed {
            alive,
            profile,
            residency,
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
        blocking(move || Copied::decode(store.read(&snapshot)?)).await
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

    fn refuse_one_more(&self) -> Result<(), Error> {
        self.refuse_while_draining()?;
        let limit = self.max_live_sessions;
        if self.residency.n_live() < limit { Ok(()) } else { Err(Error::LiveSessions { limit }) }
    }

    fn refuse_while_draining(&self) -> Result<(), Error> {
        if self.is_draining() {
            return Err(Error::Draining { retry_after: DRAIN_RETRY });
        }
        self.engine.check()
    }

    /// Whether the server is about to end.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

fn profile(id: SessionId, settings: Settings) -> Arc<Profile> {
    Arc::new(Profile { id, settings, activity: Activity::default(), writes: Writes::default() })
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
    tokio::task::spawn_blocking(run).await.map_err(|_| Error::Gone { part: "store" })?
}
