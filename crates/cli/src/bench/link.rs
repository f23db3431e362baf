//! A slow network between clients and server, in this process: a TCP proxy that carries every byte
//! late and no faster than a given rate.

use anyhow::Context;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// What one read carries at most. Small beside a frame, so that a frame's first bytes arrive while
/// its last ones leave.
const CHUNK: usize = 16 << 10;
/// Chunks on their way, 64 MiB: a long and fast way holds many.
const CHUNKS_IN_FLIGHT: usize = 4096;
/// What may wait to be sent: longer than a timer is late, so that the line is never idle while a
/// timer sleeps, and short beside what is measured.
const QUEUE: Duration = Duration::from_millis(10);

/// A network between two machines, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// One way.
    pub latency: Duration,
    /// None: no bound.
    pub bytes_per_second: Option<f64>,
}

/// One direction of a link: when bytes that come now are through. Reads no clock.
struct Direction {
    link: Link,
    /// When the last byte that was taken has left.
    free_at: Option<Instant>,
}

impl Direction {
    fn new(link: Link) -> Self {
        Direction { link, free_at: None }
    }

    /// Bytes leave one after the other, at the link's rate. Gives when the last of these has left.
    fn send(&mut self, now: Instant, n_bytes: usize) -> Instant {
        let begins = self.free_at.map_or(now, |free_at| free_at.max(now));
        let takes = self.link.bytes_per_second.map_or(0.0, |rate| n_bytes as f64 / rate);
        let left = begins + Duration::from_secs_f64(takes);
        self.free_at = Some(left);
        left
    }
}

/// A proxy that listens on loopback. Dropping it ends it, with all its connections.
pub struct Proxy {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Every connection gets a link of its own to `server`.
    pub async fn start(server: SocketAddr, link: Link) -> anyhow::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("the slow link's port")?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            // Dropped with this task, which ends the connections.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(connect(client, server, link));
            }
        });
        Ok(Proxy { address, task })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connect(client: TcpStream, server: SocketAddr, link: Link) {
    // Whoever is refused sees its connection closed.
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (up, down) = (carry(from_client, to_server, link), carry(from_server, to_client, link));
    // A connection that breaks is no news to the proxy: both ends see it.
    let _ = tokio::join!(up, down);
}

/// One direction, until its source ends or its sink is closed.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    link: Link,
) -> std::io::Result<()> {
    let (sender, mut on_the_way) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS_IN_FLIGHT);
    let take = async move {
        let mut direction = Direction::new(link);
        let mut buffer = vec![0; CHUNK];
        loop {
            let n_bytes = from.read(&mut buffer).await?;
            if n_bytes == 0 {
                return Ok(());
            }
            let left = direction.send(Instant::now(), n_bytes);
            if sender.send((left + link.latency, buffer[..n_bytes].to_vec())).await.is_err() {
                return Ok(());
            }
            // The sender's own buffers fill up behind a full queue, as on a real line.
            if left > Instant::now() + QUEUE {
                sleep_until(left - QUEUE).await;
            }
        }
    };
    let give = async move {
        while let Some((arrives, bytes)) = on_the_way.recv().await {
            sleep_until(arrives).await;
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(take, give).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    const MEGABYTE: usize = 1_000_000;

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i * i / 7 + i) as u8).collect()
    }

    /// Sends bytes over a link; gives when the first and the last of them arrived.
    async fn times(link: Link, n_bytes: usize) -> (Duration, Duration) {
        let (mut source, from) = duplex(CHUNK);
        let (to, mut sink) = duplex(CHUNK);
        let begun = Instant::now();
        let sent = bytes(n_bytes);
        let carried = tokio::spawn(carry(from, to, link));
        let payload = sent.clone();
        tokio::spawn(async move { source.write_all(&payload).await });
        let mut came = vec![sink.read_u8().await.unwrap()];
        let first = begun.elapsed();
        sink.read_to_end(&mut came).await.unwrap();
        let last = begun.elapsed();
        assert!(came == sent, "bytes changed on the way");
        carried.await.unwrap().unwrap();
        (first, last)
    }

    // tokio's clock stands still and jumps to the next timer when nothing else can run: the times
    // are exact, up to the timer's own millisecond.
    fn assert_about(found: Duration, milliseconds: u64) {
        let expected = Duration::from_millis(milliseconds);
        let fine = found >= expected && found <= expected + Duration::from_millis(2);
        assert!(fine, "{found:?}, expected {expected:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn latency_is_added_once_whatever_the_size() {
        let link = Link { latency: Duration::from_millis(50), bytes_per_second: None };
        let (first, last) = times(link, 3 * MEGABYTE).await;
        assert_about(first, 50);
        assert_about(last, 50);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_take_the_time_of_their_number() {
        // 100 Mbit/s.
        let link = Link { latency: Duration::ZERO, bytes_per_second: Some(12.5e6) };
        let (first, last) = times(link, MEGABYTE).await;
        assert_about(first, 1);
        assert_about(last, 80);
        let link = Link { latency: Duration::from_millis(20), ..link };
        let (first, last) = times(link, MEGABYTE).await;
        assert_about(first, 21);
        assert_about(last, 100);
        // A small one is not let through by a bucket that was full.
        assert_about(times(link, 12_500).await.1, 21);
    }

    #[test]
    fn a_line_that_was_idle_saves_nothing_up() {
        let link = Link { latency: Duration::ZERO, bytes_per_second: Some(1000.0) };
        let mut direction = Direction::new(link);
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(direction.send(begun, 1000), begun + second);
        assert_eq!(direction.send(begun, 2000), begun + 3 * second);
        assert_eq!(direction.send(begun + 9 * second, 500), begun + 9 * second + second / 2);
    }

    #[tokio::test]
    async fn connections_through_a_proxy_carry_both_directions_and_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let echo = tokio::spawn(async move {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
            }
        });
        let link = Link { latency: Duration::from_micros(100), bytes_per_second: Some(1e9) };
        let proxy = Proxy::start(server, link).await.unwrap();
        for n in [1, 2 * MEGABYTE] {
            let (mut read, mut write) =
                TcpStream::connect(proxy.address()).await.unwrap().into_split();
            let sent = bytes(n);
            let payload = sent.clone();
            let writing = tokio::spawn(async move {
                write.write_all(&payload).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut came = Vec::new();
            read.read_to_end(&mut came).await.unwrap();
            assert!(came == sent, "{} of {n} bytes came back, or others", came.len());
            writing.await.unwrap();
        }
        echo.await.unwrap();
    }
}
