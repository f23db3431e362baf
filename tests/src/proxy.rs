//! A TCP proxy that breaks, delays and repeats connections on purpose.

mod carry;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Passes bytes on to a server, until it is told to stop.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

struct Shared {
    upstream: Mutex<Option<SocketAddr>>,
    /// How many bytes, both ways together, each of the next connections may carry.
    plan: Mutex<VecDeque<i64>>,
    connections: AtomicUsize,
    /// How all connections that there are shall end.
    ends: watch::Sender<Ends>,
    /// What the server says is dropped.
    muted: AtomicBool,
    /// Nothing is passed on.
    held: watch::Sender<bool>,
    /// Bytes of clients that are held back.
    n_held: AtomicUsize,
    /// Counts up to send what the ends of stranded connections still have.
    deliveries: watch::Sender<u64>,
    n_stranded: AtomicUsize,
    n_late: AtomicUsize,
    /// What was, or will be, delivered late.
    late: Mutex<Vec<u8>>,
    /// What the server said to stranded connections.
    late_answers: Mutex<Vec<u8>>,
}

/// Counted up, so that a connection knows whether it is meant.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    cuts: u64,
    strandings: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with the lock")
}

impl Proxy {
    /// Listens on a free port of loopback.
    pub async fn start(upstream: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: Mutex::new(Some(upstream)),
            plan: Mutex::default(),
            connections: AtomicUsize::new(0),
            ends: watch::channel(Ends::default()).0,
            muted: AtomicBool::new(false),
            held: watch::channel(false).0,
            n_held: AtomicUsize::new(0),
            deliveries: watch::channel(0).0,
            n_stranded: AtomicUsize::new(0),
            n_late: AtomicUsize::new(0),
            late: Mutex::default(),
            late_answers: Mutex::default(),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Ok(Proxy { address, shared, accepting })
    }

    /// Where clients connect.
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Where new connections go; with nothing, they are closed at once.
    pub fn set_upstream(&self, upstream: Option<SocketAddr>) {
        *lock(&self.shared.upstream) = upstream;
    }

    /// The next connections end after so many bytes each, in the middle of whatever it is. The
    /// connection that there is goes on.
    pub fn cut_after(&self, bytes: impl IntoIterator<Item = i64>) {
        lock(&self.shared.plan).extend(bytes);
    }

    /// Ends all connections now.
    pub fn cut(&self) {
        self.shared.ends.send_modify(|ends| ends.cuts += 1);
    }

    /// From now on, what clients say arrives and what the server answers does not. A connection that
    /// has lost bytes stays mute.
    pub fn mute(&self, muted: bool) {
        self.shared.muted.store(muted, Ordering::SeqCst);
    }

    /// From now on nothing arrives, either way, until it is released; then all of it does, in order.
    pub fn hold(&self, held: bool) {
        self.shared.held.send_replace(held);
    }

    /// Bytes of clients that [`hold`](Proxy::hold) keeps back now.
    pub fn n_held(&self) -> usize {
        self.shared.n_held.load(Ordering::SeqCst)
    }

    /// Ends all connections for their clients only. The server's ends stay open, as those of a
    /// network that has bytes on a long way; [`deliver_late`](Proxy::deliver_late) lets what was held
    /// back arrive there.
    pub fn strand(&self) {
        self.shared.ends.send_modify(|ends| ends.strandings += 1);
    }

    /// Connections that were stranded so far.
    pub fn n_stranded(&self) -> usize {
        self.shared.n_stranded.load(Ordering::SeqCst)
    }

    /// The bytes of stranded connections arrive now.
    pub fn deliver_late(&self) {
        self.shared.deliveries.send_modify(|n| *n += 1);
    }

    /// Connections whose late bytes have been written to the server.
    pub fn n_late(&self) -> usize {
        self.shared.n_late.load(Ordering::SeqCst)
    }

    /// Takes what stranded connections have carried late since this was asked last, or still will.
    pub fn take_late(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.shared.late))
    }

    /// Whether these bytes are in what the server said to stranded connections.
    pub fn has_late_answer(&self, bytes: &[u8]) -> bool {
        lock(&self.shared.late_answers).windows(bytes.len()).any(|part| part == bytes)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Cuts that are planned and have not happened.
    pub fn cuts_left(&self) -> usize {
        lock(&self.shared.plan).len()
    }

    /// Forgets planned cuts.
    pub fn forget_plan(&self) {
        lock(&self.shared.plan).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let (ends, deliveries) = (shared.ends.subscribe(), shared.deliveries.subscribe());
        tokio::spawn(carry::carry(client, shared.clone(), ends, deliveries));
    }
}
