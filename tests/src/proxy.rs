//! A TCP proxy that breaks connections on purpose.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
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
    /// Counts up to end all connections that there are.
    cuts: watch::Sender<u64>,
    /// What the server says is dropped.
    muted: AtomicBool,
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
            cuts: watch::channel(0).0,
            muted: AtomicBool::new(false),
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
        self.shared.cuts.send_modify(|n| *n += 1);
    }

    /// From now on, what clients say arrives and what the server answers does not. A connection that
    /// has lost bytes must be [`cut`](Proxy::cut) before the proxy is loud again.
    pub fn mute(&self, muted: bool) {
        self.shared.muted.store(muted, Ordering::SeqCst);
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Cuts that are planned and have not happened.
    pub fn cuts_left(&self) -> usize {
        lock(&self.shared.plan).len()
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
        let cuts = shared.cuts.subscribe();
        tokio::spawn(carry(client, shared.clone(), cuts));
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>, mut cuts: watch::Receiver<u64>) {
    let Some(upstream) = *lock(&shared.upstream) else { return };
    let budget = AtomicI64::new(lock(&shared.plan).pop_front().unwrap_or(i64::MAX));
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let never = AtomicBool::new(false);
    // Whichever ends first takes the other with it, and all four halves are closed.
    tokio::select! {
        () = pass(from_client, to_server, &budget, &never) => {}
        () = pass(from_server, to_client, &budget, &shared.muted) => {}
        _ = cuts.changed() => {}
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    budget: &AtomicI64,
    muted: &AtomicBool,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        if muted.load(Ordering::SeqCst) {
            continue;
        }
        let left = budget.fetch_sub(read as i64, Ordering::SeqCst).max(0);
        let part = read.min(usize::try_from(left).unwrap_or(usize::MAX));
        if to.write_all(&buffer[..part]).await.is_err() || part < read {
            return;
        }
    }
}
