use super::{Ends, Shared, lock};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

/// One direction of a connection.
struct Way {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    /// Read and not written.
    pending: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum Speaker {
    Client,
    Server,
}

/// Carries one connection to its end.
pub(super) async fn carry(
    client: TcpStream,
    shared: Arc<Shared>,
    mut ends: watch::Receiver<Ends>,
    deliveries: watch::Receiver<u64>,
) {
    let Some(upstream) = *lock(&shared.upstream) else { return };
    let before = *ends.borrow();
    let budget = AtomicI64::new(lock(&shared.plan).pop_front().unwrap_or(i64::MAX));
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut up = Way { from: from_client, to: to_server, pending: Vec::new() };
    let mut down = Way { from: from_server, to: to_client, pending: Vec::new() };
    // Whichever ends first takes the other with it, and all four halves are closed.
    tokio::select! {
        () = up.pass(&shared, Speaker::Client, &budget) => {}
        () = down.pass(&shared, Speaker::Server, &budget) => {}
        _ = ends.changed() => {}
    }
    let now = *ends.borrow();
    if now.strandings > before.strandings && now.cuts == before.cuts {
        strand(up, down, &shared, ends, deliveries).await;
    }
}

/// Closes the client's end; the server's gets what is pending when it is told to.
async fn strand(
    up: Way,
    down: Way,
    shared: &Shared,
    mut ends: watch::Receiver<Ends>,
    mut deliveries: watch::Receiver<u64>,
) {
    let Way { from: from_client, to: mut to_server, mut pending } = up;
    let Way { from: mut from_server, to: to_client, .. } = down;
    // What has come meanwhile; it never waits.
    while let Ok(1..) = from_client.try_read_buf(&mut pending) {}
    drop((from_client, to_client));
    lock(&shared.late).extend(&pending);
    // Those before were for others.
    deliveries.mark_unchanged();
    let before = *ends.borrow_and_update();
    shared.n_stranded.fetch_add(1, Ordering::SeqCst);
    let late = async {
        let _ = deliveries.changed().await;
        let _ = to_server.write_all(&pending).await;
        shared.n_late.fetch_add(1, Ordering::SeqCst);
        // The server decides when it has enough.
        std::future::pending::<()>().await;
    };
    // What the server says is noted, and nobody gets it.
    let answers = async {
        let mut part = Vec::new();
        while let Ok(1..) = from_server.read_buf(&mut part).await {
            lock(&shared.late_answers).append(&mut part);
        }
    };
    tokio::select! {
        () = late => {}
        () = answers => {}
        _ = ends.wait_for(|ends| ends.cuts > before.cuts) => {}
    }
}

impl Way {
    async fn pass(&mut self, shared: &Shared, speaker: Speaker, budget: &AtomicI64) {
        let mut held = shared.held.subscribe();
        let (mut is_last, mut has_lost) = (false, false);
        loop {
            if self.pending.is_empty() {
                if is_last {
                    return;
                }
                self.pending.reserve(16 << 10);
                let Ok(read @ 1..) = self.from.read_buf(&mut self.pending).await else { return };
                let left = budget.fetch_sub(read as i64, Ordering::SeqCst).max(0);
                let part = read.min(usize::try_from(left).unwrap_or(usize::MAX));
                self.pending.truncate(part);
                is_last = part < read;
            }
            // What follows lost bytes would be nonsense.
            has_lost |= speaker == Speaker::Server && shared.muted.load(Ordering::SeqCst);
            if has_lost {
                self.pending.clear();
                continue;
            }
            if *held.borrow() {
                let of_client = speaker == Speaker::Client;
                let mut counted =
                    of_client.then(|| Counted::new(&shared.n_held, self.pending.len()));
                while *held.borrow_and_update() {
                    self.pending.reserve(16 << 10);
                    tokio::select! {
                        _ = held.changed() => {}
                        // What its speaker goes on to say; its windows bound it.
                        read = self.from.read_buf(&mut self.pending) => {
                            let Ok(read @ 1..) = read else { return };
                            counted.iter_mut().for_each(|counted| counted.add(read));
                        }
                    }
                }
            }
            // Bytes that are not written stay pending if this is given up.
            let Ok(written @ 1..) = self.to.write(&self.pending).await else { return };
            self.pending.drain(..written);
        }
    }
}

/// Bytes that wait, as long as they do.
struct Counted<'a> {
    sum: &'a AtomicUsize,
    n: usize,
}

impl<'a> Counted<'a> {
    fn new(sum: &'a AtomicUsize, n: usize) -> Self {
        sum.fetch_add(n, Ordering::SeqCst);
        Counted { sum, n }
    }

    fn add(&mut self, n: usize) {
        self.sum.fetch_add(n, Ordering::SeqCst);
        self.n += n;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.sum.fetch_sub(self.n, Ordering::SeqCst);
    }
}
