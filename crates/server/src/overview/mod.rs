//! What happens on the server, over the last hour and now: a look at every live session every few
//! seconds, kept for whoever asks. Nothing that trains waits for it; counters are read as they stand.

mod rates;
mod ring;

pub use rates::Rates;

use crate::engine::EngineClient;
use crate::meter::Meter;
use crate::registry::Registry;
use crate::residency::Profile;
use crate::session::SessionId;
use crate::store::millis_of;
use offshoot_proto::v1;
use rates::{Point, Points};
use ring::{Done, Ring, Tick};
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// Between two samples.
const EVERY: Duration = Duration::from_secs(5);
/// An hour of them.
const N_SAMPLES: usize = 720;

/// The last hour of a server.
pub struct Hour {
    engine: EngineClient,
    begun: Instant,
    kept: Mutex<Kept>,
}

struct Kept {
    ring: Ring,
    sessions: HashMap<SessionId, Followed>,
    engine: Engine,
}

/// A session since it was first seen live.
struct Followed {
    tenant: Arc<str>,
    meter: Arc<Meter>,
    points: Points,
}

/// What the engine had done at one moment.
#[derive(Debug, Clone, Copy, Default)]
struct Engine {
    at: Duration,
    busy: Duration,
    n_batches: u64,
    n_batch_tokens: u64,
}

impl Hour {
    /// Looks from now on, as long as somebody has it.
    pub fn start(registry: &Arc<Registry>, engine: EngineClient) -> Arc<Hour> {
        let kept = Kept {
            ring: Ring::new(N_SAMPLES),
            sessions: HashMap::new(),
            engine: Engine::now(&engine, Duration::ZERO),
        };
        let hour = Arc::new(Hour { engine, begun: Instant::now(), kept: Mutex::new(kept) });
        tokio::spawn(look_now_and_then(Arc::downgrade(&hour), Arc::downgrade(registry)));
        hour
    }

    /// The samples after this moment, the oldest first: of everybody, or what is a tenant's own.
    pub fn samples(&self, since_millis: u64, tenant: Option<&str>) -> Vec<v1::Sample> {
        self.kept().ring.since(since_millis, tenant)
    }

    /// How fast these sessions go now.
    pub fn rates(&self, profiles: &[Arc<Profile>]) -> HashMap<SessionId, Rates> {
        let at = self.begun.elapsed();
        let kept = self.kept();
        let of = |profile: &Arc<Profile>| {
            let followed = kept.sessions.get(&profile.id)?;
            Some((profile.id, followed.points.rates(&point(&profile.meter, at))))
        };
        profiles.iter().filter_map(of).collect()
    }

    fn look(&self, registry: &Registry) {
        let (live, at) = (registry.all_live(), self.begun.elapsed());
        let n_attached = live.iter().filter(|p| p.glance.view().is_attached).count();
        let mut kept = self.kept();
        let tenants = kept.follow(&live, at);
        let done = |pick: fn(&Done) -> f64| tenants.iter().map(|(_, done)| pick(done)).sum();
        let now = self.engine.ledger().usage().now;
        let (before, engine) = (kept.engine, Engine::now(&self.engine, at));
        kept.engine = engine;
        let all = v1::Sample {
            at_millis: millis_of(SystemTime::now()),
            tokens_per_second: done(|done| done.tokens_per_second),
            steps_per_second: done(|done| done.steps_per_second),
            queued_jobs: n_queued(&self.engine),
            adapter_bytes: now.adapters,
            tape_bytes: now.tapes,
            cache_bytes: now.caches,
            workspace_bytes: now.workspace,
            sessions_attached: n_attached as u32,
            sessions_live: registry.residency().n_live() as u32,
            device_busy: engine.busy_since(&before),
            batch_tokens: engine.batch_tokens_since(&before),
        };
        kept.ring.push(Tick { all, tenants });
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Each use is whole even if another thread panicked.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn look_now_and_then(hour: Weak<Hour>, registry: Weak<Registry>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((hour, registry)) = hour.upgrade().zip(registry.upgrade()) else { return };
        hour.look(&registry);
    }
}

/// Frames of all sessions that wait for the device.
pub fn n_queued(engine: &EngineClient) -> u32 {
    let n: usize = engine.queue().owners.iter().map(|owner| owner.n_waiting).sum();
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn point(meter: &Meter, at: Duration) -> Point {
    let used = meter.snapshot();
    let (n_waits, waited) = meter.waits();
    let v1::Metering { tokens, steps, device_seconds, .. } = used;
    Point { at, tokens, steps, device_seconds, n_waits, waited }
}

impl Kept {
    /// Takes up a point of each session, also of those that have just ended. What each tenant did since
    /// the points before.
    fn follow(&mut self, live: &[Arc<Profile>], at: Duration) -> Vec<(Arc<str>, Done)> {
        let mut tenants: HashMap<Arc<str>, Done> = HashMap::new();
        for followed in self.sessions.values_mut() {
            let now = point(&followed.meter, at);
            let before = followed.points.last().copied().unwrap_or(now);
            followed.points.push(now);
            let seconds = at.saturating_sub(before.at).as_secs_f64();
            let (tokens, steps) =
                (now.tokens.saturating_sub(before.tokens), now.steps.saturating_sub(before.steps));
            if seconds > 0.0 && tokens + steps > 0 {
                let done = tenants.entry(followed.tenant.clone()).or_default();
                done.tokens_per_second += tokens as f64 / seconds;
                done.steps_per_second += steps as f64 / seconds;
            }
        }
        let mut before = std::mem::take(&mut self.sessions);
        for profile in live {
            let followed = before.remove(&profile.id);
            // Parked and back again meanwhile: another meter may count for it now.
            let same = followed.filter(|followed| Arc::ptr_eq(&followed.meter, &profile.meter));
            let followed = same.unwrap_or_else(|| Followed::new(profile, at));
            self.sessions.insert(profile.id, followed);
        }
        tenants.into_iter().collect()
    }
}

impl Followed {
    fn new(profile: &Profile, at: Duration) -> Followed {
        let mut points = Points::default();
        points.push(point(&profile.meter, at));
        let tenant = profile.settings.tenant.clone();
        Followed { tenant, meter: profile.meter.clone(), points }
    }
}

impl Engine {
    fn now(client: &EngineClient, at: Duration) -> Engine {
        let stats = client.stats();
        Engine {
            at,
            busy: Duration::from_nanos(stats.busy_nanos.load(Relaxed)),
            n_batches: stats.n_batches.load(Relaxed),
            n_batch_tokens: stats.n_batch_tokens.load(Relaxed),
        }
    }

    fn busy_since(&self, before: &Engine) -> f64 {
        let seconds = self.at.saturating_sub(before.at).as_secs_f64();
        let busy = self.busy.saturating_sub(before.busy).as_secs_f64();
        if seconds > 0.0 { (busy / seconds).min(1.0) } else { 0.0 }
    }

    fn batch_tokens_since(&self, before: &Engine) -> f64 {
        match self.n_batches.saturating_sub(before.n_batches) {
            0 => 0.0,
            n => self.n_batch_tokens.saturating_sub(before.n_batch_tokens) as f64 / n as f64,
        }
    }
}
