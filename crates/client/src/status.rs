//! What a gRPC status says about trying again.

use offshoot_proto::v1::{ErrorCode, QuotaViolation};
use std::error::Error;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The connection broke or could not be made; the server did not say this itself.
pub(crate) fn is_transport(status: &Status) -> bool {
    // tonic keeps the cause of what it made up itself; a status that came over the wire has none.
    status.source().is_some()
}

/// No connection could be made, so that nothing can have been sent.
pub(crate) fn is_unsent(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The server did nothing yet and asks to be called again after so long.
pub(crate) fn pushback(status: &Status) -> Option<Duration> {
    let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
    hint.or_else(|| {
        let millis =
            status.metadata().get("grpc-retry-pushback-ms")?.to_str().ok()?.parse().ok()?;
        Some(Duration::from_millis(millis))
    })
}

/// The server itself says that it, or the one behind it, is there again soon.
pub(crate) fn is_soon(status: &Status) -> bool {
    status.code() == Code::Unavailable && pushback(status).is_some()
}

/// The tenant's quota that this is refused for.
pub(crate) fn quota(status: &Status) -> Option<QuotaViolation> {
    let violation = status.get_details_quota_failure()?.violations.into_iter().next()?;
    let value = violation.quota_dimensions.get("value").and_then(|value| value.parse().ok());
    Some(QuotaViolation {
        quota: violation.quota_id,
        limit: violation.quota_value.try_into().unwrap_or_default(),
        value: value.unwrap_or_default(),
    })
}

/// What the server's log calls this refusal.
pub(crate) fn request_id(status: &Status) -> Option<Box<str>> {
    crate::error::named(status.get_details_request_info()?.request_id)
}

/// A quota that waiting does not help against.
pub(crate) fn is_final_quota(status: &Status) -> bool {
    pushback(status).is_none() && quota(status).is_some()
}

/// Trying again may help: the connection is broken, or the server is full, draining or starting.
pub(crate) fn is_passing(status: &Status) -> bool {
    if is_transport(status) {
        return true;
    }
    match status.code() {
        Code::Unavailable
        | Code::Unknown
        | Code::Internal
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Ok => true,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}

/// The reason in the protocol's own words.
pub(crate) fn error_code(code: Code) -> ErrorCode {
    match code {
        // What is asked for does not fit what is there: another model, another split, another point
        // in the session.
        Code::FailedPrecondition => ErrorCode::Invalid,
        Code::InvalidArgument | Code::OutOfRange | Code::AlreadyExists => ErrorCode::Invalid,
        Code::NotFound | Code::PermissionDenied => ErrorCode::NotFound,
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::ResourceExhausted => ErrorCode::Exhausted,
        Code::Unavailable => ErrorCode::Draining,
        Code::Aborted => ErrorCode::TakenOver,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss => ErrorCode::Internal,
    }
}

/// The status with its innermost cause, which is what tells people something.
pub(crate) fn text(status: &Status) -> String {
    match status.source().map(innermost) {
        Some(cause) if !status.message().contains(&cause) => {
            format!("{}: {cause}", status.message())
        }
        _ if status.message().is_empty() => status.code().description().to_string(),
        _ => status.message().to_string(),
    }
}

/// What an error goes back to.
pub(crate) fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(next) = innermost.source() {
        innermost = next;
    }
    innermost.to_string()
}
