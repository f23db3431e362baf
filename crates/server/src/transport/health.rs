//! Whether the server takes work: one state, told by gRPC's health service, by `/readyz` and to who
//! looks at the server.

use crate::grpc::TrunkGrpc;
use offshoot_proto::v1::trunk_service_server::TrunkServiceServer;
use std::sync::Arc;
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};

/// A service for who asks whether the process answers at all, such as a probe that would end it otherwise:
/// serving as long as it does, while it drains and while its engine starts again, too.
const LIVE: &str = "live";

/// Of the server as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Serving,
    /// The engine died, and the trunk is being loaded again.
    StartingAgain,
    /// The server ends: no state follows this one.
    Draining,
}

impl State {
    /// As people and programs read it.
    pub fn name(self) -> &'static str {
        match self {
            State::Serving => "serving",
            State::StartingAgain => "starting again",
            State::Draining => "draining",
        }
    }

    /// Why no work is taken; none: it is.
    pub fn reason(self) -> Option<&'static str> {
        match self {
            State::Serving => None,
            State::StartingAgain => Some(
                "the engine died and the trunk is being loaded again; sessions come back by themselves",
            ),
            State::Draining => {
                Some("the server ends: open microbatches finish, and every session is saved")
            }
        }
    }

    fn status(self) -> ServingStatus {
        match self {
            State::Serving => ServingStatus::Serving,
            State::StartingAgain | State::Draining => ServingStatus::NotServing,
        }
    }
}

/// Clones are the same.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    state: Arc<watch::Sender<State>>,
}

impl Health {
    /// Of a server that serves.
    pub async fn serving() -> Health {
        let health = Health {
            reporter: HealthReporter::new(),
            state: Arc::new(watch::Sender::new(State::Serving)),
        };
        health.report(State::Serving).await;
        health.reporter.set_service_status(LIVE, ServingStatus::Serving).await;
        health
    }

    /// From now on. What comes behind [`State::Draining`] changes nothing.
    pub async fn set(&self, state: State) {
        let change = |now: &mut State| {
            let changes = *now != State::Draining;
            if changes {
                *now = state;
            }
            changes
        };
        if self.state.send_if_modified(change) {
            self.report(state).await;
            // Somebody else may have set it meanwhile: the last word is the state's.
            self.report(self.state()).await;
        }
    }

    /// As it is now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// gRPC's own service of it.
    pub fn service(&self) -> HealthService {
        HealthService::from_health_reporter(self.reporter.clone())
    }

    /// The server as a whole, and its one service.
    async fn report(&self, state: State) {
        for name in ["", <TrunkServiceServer<TrunkGrpc> as NamedService>::NAME] {
            self.reporter.set_service_status(name, state.status()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_server::Health as _;

    async fn answer(health: &Health, service: &str) -> i32 {
        let request = HealthCheckRequest { service: service.into() };
        let answer = health.service().check(tonic::Request::new(request)).await;
        answer.expect("it knows the service").into_inner().status
    }

    #[tokio::test]
    async fn a_server_that_takes_no_work_lives_on() {
        let health = Health::serving().await;
        let (serving, not) = (ServingStatus::Serving as i32, ServingStatus::NotServing as i32);
        assert_eq!((answer(&health, "").await, answer(&health, LIVE).await), (serving, serving));
        for state in [State::StartingAgain, State::Draining] {
            health.set(state).await;
            assert_eq!((answer(&health, "").await, answer(&health, LIVE).await), (not, serving));
        }
    }

    #[tokio::test]
    async fn draining_is_the_last_state() {
        let health = Health::serving().await;
        assert_eq!((health.state(), health.state().reason()), (State::Serving, None));
        for state in [State::StartingAgain, State::Serving, State::Draining] {
            health.set(state).await;
            assert_eq!(health.state(), state);
        }
        health.set(State::Serving).await;
        assert_eq!(health.state(), State::Draining);
        assert!(health.state().reason().is_some());
    }
}
