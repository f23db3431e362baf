//! What a server tells of itself and of its sessions, as [`Client::overview`](crate::Client::overview) and
//! its neighbours give it. Each field is described in `proto/offshoot/v1/operations.proto`; all of these
//! can be serialized.

pub use offshoot_proto::v1::{
    DescribeResponse as TrunkView, DeviceView, Metering, OverviewResponse as Overview, QuotaView,
    Refusal, Sample, ServerView, SessionInfo as SessionSummary, SessionView, SnapshotView,
    TenantView, TokenView,
};
