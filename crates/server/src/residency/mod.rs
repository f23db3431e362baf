//! Where the sessions' adapters are. A session is on the device while it trains; one that is idle,
//! or whose room others need, leaves for the host's memory (beside an accelerator) and then for the
//! disk, and comes back with its next frame. Its actor and its stream stay.
//!
//! ```text
//! device  --lower-->  host  --lower-->  disk
//!    ^------------- bring -----------------'
//! ```
//!
//! `policy` decides purely who leaves, `room` is the loop that asks them to and lets the next one
//! in, `list` knows who is in memory, and this file moves the bytes.

mod list;
mod pins;
mod policy;
mod room;
mod tenants;
mod writes;

pub use list::{Activity, Listed};
pub use pins::{PINS_OF_ALL, Pinned, WeightShare};
pub use policy::{Ages, Tier};
pub use writes::{Writes, Writing};

use crate::engine::{Admitted, EngineClient, EngineSession, Plan, Settings, Start};
use crate::error::Error;
use crate::faults::Faults;
use crate::ledger::{BytesKind, Ledger, Reservation};
use crate::meter::Meter;
use crate::quota::Held;
use crate::registry::{Copied, Slots, blocking, fits};
use crate::session::{Glance, Recorded, Resume, SessionId};
use crate::store::{Store, Why};
use list::List;
use offshoot_adapters::AdapterState;
use pins::Pins;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

/// See the module's text.
pub struct Residency {
    engine: EngineClient,
    store: Arc<Store>,
    /// Of the host's memory beside an accelerator. On the CPU nothing fits.
    host: Ledger,
    wait: Duration,
    ages: Ages,
    runtime: tokio::runtime::Handle,
    requests: mpsc::Sender<room::Request>,
    max_waiting: usize,
    /// Requests that are not answered yet.
    n_waiting: Arc<AtomicUsize>,
    /// A resident has become quiet.
    quiet: Arc<Notify>,
    list: Arc<List>,
    pins: Arc<Pins>,
    slots: Arc<Slots>,
    draining: Arc<AtomicBool>,
    n_live: Arc<AtomicUsize>,
    /// Taken by the server while sessions train, and held until they are written.
    copies: Arc<Semaphore>,
}

/// Counts a live session until it is dropped, also among those of its tenant.
pub struct Alive {
    n_live: Arc<AtomicUsize>,
    _seat: Held,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.n_live.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a residency is made from.
pub struct ResidencyParts {
    pub engine: EngineClient,
    pub store: Arc<Store>,
    pub slots: Arc<Slots>,
    /// Bytes of the host's memory for sessions that left the device.
    pub host_bytes: u64,
    /// How long a session waits for room.
    pub wait: Duration,
    /// How many may wait at a time.
    pub max_waiting: usize,
    pub ages: Ages,
}

/// A session as those know it who move its adapter.
#[derive(Debug)]
pub struct Profile {
    pub id: SessionId,
    pub settings: Settings,
    pub activity: Activity,
    pub glance: Glance,
    pub meter: Arc<Meter>,
    pub pinned: Pinned,
    pub writes: Writes,
}

/// A session's adapter on the device.
pub struct OnDevice {
    /// Before the place on the device, so that who has no bytes is not listed.
    listed: Listed,
    pub engine: EngineSession,
    pub admitted: Admitted,
}

/// A session's adapter in the host's memory.
pub struct OnHost {
    pub adapters: Arc<AdapterState>,
    reserved: Reservation,
    _listed: Listed,
}

impl OnHost {
    /// Of the host's memory.
    pub fn bytes(&self) -> u64 {
        self.reserved.bytes()
    }
}

/// A session's adapter that is not on the device.
pub enum Away {
    Host(Box<OnHost>),
    /// The store's head is the session as it is.
    Disk,
}

/// A session's adapter, wherever it is.
pub enum Home {
    Device(OnDevice),
    Away(Away),
}

impl Home {
    /// In which memory it is.
    pub fn tier(&self) -> Tier {
        match self {
            Home::Device(_) => Tier::Device,
            Home::Away(Away::Host(_)) => Tier::Host,
            Home::Away(Away::Disk) => Tier::Disk,
        }
    }

    /// What it takes of that memory; 0 on disk.
    pub fn adapter_bytes(&self) -> u64 {
        match self {
            Home::Device(on) => on.admitted.bytes,
            Home::Away(Away::Host(on)) => on.bytes(),
            Home::Away(Away::Disk) => 0,
        }
    }
}

/// A session that is on the device again.
pub struct Back {
    pub on: OnDevice,
    /// Recorded answers, if they were on disk too.
    pub answers: Option<Vec<Recorded>>,
}

impl Residency {
    /// Nobody is there yet.
    pub fn start(parts: ResidencyParts) -> Arc<Residency> {
        let (requests, asked) = mpsc::channel(parts.max_waiting.max(1));
        let residency = Arc::new(Residency {
            engine: parts.engine,
            store: parts.store,
            host: Ledger::new(Some(parts.host_bytes)),
            wait: parts.wait,
            ages: parts.ages,
            runtime: tokio::runtime::Handle::current(),
            requests,
            max_waiting: parts.max_waiting,
            n_waiting: Arc::default(),
            quiet: Arc::default(),
            list: Arc::default(),
            pins: Arc::default(),
            slots: parts.slots.clone(),
            draining: Arc::default(),
            n_live: Arc::default(),
            copies: Arc::new(Semaphore::new(writes::MAX_COPIES)),
        });
        tokio::spawn(room::keep(&residency, parts.slots, asked));
        residency
    }

    /// Bytes of the host's memory that sessions off the device take.
    pub fn host(&self) -> &Ledger {
        &self.host
    }

    /// Failures that tests ask for.
    pub fn faults(&self) -> &Faults {
        &self.engine.stats().faults
    }

    /// Counts a session that becomes live.
    pub fn count_in(&self, seat: Held) -> Alive {
        self.n_live.fetch_add(1, Ordering::Relaxed);
        Alive { n_live: self.n_live.clone(), _seat: seat }
    }

    /// Sessions that have an actor, wherever their adapters are.
    pub fn n_live(&self) -> usize {
        self.n_live.load(Ordering::Relaxed)
    }

    /// Sessions that wait for room on the device.
    pub fn n_waiting(&self) -> usize {
        self.n_waiting.load(Ordering::Relaxed)
    }

    /// The sessions that are in a memory: whose they are, and in which.
    pub fn in_memory(&self) -> Vec<(Arc<str>, Tier)> {
        self.list.tenants()
    }

    /// How many sessions are in this memory.
    pub fn count(&self, tier: Tier) -> usize {
        self.list.count(tier)
    }

    /// Room on the device for an adapter, first its tenant's. Idle sessions leave for it; what does
    /// not fit then waits, in the order in which it was asked for, and is refused at its deadline.
    pub async fn reserve(&self, settings: &Settings) -> Result<Reservation, Error> {
        let bytes = self.engine.trunk().adapter_bytes(&settings.lora);
        let of_tenant = self.reserve_of_tenant(&settings.tenant, bytes).await?;
        Ok(self.reserve_on_device(bytes).await?.with(of_tenant))
    }

    async fn reserve_on_device(&self, bytes: u64) -> Result<Reservation, Error> {
        // Nobody overtakes those who wait.
        if self.n_waiting.load(Ordering::Relaxed) == 0
            && let Ok(reserved) = self.engine.ledger().reserve(BytesKind::Adapters, bytes)
        {
            return Ok(reserved);
        }
        let (reply, reserved) = oneshot::channel();
        let request = room::Request::new(bytes, Instant::now() + self.wait, reply, &self.n_waiting);
        let limit = self.max_waiting;
        if self.n_waiting() > limit {
            return Err(Error::WaitingForRoom { limit });
        }
        let gone = || Error::Gone { part: "residency" };
        // There is room for all that may wait.
        self.requests.try_send(request).map_err(|_| gone())?;
        reserved.await.map_err(|_| gone())?
    }

    /// Enters a session that has just come to the device.
    pub fn settle_in(
        &self,
        profile: &Arc<Profile>,
        (engine, admitted): (EngineSession, Admitted),
    ) -> OnDevice {
        let listed = self.list.enter(profile, Tier::Device, admitted.bytes);
        OnDevice { engine, admitted, listed }
    }

    /// Nobody waits for room from now on.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.quiet.notify_waiters();
    }

    /// A resident's frames are all answered; whoever waits for room may ask it to leave.
    pub fn became_quiet(&self) {
        self.quiet.notify_waiters();
    }

    /// Notes a frame of a session.
    pub fn used(&self, profile: &Profile) {
        self.list.used(&profile.activity);
    }

    /// How long ago a session's last frame came. None: none came since it is live.
    pub fn unused_for(&self, profile: &Profile) -> Option<Duration> {
        Some(self.list.now().saturating_sub(profile.activity.used()?))
    }

    /// Brings a session that stands after frame `applied` back to the device, or leaves it where it
    /// is. Runs to its end even if nobody waits for it any more.
    pub async fn bring(
        self: Arc<Self>,
        profile: Arc<Profile>,
        away: Away,
        applied: u64,
    ) -> Result<Back, (Away, Error)> {
        let runtime = self.runtime.clone();
        let run = async move {
            match self.bring_from(&profile, &away, applied).await {
                Ok(back) => Ok(back),
                Err(error) => Err((away, error)),
            }
        };
        let lost = |_| Err((Away::Disk, Error::Gone { part: "residency" }));
        runtime.spawn(run).await.unwrap_or_else(lost)
    }

    async fn bring_from(
        &self,
        profile: &Arc<Profile>,
        away: &Away,
        applied: u64,
    ) -> Result<Back, Error> {
        // First the room: whoever waits for it holds no copy meanwhile.
        let reserved = self.reserve(&profile.settings).await?;
        let (state, answers) = match away {
            Away::Host(on) => (on.adapters.clone(), None),
            Away::Disk => {
                let Copied { adapters, resume } = self.read(profile.id, applied).await?;
                (adapters, Some(resume.answers))
            }
        };
        let start = Start::State { state, applied };
        let meter = profile.meter.clone();
        let plan = Plan { settings: profile.settings.clone(), start, reserved, meter };
        let on = self.settle_in(profile, self.engine.admit(plan).await?);
        tracing::debug!(session = %profile.id, bytes = on.admitted.bytes, "session is back");
        Ok(Back { on, answers })
    }

    /// Takes a quiet session one tier down, or leaves it where it is. Runs to its end even if nobody
    /// waits for it any more.
    pub async fn lower(
        self: Arc<Self>,
        profile: Arc<Profile>,
        home: Home,
        resume: Resume,
    ) -> Result<Away, (Home, Error)> {
        let runtime = self.runtime.clone();
        let run = async move {
            match self.copy_down(&profile, &home, resume).await {
                Ok(away) => Ok(self.leave(home, away).await),
                Err(error) => Err((home, error)),
            }
        };
        let gone = Error::Gone { part: "residency" };
        runtime.spawn(run).await.unwrap_or(Err((Home::Away(Away::Disk), gone)))
    }

    /// A copy in the next tier, and what is to be listed for it.
    async fn copy_down(
        &self,
        profile: &Arc<Profile>,
        home: &Home,
        resume: Resume,
    ) -> Result<Lowered, Error> {
        let _in_turn = profile.writes.in_turn().await;
        let adapters = match home {
            Home::Device(on) => {
                let bytes = on.admitted.bytes;
                match self.host.reserve(BytesKind::Adapters, bytes) {
                    Ok(reserved) => {
                        let adapters = Arc::new(on.engine.state().await?);
                        return Ok(Lowered::Host { adapters, reserved, profile: profile.clone() });
                    }
                    // So that the next one finds room there.
                    Err(shortage) => self.host.press(shortage),
                }
                if self.is_durable(profile.id, resume.applied).await? {
                    return Ok(Lowered::Disk);
                }
                Arc::new(on.engine.state().await?)
            }
            Home::Away(Away::Host(on)) => on.adapters.clone(),
            Home::Away(Away::Disk) => return Ok(Lowered::Disk),
        };
        if !self.is_durable(profile.id, resume.applied).await? {
            let (store, id) = (self.store.clone(), profile.id);
            let copied = Copied { adapters, resume };
            blocking(move || store.add_snapshot(id, copied.encode(Why::Left))).await?;
        }
        Ok(Lowered::Disk)
    }

    /// Ends the stay that there is, and begins the next one.
    async fn leave(&self, home: Home, lowered: Lowered) -> Away {
        if let Home::Device(OnDevice { engine, listed, .. }) = home {
            // Listed as long as its bytes are taken.
            engine.leave().await;
            drop(listed);
        }
        match lowered {
            Lowered::Host { adapters, reserved, profile } => {
                let bytes = reserved.bytes();
                let _listed = self.list.enter(&profile, Tier::Host, bytes);
                Away::Host(Box::new(OnHost { adapters, reserved, _listed }))
            }
            Lowered::Disk => Away::Disk,
        }
    }

    /// Whether the store's head is the session as it is after frame `applied`. Frames are applied
    /// once, so a number says it all.
    async fn is_durable(&self, id: SessionId, applied: u64) -> Result<bool, Error> {
        let store = self.store.clone();
        let record = blocking(move || store.record(id)).await?;
        let record = record.ok_or_else(|| Error::UnknownSession(id.to_string()))?;
        Ok(record.head().is_some_and(|head| head.sequence == applied))
    }

    /// The session as the store's head holds it, which is the point after frame `applied`; unless
    /// that was found damaged, now or by another, and the session has gone back to an earlier one.
    async fn read(&self, id: SessionId, applied: u64) -> Result<Copied, Error> {
        let (store, trunk) = (self.store.clone(), self.engine.trunk().clone());
        let unknown = move || Error::UnknownSession(id.to_string());
        blocking(move || {
            let record = store.record(id)?.ok_or_else(unknown)?;
            let head = record.head().ok_or_else(unknown)?;
            fits(id, &record, head, &trunk)?;
            let found = (head.sequence == applied).then(|| store.read(id, head));
            match found {
                Some(Ok(stored)) => Copied::decode(stored),
                None | Some(Err(Error::SnapshotDamaged { whole: Some(_), .. })) => {
                    let record = store.whole_head(id)?;
                    let head = record.head().ok_or_else(unknown)?;
                    let (snapshot, step) = (head.id.clone(), head.step);
                    Err(Error::SetBack { session: id, snapshot, step })
                }
                Some(Err(error)) => Err(error),
            }
        })
        .await
    }
}

/// A copy that is safe one tier down, before the one above is given up.
enum Lowered {
    Host { adapters: Arc<AdapterState>, reserved: Reservation, profile: Arc<Profile> },
    Disk,
}

#[cfg(test)]
mod tests;
