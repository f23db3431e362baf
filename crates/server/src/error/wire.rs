//! An error on its way to a client: as the answer to a frame, and as the status of a call.

use super::{Class, Error};
use crate::quota::Excess;
use crate::refusals::RequestId;
use offshoot_proto::v1::{self, ErrorCode};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

impl Error {
    /// The answer to a refused frame. `Refusals` makes it.
    pub fn to_frame(&self, sequence: u64, request: RequestId) -> v1::ServerFrame {
        let retry_after = self.retry_after().unwrap_or_default();
        let error = v1::FrameError {
            code: self.class().frame_code() as i32,
            message: self.to_string(),
            retry_after_millis: u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX),
            quota: self.excess().map(Excess::to_proto),
            request_id: request.to_string(),
        };
        v1::ServerFrame { sequence, body: Some(v1::server_frame::Body::Error(error)) }
    }

    /// The status of a refused call. `Refusals` makes it.
    pub fn to_status(&self, request: RequestId) -> tonic::Status {
        let (code, message) = (self.class().grpc_code(), self.to_string());
        let (mut details, mut metadata) = (ErrorDetails::new(), MetadataMap::new());
        details.set_request_info(request.to_string(), "");
        if let Some(excess) = self.excess() {
            details.set_quota_failure(vec![excess.to_violation()]);
        }
        if let Some(after) = self.retry_after() {
            details.set_retry_info(Some(after));
            // gRPC's own name for it.
            let value = MetadataValue::from(after.as_millis() as u64);
            metadata.insert("grpc-retry-pushback-ms", value);
        }
        tonic::Status::with_error_details_and_metadata(code, message, details, metadata)
    }
}

impl Class {
    fn frame_code(self) -> ErrorCode {
        match self {
            Class::Invalid | Class::Mismatch | Class::Precondition => ErrorCode::Invalid,
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

    pub(crate) fn grpc_code(self) -> tonic::Code {
        match self {
            Class::Invalid => tonic::Code::InvalidArgument,
            Class::Mismatch | Class::Sequence | Class::Microbatch | Class::Cache => {
                tonic::Code::FailedPrecondition
            }
            Class::Precondition => tonic::Code::FailedPrecondition,
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
