//! Who gets in: tenants with their tokens and quotas, from a file that is read again whenever it
//! changes.
//!
//! Every call is authenticated before anything of it is decoded; behind that a call has a
//! [`Caller`], and a session knows its tenant by name. Without a tenants file there is one tenant
//! with an empty name, whom everybody is.

mod audit;
mod file;
mod gate;
mod patience;
mod refused;
mod settings;
mod tenant;
mod token;

pub(crate) use audit::{Action, Audit, Subject};
pub use file::{is_tenant_name, parse_tenants};
pub(crate) use gate::Keeper;
pub(crate) use refused::Stranger;
pub use settings::AccessConfig;
pub use tenant::{Quotas, Tenant};
pub use token::{NewToken, TokenHash};

use crate::error::Error;
use http::HeaderMap;
use patience::Patience;
use refused::Pending;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant, SystemTime};
use token::id_of_sent;
use tokio::sync::watch;

/// How often the tenants file is looked at. Its content is compared: Kubernetes swaps links, and
/// clocks of file systems are coarse.
const LOOK: Duration = Duration::from_secs(1);
/// A token's end is looked at again at least so often, so that a clock that is set counts.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Tokens that are remembered after they left the file.
const MAX_GONE: usize = 4096;

/// Who gets in. Shared; reloads by itself.
pub struct Access {
    /// None: the server is open.
    path: Option<PathBuf>,
    state: RwLock<Arc<State>>,
    /// The text that was read last, valid or not, so that a mistake is logged once.
    seen: Mutex<Seen>,
    audit: Audit,
    /// Calls without a valid token that the log has not told of.
    pending: Mutex<Pending>,
    /// Counts the states.
    changes: watch::Sender<u64>,
    patience: Patience,
}

#[derive(Default)]
struct State {
    tenants: HashMap<String, Arc<Tenant>>,
    tokens: HashMap<TokenHash, Known>,
    /// Taken out of the file since the start: whoever still sends one may have stolen it.
    gone: HashMap<TokenHash, Known>,
}

#[derive(Clone)]
struct Known {
    tenant: Arc<Tenant>,
    id: Arc<str>,
    expires: Option<SystemTime>,
}

#[derive(PartialEq)]
enum Seen {
    Text(String),
    /// It could not be read.
    Failed(String),
}

/// Who makes a call.
#[derive(Debug, Clone)]
pub struct Caller {
    pub tenant: Arc<Tenant>,
    /// Empty on an open server.
    pub token_id: Arc<str>,
    pub peer: Option<SocketAddr>,
    hash: Option<TokenHash>,
}

impl Caller {
    /// Whether it may see and manage everybody's sessions; on an open server everybody may.
    pub fn is_operator(&self) -> bool {
        self.tenant.is_operator
    }

    /// Whether it may manage every tenant's sessions. Not on an open server, where those that were made
    /// with a tenants file stay their tenants'.
    pub fn manages_all(&self) -> bool {
        self.is_operator() && !self.tenant.name.is_empty()
    }

    /// Somebody of this name.
    #[cfg(test)]
    pub fn of_test(name: &str, is_operator: bool) -> Caller {
        let tenant = Tenant { name: name.into(), is_operator, ..Tenant::anybody() };
        Caller { tenant: Arc::new(tenant), token_id: Arc::default(), peer: None, hash: None }
    }
}

impl Access {
    /// Reads the tenants file, which must be whole the first time. None: everybody gets in.
    pub(crate) fn start(path: Option<PathBuf>, audit: Audit) -> Result<Arc<Access>, Error> {
        let (state, seen) = match &path {
            Some(path) => {
                let text = read(path).map_err(|cause| file_error(path, cause))?;
                let state = State::parse(&text).map_err(|cause| file_error(path, cause))?;
                (state, Seen::Text(text))
            }
            None => (State::open(), Seen::Text(String::new())),
        };
        let access = Arc::new(Access {
            path,
            state: RwLock::new(Arc::new(state)),
            seen: Mutex::new(seen),
            audit,
            pending: Mutex::default(),
            changes: watch::Sender::new(0),
            patience: Patience::default(),
        });
        if access.path.is_some() {
            tokio::spawn(keep_up(Arc::downgrade(&access)));
        }
        Ok(access)
    }

    /// With whoever asks for what is refused, again and again.
    pub(crate) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Whether everybody gets in.
    pub fn is_open(&self) -> bool {
        self.path.is_none()
    }

    /// Who sends these headers. All refusals are the same, so that nobody learns which tokens there
    /// were.
    pub fn authenticate(
        &self,
        headers: &HeaderMap,
        peer: Option<SocketAddr>,
    ) -> Result<Caller, Error> {
        let state = self.state();
        if self.is_open() {
            let tenant = state.tenants.get("").ok_or(Error::Unauthenticated)?.clone();
            return Ok(Caller { tenant, token_id: Arc::default(), peer, hash: None });
        }
        let hash =
            sent_token(headers).and_then(TokenHash::of_sent).ok_or(Error::Unauthenticated)?;
        let known = state.valid(hash).ok_or(Error::Unauthenticated)?;
        let (tenant, token_id) = (known.tenant.clone(), known.id.clone());
        Ok(Caller { tenant, token_id, peer, hash: Some(hash) })
    }

    /// What is known of whoever sends headers that let nobody in.
    pub(crate) fn stranger(&self, headers: &HeaderMap, peer: Option<SocketAddr>) -> Stranger {
        let state = self.state();
        let sent = sent_token(headers);
        let hash = sent.and_then(TokenHash::of_sent);
        let known = hash.and_then(|hash| state.tokens.get(&hash).or_else(|| state.gone.get(&hash)));
        Stranger {
            peer,
            tenant: known.map(|known| known.tenant.name.clone()),
            token: sent.and_then(id_of_sent).map(str::to_string),
        }
    }

    /// Counts a call that was refused; the log has one line a minute.
    pub(crate) fn refused(&self, stranger: &Stranger) {
        self.pending().note(stranger);
        self.tell_refused();
    }

    fn tell_refused(&self) {
        let told = self.pending().take(Instant::now());
        if let Some(told) = told {
            told.log();
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All tenants as they are now, by name.
    pub fn tenants(&self) -> Vec<Arc<Tenant>> {
        let mut all: Vec<_> = self.state().tenants.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// A tenant as it is now.
    pub fn tenant(&self, name: &str) -> Option<Arc<Tenant>> {
        self.state().tenants.get(name).cloned()
    }

    /// Ends when the caller's token is not valid any more: it expired, or was taken out of the file.
    pub async fn ended(&self, caller: &Caller) {
        let Some(hash) = caller.hash else { return std::future::pending().await };
        let mut changes = self.changes.subscribe();
        loop {
            let left = match self.state().valid(hash) {
                // Given to somebody else meanwhile.
                Some(known) if known.tenant.name != caller.tenant.name => return,
                Some(Known { expires: Some(end), .. }) => {
                    end.duration_since(SystemTime::now()).unwrap_or_default()
                }
                Some(_) => LONGEST_SLEEP,
                None => return,
            };
            // A little later: timers and the clock do not agree to the millisecond.
            let sleep = (left + Duration::from_millis(1)).min(LONGEST_SLEEP);
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    /// Changes whenever another file has become valid.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// As [`Access::reload`], for somebody who wants an answer in the log in any case.
    pub(crate) fn reload_now(&self) {
        let Some(path) = self.path.as_deref() else {
            tracing::info!("there is no tenants file to read again: the server is open");
            return;
        };
        if self.reload().is_some() {
            return;
        }
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = match &*seen {
            Seen::Text(text) => parse_tenants(text).err(),
            Seen::Failed(cause) => Some(cause.clone()),
        };
        match broken {
            None => tracing::info!(path = %path.display(), "the tenants file is as it was"),
            Some(cause) => {
                let error = file_error(path, cause);
                tracing::error!(
                    "{error}; the file has not changed, and the tenants stay as they were"
                );
            }
        }
    }

    /// Reads the file again if it is another one. What is broken changes nothing and is logged once.
    /// Blocks. Gives back what is to be told, if there was anything new.
    pub fn reload(&self) -> Option<Result<usize, Error>> {
        let path = self.path.as_deref()?;
        // Held to the end: two that reload at once do it one after the other.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match read(path) {
            Ok(text) => Seen::Text(text),
            Err(cause) => Seen::Failed(cause),
        };
        if found == *seen {
            return None;
        }
        *seen = found;
        let parsed = match &*seen {
            Seen::Text(text) => State::parse(text),
            Seen::Failed(cause) => Err(cause.clone()),
        };
        let reloaded = match parsed {
            Ok(mut state) => {
                let n_tenants = state.tenants.len();
                let before = self.state();
                state.remember(&before);
                let changes = state.changes_since(&before);
                *self.state.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
                self.changes.send_modify(|n| *n += 1);
                let path = path.display();
                tracing::info!(%path, tenants = n_tenants, changes, "tenants file read");
                Ok(n_tenants)
            }
            Err(cause) => {
                let error = file_error(path, cause);
                tracing::error!("{error}; the tenants stay as they were");
                Err(error)
            }
        };
        self.audit.reloaded(&reloaded);
        Some(reloaded)
    }

    fn state(&self) -> Arc<State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Looks at the file now and then, as long as the access is in use.
async fn keep_up(access: Weak<Access>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(access) = access.upgrade() else { return };
        access.tell_refused();
        // Fails only when the runtime ends.
        let _ = tokio::task::spawn_blocking(move || drop(access.reload())).await;
    }
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            format!("{error}; `offshoot tenant add NAME --tenants {}` makes one", path.display())
        }
        _ => error.to_string(),
    })
}

fn file_error(path: &Path, cause: String) -> Error {
    Error::TenantsFile { path: path.to_path_buf(), cause }
}

/// The token that was sent: one header, with one scheme.
fn sent_token(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all("authorization").iter();
    let value = values.next().filter(|_| values.next().is_none())?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

impl State {
    fn open() -> State {
        let anybody = Arc::new(Tenant::anybody());
        State { tenants: HashMap::from([(String::new(), anybody)]), ..State::default() }
    }

    fn parse(text: &str) -> Result<State, String> {
        let mut state = State::default();
        for tenant in parse_tenants(text)? {
            let tenant = Arc::new(tenant);
            for token in &tenant.tokens {
                let (tenant, id) = (tenant.clone(), token.id.as_str().into());
                state.tokens.insert(token.hash, Known { tenant, id, expires: token.expires });
            }
            state.tenants.insert(tenant.name.clone(), tenant);
        }
        Ok(state)
    }

    /// Keeps which tokens the file had before and has no more.
    fn remember(&mut self, before: &State) {
        let known = before.gone.iter().chain(&before.tokens);
        let gone = known.filter(|(hash, _)| !self.tokens.contains_key(hash)).take(MAX_GONE);
        self.gone = gone.map(|(hash, known)| (*hash, known.clone())).collect();
    }

    /// Who came and went, and whose tokens, quotas or weights are others: in one line, for the log.
    fn changes_since(&self, before: &State) -> String {
        let mut changes: Vec<String> = Vec::new();
        for (name, tenant) in &self.tenants {
            match before.tenants.get(name) {
                None => changes.push(format!("{name} added")),
                Some(other) if other != tenant => changes.push(format!("{name} changed")),
                Some(_) => {}
            }
        }
        let gone = before.tenants.keys().filter(|&name| !self.tenants.contains_key(name));
        changes.extend(gone.map(|name| format!("{name} removed")));
        for (hash, Known { tenant, id, .. }) in &before.tokens {
            if !self.tokens.contains_key(hash) {
                changes.push(format!("{} lost token {id}", tenant.name));
            }
        }
        changes.sort();
        changes.join(", ")
    }

    fn valid(&self, hash: TokenHash) -> Option<&Known> {
        let known = self.tokens.get(&hash)?;
        let over = known.expires.is_some_and(|end| end <= SystemTime::now());
        (!over).then_some(known)
    }
}

#[cfg(test)]
mod tests;
