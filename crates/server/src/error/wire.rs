//! An error on its way to a client: as the answer to a frame, and as the status of a call.

use super::{Class, Error};
use crate::quota::Excess;
use offshoot_proto::v1::{self, ErrorCode};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

impl Error {
    /// The answer to a refused frame.
    pub fn to_frame(&self, sequence: u64) -> v1::ServerFrame {
        let retry_after = self.retry_after().unwrap_or_default();
        let error = v1::FrameError {
            code: self.class().frame_code() as i32,
            message: self.to_string(),
            retry_after_millis: u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX),
            quota: self.excess().map(Excess::to_proto),
        };
        v1::ServerFrame { sequence, body: Some(v1::server_frame::Body::Error(error)) }
    }
}

impl Class {
    fn frame_code(self) -> ErrorCode {
        match self {
            Class::Invalid | Class::Mismatch => ErrorCode::Invalid,
            Class::Sequence => ErrorCode::Sequence,
            Class::Microbatch => ErrorCode::Microbatch,
            Class::Cache => ErrorCode::Cache,
            Class::Exhausted => ErrorCode::Exhausted,
            Class::Draining => ErrorCode::Draining,
            Class::NotFound => ErrorCode::NotFound,
            Class::TakenOver => ErrorCode::TakenOver,
            Class::Unauthenticated => ErrorCode::Unauthenticated,
            Class::Internal | Class::DataLoss => ErrorCode::Internal,
        }
    }

    fn grpc_code(self) -> tonic::Code {
        match self {
            Class::Invalid => tonic::Code::InvalidArgument,
            Class::Mismatch | Class::Sequence | Class::Microbatch | Class::Cache => {
                tonic::Code::FailedPrecondition
            }
            Class::Exhausted => tonic::Code::ResourceExhausted,
            Class::Draining => tonic::Code::Unavailable,
            Class::NotFound => tonic::Code::NotFound,
            Class::TakenOver => tonic::Code::Aborted,
            Class::Unauthenticated => tonic::Code::Unauthenticated,
            Class::DataLoss => tonic::Code::DataLoss,
            Class::Internal => tonic::Code::Internal,
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let (code, message) = (error.class().grpc_code(), error.to_string());
        if error.excess().is_none() && error.retry_after().is_none() {
            // Details without anything in them are not none on the wire.
            return tonic::Status::new(code, message);
        }
        let (mut details, mut metadata) = (ErrorDetails::new(), MetadataMap::new());
        if let Some(excess) = error.excess() {
            details.set_quota_failure(vec![excess.to_violation()]);
        }
        if let Some(after) = error.retry_after() {
            details.set_retry_info(Some(after));
            // gRPC's own name for it.
            let value = MetadataValue::from(after.as_millis() as u64);
            metadata.insert("grpc-retry-pushback-ms", value);
        }
        tonic::Status::with_error_details_and_metadata(code, message, details, metadata)
    }
}
