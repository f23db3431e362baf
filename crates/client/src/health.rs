//! gRPC's own health check: is the server there, and does it take work? It needs no token.

use crate::{ClientError, ClientOptions, address, status, tls_failure};
use std::time::{Duration, Instant};
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// What a server says of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It takes work.
    Serving,
    /// It is there and takes none: it drains, or loads its trunk again.
    NotServing,
    /// It knows no service of this name.
    Unknown,
}

/// Asks once, within `timeout`, how a service is; the empty name is the server as a whole. The token of
/// the options is not sent.
pub async fn health(
    endpoint: &str,
    options: &ClientOptions,
    service: &str,
    timeout: Duration,
) -> Result<Health, ClientError> {
    let options = ClientOptions { token: None, ..options.clone() };
    let address = address::to_endpoint(endpoint, &options)?;
    let uri = address.uri().clone();
    let mut client = HealthClient::new(address.connect_lazy());
    let request = Request::new(HealthCheckRequest { service: service.to_string() });
    let begun = Instant::now();
    let unreachable = |cause: String| ClientError::Unreachable {
        endpoint: endpoint.to_string(),
        waited: begun.elapsed(),
        attempts: 1,
        cause,
    };
    let asked = tokio::time::timeout(timeout, client.check(request)).await;
    match asked.map_err(|_| unreachable("it does not answer".into()))? {
        Ok(answer) => Ok(of_status(&answer.into_inner())),
        Err(status) if status.code() == Code::NotFound => Ok(Health::Unknown),
        Err(status) if status::is_transport(&status) => {
            let explained = tls_failure::explain(&status, &options);
            match explained.filter(|_| uri.scheme_str() == Some("https")) {
                Some(problem) => Err(ClientError::Tls { endpoint: endpoint.to_string(), problem }),
                None => Err(unreachable(status::text(&status))),
            }
        }
        Err(status) => Err(ClientError::refused("Health.Check", &status)),
    }
}

fn of_status(answer: &HealthCheckResponse) -> Health {
    match answer.status() {
        ServingStatus::Serving => Health::Serving,
        ServingStatus::NotServing => Health::NotServing,
        ServingStatus::ServiceUnknown | ServingStatus::Unknown => Health::Unknown,
    }
}
