use super::{Left, Used};
use crate::session::SessionId;
use serde::Serialize;
use std::ops::Range;
use std::time::{Duration, UNIX_EPOCH};

/// Whose line, and why it is written.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub why: Left,
    pub tenant: String,
    pub session: SessionId,
}

/// A line of the metering log: what one session used between two moments.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    why: Left,
    /// Empty on an open server.
    tenant: String,
    session: String,
    /// RFC 3339, UTC, to the millisecond; with the session it names the line.
    since: String,
    until: String,
    tokens: u64,
    device_seconds: f64,
    bytes_in: u64,
    bytes_out: u64,
    /// Since the session was opened.
    peak_bytes: u64,
    steps: u64,
}

impl Line {
    pub fn new(head: Head, period: Used, millis: Range<u64>) -> Line {
        let Head { why, tenant, session } = head;
        Line {
            why,
            tenant,
            session: session.to_string(),
            since: time(millis.start),
            until: time(millis.end),
            tokens: period.tokens,
            device_seconds: period.device_seconds(),
            bytes_in: period.bytes_in,
            bytes_out: period.bytes_out,
            peak_bytes: period.peak_bytes,
            steps: period.steps,
        }
    }
}

fn time(millis: u64) -> String {
    let moment = UNIX_EPOCH + Duration::from_millis(millis);
    humantime::format_rfc3339_millis(moment).to_string()
}
