use super::connections::{Connections, HANDSHAKE, Place};
use super::io::{Held, Io};
use crate::tls::Tls;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Connections that are ready and not taken yet.
const READY: usize = 64;
/// For a peer to read why its handshake failed.
const LAST_WORD: Duration = Duration::from_secs(1);
/// After an error of the system, such as too many open files, it is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// Connections that are ready for HTTP/2. Handshakes run beside each other, so that nobody waits for
/// a peer that is slow or silent. The listener is closed when the stream is dropped.
pub fn incoming(
    listener: TcpListener,
    tls: Option<Tls>,
    connections: Connections,
) -> ReceiverStream<io::Result<Io>> {
    let (ready, stream) = mpsc::channel(READY);
    tokio::spawn(accept(listener, tls, connections, ready));
    ReceiverStream::new(stream)
}

async fn accept(
    listener: TcpListener,
    tls: Option<Tls>,
    connections: Connections,
    ready: mpsc::Sender<io::Result<Io>>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (tcp, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(place) = connections.admit() else {
            tracing::debug!(%remote, "limits.max_connections are busy; another one is closed");
            continue;
        };
        match &tls {
            Some(tls) => {
                tokio::spawn(shake_hands(tls.clone(), tcp, (remote, place), ready.clone()));
            }
            None => send(&ready, Io::Plain(held(tcp, remote, place))).await,
        }
    }
}

async fn shake_hands(
    tls: Tls,
    tcp: TcpStream,
    (remote, place): (SocketAddr, Place),
    ready: mpsc::Sender<io::Result<Io>>,
) {
    let handshake = tls.acceptor().accept(held(tcp, remote, place)).into_fallible();
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => send(&ready, Io::Tls(Box::new(stream))).await,
        Ok(Err((error, held))) => {
            tls.failed(remote, &error);
            let _ = tokio::time::timeout(LAST_WORD, let_read(held)).await;
        }
        Err(_) => tracing::debug!(%remote, "TLS handshake took too long"),
    }
}

/// The peer was told what was wrong. It may have sent more meanwhile, and closing a connection with
/// something unread would take the word back.
async fn let_read(mut held: Held) {
    if held.shutdown().await.is_ok() {
        let mut rest = [0; 1024];
        while matches!(held.read(&mut rest).await, Ok(1..)) {}
    }
}

fn held(tcp: TcpStream, remote: SocketAddr, place: Place) -> Held {
    // Frames wait for no company. A connection that is gone shows at its first read.
    let _ = tcp.set_nodelay(true);
    Held::new(tcp, remote, place)
}

async fn send(ready: &mpsc::Sender<io::Result<Io>>, io: Io) {
    // The server ends.
    let _ = ready.send(Ok(io)).await;
}
