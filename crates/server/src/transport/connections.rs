//! The connections that there are. When there are too many, the one that has been idle for longest
//! makes room: whoever has a call of the trunk service under way is never sent away for somebody new.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;
use tokio::time::Instant;

/// Within this a TLS handshake is over.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// Within this the first request comes.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
/// How often it is looked who is overdue.
const SWEEP: Duration = Duration::from_secs(1);

/// All connections of a server. Clones are the same.
#[derive(Clone)]
pub struct Connections(Arc<Shared>);

struct Shared {
    max: usize,
    /// Without a call for so long a connection is closed.
    idle: Duration,
    // Never held across an await; every use is short.
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    n_admitted: u64,
    places: HashMap<u64, Arc<State>>,
}

/// One connection's place. Dropping it gives the place back.
pub struct Place {
    id: u64,
    state: Arc<State>,
    shared: Arc<Shared>,
}

/// What is known of one connection.
pub struct State {
    kicked: AtomicBool,
    life: Mutex<Life>,
}

struct Life {
    /// Since the last call of the trunk service ended, or anything else began.
    since: Instant,
    /// Calls of the trunk service under way.
    n_calls: usize,
    /// Whether there was a request at all.
    known: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// A call of the trunk service that is under way.
pub struct Call(Arc<State>);

/// Who waits for the connection to end.
#[derive(Clone, Copy)]
pub enum Side {
    Reader,
    Writer,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connections {
    /// At most so many at a time, each closed after so long without a call, as long as clones are
    /// there.
    pub fn start(max: usize, idle: Duration) -> Self {
        let shared = Arc::new(Shared { max, idle, open: Mutex::default() });
        tokio::spawn(sweep(Arc::downgrade(&shared)));
        Connections(shared)
    }

    /// A place for a new connection; none, if all are busy.
    pub fn admit(&self) -> Option<Place> {
        let now = Instant::now();
        let mut open = lock(&self.0.open);
        if open.places.len() >= self.0.max {
            let idlest =
                open.places.iter().filter_map(|(&id, state)| Some((state.idle_since()?, id)));
            let (_, id) = idlest.min()?;
            // Its place is free at once: the task that holds it ends a moment later.
            open.places.remove(&id)?.kick();
        }
        open.n_admitted += 1;
        let (id, state) = (open.n_admitted, Arc::new(State::new(now)));
        open.places.insert(id, state.clone());
        Some(Place { id, state, shared: self.0.clone() })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.0.open).places.len()
    }

    /// Ends all of them.
    pub fn close_all(&self) {
        lock(&self.0.open).places.values().for_each(|state| state.kick());
    }
}

async fn sweep(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        for state in lock(&shared.open).places.values() {
            if state.is_overdue(now, shared.idle) {
                state.kick();
            }
        }
    }
}

impl Place {
    /// What its requests share.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.shared.open).places.remove(&self.id);
    }
}

impl State {
    fn new(now: Instant) -> Self {
        let life = Life { since: now, n_calls: 0, known: false, reader: None, writer: None };
        State { kicked: AtomicBool::new(false), life: Mutex::new(life) }
    }

    /// A request has come.
    pub fn touch(&self) {
        let mut life = lock(&self.life);
        life.known = true;
        life.since = Instant::now();
    }

    /// A call of the trunk service has come.
    pub fn call(self: &Arc<Self>) -> Call {
        self.touch();
        lock(&self.life).n_calls += 1;
        Call(self.clone())
    }

    /// Whether the connection is to end. If not, this waker hears of it.
    pub fn must_end(&self, side: Side, waker: &Waker) -> bool {
        // In this order, so that a kick between both is seen.
        let mut life = lock(&self.life);
        let waiting = match side {
            Side::Reader => &mut life.reader,
            Side::Writer => &mut life.writer,
        };
        match waiting {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        self.is_kicked()
    }

    /// Whether the connection is to end.
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::Acquire)
    }

    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        let wakers = {
            let mut life = lock(&self.life);
            [life.reader.take(), life.writer.take()]
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// None: it is busy.
    fn idle_since(&self) -> Option<Instant> {
        let life = lock(&self.life);
        (life.n_calls == 0).then_some(life.since)
    }

    fn is_overdue(&self, now: Instant, idle: Duration) -> bool {
        let life = lock(&self.life);
        let allowed = if life.known { idle } else { FIRST_REQUEST };
        life.n_calls == 0 && now.duration_since(life.since) >= allowed
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut life = lock(&self.0.life);
        life.n_calls -= 1;
        life.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(1800);

    #[tokio::test(start_paused = true)]
    async fn the_one_idle_for_longest_makes_room_and_a_busy_one_never() {
        let connections = Connections::start(2, IDLE);
        let first = connections.admit().unwrap();
        let call = first.state().call();
        tokio::time::advance(Duration::from_secs(1)).await;
        let second = connections.admit().unwrap();
        // The second is idle, the first is busy.
        let third = connections.admit().unwrap();
        assert!(second.state().is_kicked() && !first.state().is_kicked());
        assert_eq!(connections.len(), 2);
        drop(second);
        assert_eq!(connections.len(), 2);
        let other = third.state().call();
        assert!(connections.admit().is_none());
        drop(call);
        assert!(connections.admit().is_some());
        assert!(first.state().is_kicked() && !third.state().is_kicked());
        drop(other);
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_and_the_idle_are_closed_in_time() {
        let connections = Connections::start(9, IDLE);
        let [stranger, idle, busy] = [(); 3].map(|()| connections.admit().unwrap());
        drop(idle.state().call());
        let call = busy.state().call();
        let kicked = || [&stranger, &idle, &busy].map(|place| place.state().is_kicked());
        tokio::time::sleep(FIRST_REQUEST - SWEEP).await;
        assert_eq!(kicked(), [false; 3]);
        tokio::time::sleep(2 * SWEEP).await;
        assert_eq!(kicked(), [true, false, false]);
        tokio::time::sleep(IDLE).await;
        assert_eq!(kicked(), [true, true, false]);
        drop(call);
    }
}
