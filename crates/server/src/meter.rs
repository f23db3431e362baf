//! What each session uses: tokens, the device's time, bytes, steps. Whoever does the work counts it here,
//! once, without locks; the same numbers go into the metrics of the session's tenant.
//!
//! A meter is there from the moment a session becomes live until it is parked or forgotten, whatever
//! happens to its actor and to the engine meanwhile. The store saves it with every record that it writes,
//! so that it goes on where it was after a restart.

mod line;
mod meters;

pub use meters::{Left, Meters, tell_hourly};

use crate::metrics::{Direction, Phases, Ran, Series};
use line::Line;
use offshoot_proto::v1;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What a session has used since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Used {
    /// Of forwards, evaluations and extends.
    pub tokens: u64,
    /// Its part, by rows, of the batches that it was in.
    pub device_nanos: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// The most that adapter, tapes and caches took together.
    pub peak_bytes: u64,
    pub steps: u64,
}

/// A meter as it lies in the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metered {
    pub used: Used,
    /// What of it is in the metering log.
    pub told: Used,
    /// From when on the rest was used: Unix milliseconds. 0: of a time before there were meters.
    pub since_millis: u64,
}

/// What a live session uses.
#[derive(Debug)]
pub struct Meter {
    tokens: AtomicU64,
    device_nanos: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    peak_bytes: AtomicU64,
    steps: AtomicU64,
    waits: AtomicU64,
    waited_nanos: AtomicU64,
    /// The bits of an f64; those of [`NO_LOSS`]: none was shared.
    shared_loss: AtomicU64,
    told: Mutex<Told>,
    /// Its tenant's metrics. None: nobody looks.
    series: Option<Arc<Series>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    used: Used,
    since_millis: u64,
}

/// No loss is this.
const NO_LOSS: u64 = u64::MAX;

impl Used {
    fn is_nothing(&self) -> bool {
        let Used { tokens, device_nanos, bytes_in, bytes_out, peak_bytes: _, steps } = *self;
        tokens + device_nanos + bytes_in + bytes_out + steps == 0
    }

    /// What came since; the peak is that of all the time.
    fn since(&self, before: &Used) -> Used {
        Used {
            tokens: self.tokens.saturating_sub(before.tokens),
            device_nanos: self.device_nanos.saturating_sub(before.device_nanos),
            bytes_in: self.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: self.bytes_out.saturating_sub(before.bytes_out),
            peak_bytes: self.peak_bytes,
            steps: self.steps.saturating_sub(before.steps),
        }
    }

    fn device_seconds(&self) -> f64 {
        Duration::from_nanos(self.device_nanos).as_secs_f64()
    }

    /// As clients see it.
    pub fn to_proto(self) -> v1::Metering {
        v1::Metering {
            tokens: self.tokens,
            device_seconds: self.device_seconds(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            peak_bytes: self.peak_bytes,
            steps: self.steps,
        }
    }
}

impl Default for Meter {
    /// A meter that nobody reads from outside.
    fn default() -> Self {
        Meter::new(None, Metered::default())
    }
}

impl Meter {
    /// Goes on from what was used before.
    pub fn new(series: Option<Arc<Series>>, before: Metered) -> Self {
        let Metered { used, told, since_millis } = before;
        let since_millis = if since_millis == 0 { now_millis() } else { since_millis };
        Meter {
            tokens: used.tokens.into(),
            device_nanos: used.device_nanos.into(),
            bytes_in: used.bytes_in.into(),
            bytes_out: used.bytes_out.into(),
            peak_bytes: used.peak_bytes.into(),
            steps: used.steps.into(),
            waits: AtomicU64::new(0),
            waited_nanos: AtomicU64::new(0),
            shared_loss: AtomicU64::new(NO_LOSS),
            told: Mutex::new(Told { used: told, since_millis }),
            series,
        }
    }

    /// A frame came, of so many bytes.
    pub fn received(&self, n_bytes: usize) {
        add(&self.bytes_in, n_bytes as u64);
        self.tell_series(|series| series.io(Direction::Receive, n_bytes));
    }

    /// An answer went, of so many bytes.
    pub fn sent(&self, n_bytes: usize) {
        add(&self.bytes_out, n_bytes as u64);
        self.tell_series(|series| series.io(Direction::Transmit, n_bytes));
    }

    /// A job has run.
    pub fn ran(&self, ran: Ran) {
        if ran.kind.is_forward() {
            add(&self.tokens, ran.n_tokens as u64);
        }
        add(&self.device_nanos, nanos(ran.share));
        add(&self.waits, 1);
        add(&self.waited_nanos, nanos(ran.queue));
        self.tell_series(|series| series.ran(ran));
    }

    /// A Step was applied, with the loss that its client shares, if it does.
    pub fn stepped(&self, phases: Phases, shared_loss: Option<f64>) {
        add(&self.steps, 1);
        if let Some(loss) = shared_loss {
            self.shared_loss.store(loss.to_bits(), Ordering::Relaxed);
        }
        self.tell_series(|series| series.stepped(phases));
    }

    /// Adapter, tapes and caches take so much together now.
    pub fn holds(&self, n_bytes: u64) {
        self.peak_bytes.fetch_max(n_bytes, Ordering::Relaxed);
    }

    /// What was used since the session was opened.
    pub fn used(&self) -> Used {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Used {
            tokens: of(&self.tokens),
            device_nanos: of(&self.device_nanos),
            bytes_in: of(&self.bytes_in),
            bytes_out: of(&self.bytes_out),
            peak_bytes: of(&self.peak_bytes),
            steps: of(&self.steps),
        }
    }

    /// The same as clients see it.
    pub fn snapshot(&self) -> v1::Metering {
        self.used().to_proto()
    }

    /// For the store.
    pub fn metered(&self) -> Metered {
        let told = *self.told();
        Metered { used: self.used(), told: told.used, since_millis: told.since_millis }
    }

    /// The loss of the last Step that came with one.
    pub fn shared_loss(&self) -> Option<f64> {
        let bits = self.shared_loss.load(Ordering::Relaxed);
        (bits != NO_LOSS).then(|| f64::from_bits(bits))
    }

    /// How many jobs have run since the session became live, and how long they waited together.
    pub fn waits(&self) -> (u64, Duration) {
        let waited = Duration::from_nanos(self.waited_nanos.load(Ordering::Relaxed));
        (self.waits.load(Ordering::Relaxed), waited)
    }

    /// Its tenant's metrics.
    pub fn series(&self) -> Option<&Arc<Series>> {
        self.series.as_ref()
    }

    /// Has what was used since the last time written down, and whether it is. One after the other, so
    /// that nothing is told twice.
    fn tell(&self, write: impl FnOnce(&Line) -> bool, head: line::Head) -> bool {
        let mut told = self.told();
        let (used, until_millis) = (self.used(), now_millis().max(told.since_millis));
        let period = used.since(&told.used);
        if head.why == Left::Running && period.is_nothing() {
            return false;
        }
        let written = write(&Line::new(head, period, told.since_millis..until_millis));
        if written {
            *told = Told { used, since_millis: until_millis };
        }
        written
    }

    fn tell_series(&self, tell: impl FnOnce(&Series)) {
        if let Some(series) = &self.series {
            tell(series);
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Each use is whole even if another thread panicked.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn add(to: &AtomicU64, n: u64) {
    to.fetch_add(n, Ordering::Relaxed);
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "meter/tests.rs"]
mod tests;
