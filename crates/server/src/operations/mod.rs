//! What people and their tools see and do: the overview, lists, and what may be done to sessions without
//! training them. The same for gRPC, the console and whoever embeds a server.
//!
//! A caller finds what is his own, an operator everything; what is not there for him is answered as what
//! is not there at all. Errors are as they are: who sends them on hides from tenants what tells of
//! others.

mod grpc;
mod sessions;
mod tenants;

pub use grpc::{MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, OperationsGrpc};

use crate::access::{Action, Audit, Caller, Subject};
use crate::engine::EngineClient;
use crate::error::Error;
use crate::grpc::Deed;
use crate::grpc::views::{describe, describe_all};
use crate::metrics::Metrics;
use crate::overview::{Hour, n_queued};
use crate::registry::{ManagedSession, Registry, snapshot_info};
use crate::store::{SnapshotRecord, millis_of};
use crate::transport::Health;
use offshoot_proto::v1;
use std::sync::Arc;
use std::time::SystemTime;

/// See the module's text.
pub struct Operations {
    registry: Arc<Registry>,
    engine: EngineClient,
    audit: Audit,
    metrics: Arc<Metrics>,
    health: Health,
    build: crate::Build,
    hour: Arc<Hour>,
    started_millis: u64,
}

/// What it is made from.
pub struct OperationsParts {
    pub registry: Arc<Registry>,
    pub engine: EngineClient,
    pub audit: Audit,
    pub metrics: Arc<Metrics>,
    pub health: Health,
    pub build: crate::Build,
}

impl Operations {
    /// Takes samples from now on.
    pub fn start(parts: OperationsParts) -> Arc<Operations> {
        let OperationsParts { registry, engine, audit, metrics, health, build } = parts;
        let hour = Hour::start(&registry, engine.clone());
        let started_millis = millis_of(SystemTime::now());
        Arc::new(Operations {
            registry,
            engine,
            audit,
            metrics,
            health,
            build,
            hour,
            started_millis,
        })
    }

    /// Everything at a glance. Waits for nothing and nobody.
    pub fn overview(&self, caller: &Caller, samples_since_millis: u64) -> v1::OverviewResponse {
        let is_operator = caller.is_operator();
        let tenant = (!is_operator).then_some(caller.tenant.name.as_str());
        let (sessions, sessions_left_out) = self.sessions(caller);
        v1::OverviewResponse {
            now_millis: millis_of(SystemTime::now()),
            is_operator,
            server: Some(self.server(caller)),
            sessions,
            samples: self.hour.samples(samples_since_millis, tenant),
            refusals: self.registry.refusals().last_hour(tenant),
            sessions_left_out,
        }
    }

    fn server(&self, caller: &Caller) -> v1::ServerView {
        let (registry, engine) = (&self.registry, &self.engine);
        let trunk = match caller.is_operator() {
            true => describe_all(registry, engine, caller),
            false => describe(registry, engine, caller),
        };
        let of_all = caller.is_operator();
        v1::ServerView {
            version: self.build.version.into(),
            commit: self.build.commit.into(),
            started_millis: self.started_millis,
            trunk: Some(trunk),
            queued_jobs: if of_all { n_queued(engine) } else { 0 },
            device: if of_all { self.metrics.device() } else { None },
            health: self.health.state().name().into(),
        }
    }

    /// The snapshots of a session, newest first.
    pub async fn snapshots(
        &self,
        caller: &Caller,
        session: &str,
    ) -> Result<v1::ListSnapshotsResponse, Error> {
        let managed = self.managed(caller, session)?;
        let record = self.registry.stored(managed).await?;
        let view = |snapshot: &SnapshotRecord| v1::SnapshotView {
            info: Some(snapshot_info(snapshot)),
            taken_millis: snapshot.taken_millis,
            reason: snapshot.reason().into(),
            is_head: snapshot.id == record.head,
        };
        Ok(v1::ListSnapshotsResponse { snapshots: record.newest_first().map(view).collect() })
    }

    /// Takes a session off the device as soon as it has come to the end of what it began.
    pub async fn evict(
        &self,
        caller: &Caller,
        session: &str,
    ) -> Result<v1::EvictSessionResponse, Error> {
        let managed = self.managed(caller, session);
        let registry = self.registry.clone();
        let evict = async move { registry.evict(managed?).await };
        self.deed(caller, Action::Evict, session).run(evict, |(), _| {}).await?;
        Ok(v1::EvictSessionResponse {})
    }

    /// Keeps a session on the device, or lets it come and go again.
    pub async fn pin(
        &self,
        caller: &Caller,
        session: &str,
        pinned: bool,
    ) -> Result<v1::PinSessionResponse, Error> {
        let managed = self.managed(caller, session);
        let (registry, who) = (self.registry.clone(), caller.clone());
        let pin = async move {
            match pinned {
                true => registry.pin(managed?, &who).await,
                false => registry.unpin(managed?).await,
            }
        };
        let action = if pinned { Action::Pin } else { Action::Unpin };
        self.deed(caller, action, session).run(pin, |(), _| {}).await?;
        Ok(v1::PinSessionResponse {})
    }

    /// Ends a session and deletes it with all its snapshots.
    pub async fn delete_session(
        &self,
        caller: &Caller,
        session: &str,
    ) -> Result<v1::DeleteSessionResponse, Error> {
        let managed = self.managed(caller, session);
        let registry = self.registry.clone();
        let delete = async move { registry.forget(managed?).await };
        self.deed(caller, Action::Forget, session).run(delete, |(), _| {}).await?;
        Ok(v1::DeleteSessionResponse {})
    }

    /// Deletes one snapshot that the session does not go on from.
    pub async fn delete_snapshot(
        &self,
        caller: &Caller,
        session: &str,
        snapshot: &str,
    ) -> Result<v1::DeleteSnapshotResponse, Error> {
        let managed = self.managed(caller, session);
        let (registry, name) = (self.registry.clone(), snapshot.to_string());
        let delete = async move {
            let deleted = name.clone();
            registry.delete_snapshot(managed?, name).await.map(|()| deleted)
        };
        let named = |deleted: &String, subject: &mut Subject| {
            subject.snapshot = Some(deleted.clone());
        };
        self.deed(caller, Action::DeleteSnapshot, session).run(delete, named).await?;
        Ok(v1::DeleteSnapshotResponse {})
    }

    fn managed(&self, caller: &Caller, session: &str) -> Result<ManagedSession, Error> {
        self.registry.owners().check_managed(caller, session)
    }

    fn deed(&self, caller: &Caller, action: Action, session: &str) -> Deed {
        let mut subject = Subject::named(session);
        // An operator's deed says whose session it was done to.
        subject.owner = self
            .managed(caller, session)
            .ok()
            .and_then(|managed| self.registry.owners().of(managed.id()))
            .filter(|owner| **owner != *caller.tenant.name)
            .map(|owner| owner.to_string());
        Deed { caller: caller.clone(), audit: self.audit.clone(), action, subject }
    }
}
