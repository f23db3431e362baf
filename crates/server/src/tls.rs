//! TLS from files, and mutual TLS if the clients' issuers are named. The files are read again when
//! they change; connections that there are go on with what they began with.

mod files;
mod refused;

pub use files::TlsError;

use crate::config::TlsConfig;
use crate::error::Error;
use files::{Identity, Offers, TlsFiles};
use refused::Handshakes;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often an end that is near is spoken of.
const REMIND: Duration = Duration::from_secs(24 * 3600);
/// Fewer days than this are a warning.
const NEAR_DAYS: i64 = 14;

/// What a server shows its clients, as the files have it now.
#[derive(Clone)]
pub struct Tls {
    shown: watch::Receiver<Arc<Offers>>,
    whom: Whom,
    handshakes: Arc<Mutex<Handshakes>>,
}

/// Who connects.
#[derive(Clone, Copy)]
enum Whom {
    /// By gRPC, with a certificate if mutual TLS is on.
    Clients,
    /// By HTTP, always without one: browsers, scrapers and probes rarely have any.
    Browsers,
}

impl Tls {
    /// Reads the files, and watches them until the last clone is dropped. None: TLS is off.
    pub async fn start(config: &TlsConfig) -> Result<Option<Tls>, Error> {
        let Some(files) = TlsFiles::of(config) else { return Ok(None) };
        let (files, identity, mark) = blocking(move || {
            let texts = files.read()?;
            let (identity, mark) = (files.identity(&texts)?, texts.mark());
            Ok((files, identity, mark))
        })
        .await?;
        tell_end(&identity, &files);
        tell_refusals(&identity, &files);
        if let Some(path) = &files.client_ca {
            let client_ca = path.display();
            tracing::info!(%client_ca, "every client must show a certificate of these issuers");
        }
        let (current, shown) = watch::channel(identity.offers.clone());
        tokio::spawn(follow(files, identity, Changes::since(mark), current));
        Ok(Some(Tls { shown, whom: Whom::Clients, handshakes: Arc::default() }))
    }

    /// For one handshake.
    pub fn acceptor(&self) -> TlsAcceptor {
        let offers = self.shown.borrow();
        TlsAcceptor::from(match self.whom {
            Whom::Clients => offers.grpc.clone(),
            Whom::Browsers => offers.http.clone(),
        })
    }

    /// The same certificate for HTTP/1, and for everybody.
    pub fn for_http(self) -> Tls {
        Tls { whom: Whom::Browsers, ..self }
    }

    /// One that failed: the log tells of it, now or with others.
    pub fn failed(&self, peer: SocketAddr, error: &io::Error) {
        tracing::debug!(%peer, %error, "TLS handshake failed");
        // Somebody who only connects, as probes do, is nothing to warn of.
        let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())
        else {
            return;
        };
        let mut handshakes = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n_handshakes) = handshakes.failed(Instant::now()) {
            tracing::warn!(n_handshakes, %peer, %error, "TLS handshakes failed; the last one so");
        }
    }
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, TlsError> + Send + 'static,
) -> Result<T, Error> {
    let read = tokio::task::spawn_blocking(read).await;
    Ok(read.map_err(|_| Error::Gone { part: "reader of TLS files" })??)
}

/// Until nobody wants it any more.
async fn follow(
    files: TlsFiles,
    mut identity: Identity,
    mut changes: Changes,
    current: watch::Sender<Arc<Offers>>,
) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = current.closed() => return,
        }
        if told.elapsed() >= REMIND {
            tell_end(&identity, &files);
            told = Instant::now();
        }
        let again = files.clone();
        // A file that cannot be read is a state of its own, with its error for a mark.
        let read = blocking(move || Ok(again.read())).await.unwrap_or(Err(TlsError::Gone));
        let mark = match &read {
            Ok(texts) => texts.mark(),
            Err(error) => *blake3::hash(error.to_string().as_bytes()).as_bytes(),
        };
        if !changes.settled(mark) {
            continue;
        }
        match read.and_then(|texts| files.identity(&texts)) {
            Ok(fresh) => {
                identity = fresh;
                current.send_replace(identity.offers.clone());
                tracing::info!("TLS files changed; new connections get the new certificate");
                tell_end(&identity, &files);
                tell_refusals(&identity, &files);
            }
            Err(error) => tracing::error!(
                %error,
                "TLS files changed and cannot be used; new connections get the certificate before"
            ),
        }
    }
}

/// Says when the certificate ends.
fn tell_end(identity: &Identity, files: &TlsFiles) {
    let (cert, days_left) = (files.cert.display(), identity.days_left(SystemTime::now()));
    match days_left {
        ..0 => {
            tracing::error!(%cert, days_left, "the TLS certificate has expired: clients refuse it")
        }
        0..NEAR_DAYS => tracing::warn!(%cert, days_left, "the TLS certificate expires soon"),
        _ => tracing::info!(%cert, days_left, "TLS is on"),
    }
}

/// Says why clients will not take the certificate, if that is so.
fn tell_refusals(identity: &Identity, files: &TlsFiles) {
    let cert = files.cert.display();
    for why in &identity.refused_for {
        tracing::warn!(%cert, "clients refuse the TLS certificate: {why} (docs/security.md has the command)");
    }
}

/// What the files held, by hash.
type Mark = [u8; 32];

/// When it is time to load again: the files hold something new, and the same at two looks, so that
/// nobody is told of a certificate whose key is just being written.
struct Changes {
    /// Loaded, or tried to.
    tried: Mark,
    seen: Mark,
}

impl Changes {
    fn since(mark: Mark) -> Self {
        Changes { tried: mark, seen: mark }
    }

    fn settled(&mut self, mark: Mark) -> bool {
        let again = std::mem::replace(&mut self.seen, mark) == mark;
        let fresh = again && mark != self.tried;
        if fresh {
            self.tried = mark;
        }
        fresh
    }
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;
