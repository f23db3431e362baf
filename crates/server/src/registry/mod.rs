//! Which sessions there are: on the device as actors, or in the store only. It opens them, finds
//! them, brings them back, parks them and drains them.
//!
//! Everything that makes or ends a session's actor happens under that session's own lock, so a
//! client that comes back while its session is being parked waits and then gets it revived. Frames
//! do not come this way: a stream holds its actor's address.

mod parking;
mod snapshot;

pub use snapshot::to_proto as snapshot_info;

use crate::engine::{Admitted, EngineClient, Exported, Plan, Settings, Start};
use crate::error::Error;
use crate::ledger::{BytesKind, Reservation};
use crate::pool::ActorPool;
use crate::session::{
    Attach, DRAIN_RETRY, Export, Info, Permit, Reason, Resume, Retire, SessionActor, SessionId,
    SessionSeed, SessionView, StreamEnds,
};
use crate::store::{Origin, Record, SnapshotRecord, Store};
use actix::{Actor, Addr};
use dashmap::DashMap;
use offshoot_adapters::LoraSpec;
use offshoot_proto::{WireDType, v1};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};

/// See the module's text.
pub struct Registry {
    /// None within: in the store only, or nowhere.
    sessions: DashMap<SessionId, Arc<Mutex<Option<Live>>>>,
    engine: EngineClient,
    store: Arc<Store>,
    pool: ActorPool,
    limits: v1::Limits,
    lease: Duration,
    idle: mpsc::Sender<SessionId>,
    draining: AtomicBool,
}

/// What a registry is made from.
pub struct Parts {
    pub engine: EngineClient,
    pub store: Arc<Store>,
    pub pool: ActorPool,
    pub limits: v1::Limits,
    pub lease: Duration,
}

/// A session on the device.
struct Live {
    actor: Addr<SessionActor>,
    record: Record,
    wire_dtype: WireDType,
    admitted: Admitted,
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
    pub last_answered: u64,
    pub hello: Permit,
    pub farewell: Permit,
    pub ends: StreamEnds,
}

/// A session that was set back.
pub struct Restored {
    pub snapshot: SnapshotRecord,
    pub admitted: Admitted,
    pub lora: LoraSpec,
    pub wire_dtype: WireDType,
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
            sessions: DashMap::new(),
            engine: parts.engine,
            store: parts.store,
            pool: parts.pool,
            limits: parts.limits,
            lease: parts.lease,
            idle,
            draining: AtomicBool::new(false),
        });
        tokio::spawn(parking::park_expired(Arc::downgrade(&registry), expired));
        registry
    }

    /// What every session is told.
    pub fn limits(&self) -> v1::Limits {
        self.limits
    }

    /// Starts a session and makes it durable as it begins.
    pub async fn open(&self, opening: Opening) -> Result<(SessionId, Admitted), Error> {
        self.refuse_while_draining()?;
        let Opening { name, settings, start } = opening;
        let id = SessionId::new();
        let trunk = self.engine.trunk();
        let record = Record {
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
        };
        let wire_dtype = settings.wire_dtype;
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let plan = Plan { reserved: self.reserve(&settings.lora)?, settings, start };
        let (session, admitted) = self.engine.admit(plan).await?;
        let first =
            snapshot::Copied { adapters: session.state().await?, resume: Resume::default() };
        let (store, created) = (self.store.clone(), record.clone());
        blocking(move || store.create(id, created, first.encode(Origin::Server))).await?;
        let resume = Resume::default();
        *slot = Some(Live {
            actor: self.spawn(id, session, admitted, resume),
            record,
            wire_dtype,
            admitted,
        });
        let name = slot.as_ref().map_or("", |live| live.record.name.as_str());
        tracing::info!(session = %id, name, parameters = admitted.n_parameters, "session opened");
        Ok((id, admitted))
    }

    /// Attaches a stream; a parked session is revived first.
    pub async fn attach(&self, id: SessionId, end: StreamEnd) -> Result<AttachedStream, Error> {
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let (actor, wire_dtype) = {
            let live = self.revive(id, &mut slot).await?;
            (live.actor.clone(), live.wire_dtype)
        };
        let record = self.record(id).await?;
        let StreamEnd { last_answered, hello, farewell, ends } = end;
        let durable = record.head().map(snapshot::to_proto);
        let attach = Attach { last_answered, durable, hello, farewell, ends };
        let attached = actor.send(attach).await.map_err(gone)??;
        Ok(AttachedStream { actor, number: attached.number, wire_dtype })
    }

    /// Makes a session durable as it is after frame `after`.
    pub async fn snapshot(&self, id: SessionId, after: u64) -> Result<SnapshotRecord, Error> {
        let slot = self.slot(id);
        let slot = slot.lock().await;
        match live(&slot) {
            Some(live) => self.write_cut(id, live, Reason::Snapshot { after }).await,
            None => {
                let head = self.head(id).await?;
                let (server, client) = (head.sequence, after);
                if server != client {
                    return Err(Error::Point { server, client });
                }
                let store = self.store.clone();
                blocking(move || store.claim_head(id)).await
            }
        }
    }

    /// Sets a session back to a snapshot; empty: the one that it would go on from.
    pub async fn restore(&self, id: SessionId, snapshot: &str) -> Result<Restored, Error> {
        self.refuse_while_draining()?;
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let record = self.record(id).await?;
        let wanted = if snapshot.is_empty() { record.head.as_str() } else { snapshot };
        let Some(snapshot) = record.snapshot(wanted).cloned() else {
            let known: Vec<&str> = record.snapshots.iter().map(|s| s.id.as_str()).collect();
            let (session, known) = (id, known.join(", "));
            return Err(Error::UnknownSnapshot { session, snapshot: wanted.into(), known });
        };
        // Read before anything ends: a damaged snapshot leaves the session as it is.
        let stored = self.read(id, &record, &snapshot).await?;
        retire(slot.take()).await;
        let (store, head) = (self.store.clone(), snapshot.id.clone());
        blocking(move || store.set_head(id, &head)).await?;
        let live = self.bring_back(id, record, stored).await?;
        let restored = Restored {
            snapshot,
            admitted: live.admitted,
            lora: live.record.lora.clone(),
            wire_dtype: live.wire_dtype,
        };
        *slot = Some(live);
        tracing::info!(session = %id, snapshot = restored.snapshot.id, "session restored");
        Ok(restored)
    }

    /// A session's adapter, and the accumulated gradients if they are wanted.
    pub async fn export(
        &self,
        id: SessionId,
        gradients: bool,
    ) -> Result<(LoraSpec, Exported), Error> {
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let live = self.revive(id, &mut slot).await?;
        let exported = live.actor.send(Export { gradients }).await.map_err(gone)??;
        Ok((live.record.lora.clone(), exported))
    }

    /// Every session, on the device or not.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        let store = self.store.clone();
        let records = blocking(move || store.records()).await?;
        let mut listed = Vec::with_capacity(records.len());
        for (id, record) in records {
            let slot = self.sessions.get(&id).map(|slot| slot.clone());
            let actor = match slot {
                Some(slot) => live(&*slot.lock().await).map(|live| live.actor.clone()),
                None => None,
            };
            let live = match actor {
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
        let slot = self.slot(id);
        let mut slot = slot.lock().await;
        let head = self.head(id).await?;
        if !forget {
            let snapshot = match live(&slot) {
                Some(_) => self.park(id, &mut slot, Reason::Close).await?,
                None => head,
            };
            tracing::info!(session = %id, step = snapshot.step, "session closed");
            return Ok(Some(snapshot));
        }
        retire(slot.take()).await;
        let store = self.store.clone();
        blocking(move || store.forget(id)).await?;
        tracing::info!(session = %id, "session forgotten");
        Ok(None)
    }

    /// The session on the device, brought back from the store if need be.
    async fn revive<'a>(
        &self,
        id: SessionId,
        slot: &'a mut Option<Live>,
    ) -> Result<&'a Live, Error> {
        if live(slot).is_none() {
            let record = self.record(id).await?;
            self.refuse_while_draining()?;
            let head = record.head().cloned().ok_or(Error::UnknownSession(id.to_string()))?;
            let stored = self.read(id, &record, &head).await?;
            let revived = self.bring_back(id, record, stored).await?;
            tracing::info!(session = %id, step = head.step, "session revived");
            *slot = Some(revived);
        }
        live(slot).ok_or(Error::Gone { part: "session" })
    }

    async fn bring_back(
        &self,
        id: SessionId,
        record: Record,
        stored: snapshot::Copied,
    ) -> Result<Live, Error> {
        let wire_dtype = snapshot::wire_dtype(&record)?;
        let applied = stored.resume.applied;
        let settings = Settings {
            lora: record.lora.clone(),
            adamw: record.adamw.clone(),
            seed: record.seed,
            wire_dtype,
        };
        let plan = Plan {
            reserved: self.reserve(&record.lora)?,
            settings,
            start: Start::State { state: stored.adapters, applied },
        };
        let (session, admitted) = self.engine.admit(plan).await?;
        let actor = self.spawn(id, session, admitted, stored.resume);
        Ok(Live { actor, record, wire_dtype, admitted })
    }

    fn reserve(&self, lora: &LoraSpec) -> Result<Reservation, Error> {
        let bytes = self.engine.trunk().adapter_bytes(lora);
        self.engine
            .ledger()
            .reserve(BytesKind::Adapters, bytes)
            .map_err(|shortage| Error::NoRoom { shortage, retry_after: None })
    }

    fn spawn(
        &self,
        id: SessionId,
        engine: crate::engine::EngineSession,
        admitted: Admitted,
        resume: Resume,
    ) -> Addr<SessionActor> {
        let (limits, lease, idle) = (self.limits, self.lease, self.idle.clone());
        let seed = SessionSeed { id, engine, admitted, resume, limits, lease, idle };
        SessionActor::start_in_arbiter(self.pool.arbiter(), move |_| SessionActor::new(seed))
    }

    async fn read(
        &self,
        id: SessionId,
        record: &Record,
        snapshot: &SnapshotRecord,
    ) -> Result<snapshot::Copied, Error> {
        snapshot::check(id, record, snapshot, self.engine.trunk())?;
        let (store, snapshot) = (self.store.clone(), snapshot.clone());
        blocking(move || snapshot::Copied::decode(store.read(&snapshot)?)).await
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

    fn slot(&self, id: SessionId) -> Arc<Mutex<Option<Live>>> {
        // Slots of sessions that are in use nowhere go first, so that forged ids take no memory.
        self.sessions.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().map_or(true, |live| live.is_some())
        });
        self.sessions.entry(id).or_default().clone()
    }

    fn refuse_while_draining(&self) -> Result<(), Error> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(Error::Draining { retry_after: DRAIN_RETRY });
        }
        Ok(())
    }
}

/// What is in the slot, unless its actor has died.
fn live(slot: &Option<Live>) -> Option<&Live> {
    slot.as_ref().filter(|live| live.actor.connected())
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
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(run).await.map_err(|_| Error::Gone { part: "store" })?
}
