//! One tenant's metrics. The labels are made once, since every frame needs them.

use super::instruments::Instruments;
use crate::error::Error;
use opentelemetry::KeyValue;
use std::sync::Arc;
use std::time::Duration;

/// What a job was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    Forward,
    Evaluate,
    Extend,
    Backward,
    Step,
    /// What else touches the device: admission, copies.
    Control,
}

impl JobKind {
    const ALL: [JobKind; 6] = [
        JobKind::Forward,
        JobKind::Evaluate,
        JobKind::Extend,
        JobKind::Backward,
        JobKind::Step,
        JobKind::Control,
    ];

    fn name(self) -> &'static str {
        match self {
            JobKind::Forward => "forward",
            JobKind::Evaluate => "evaluate",
            JobKind::Extend => "extend",
            JobKind::Backward => "backward",
            JobKind::Step => "step",
            JobKind::Control => "control",
        }
    }

    /// Whether its tokens were new to the server.
    pub fn is_forward(self) -> bool {
        matches!(self, JobKind::Forward | JobKind::Evaluate | JobKind::Extend)
    }
}

/// A job that has run.
#[derive(Debug, Clone, Copy)]
pub struct Ran {
    pub kind: JobKind,
    /// 0 if it came to nothing.
    pub n_tokens: usize,
    pub queue: Duration,
    /// Of its whole batch.
    pub execute: Duration,
    /// Its own part of that.
    pub share: Duration,
}

/// Where the time between two Steps went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// Neither waiting for the device nor on it.
    pub wire: Duration,
    pub queue: Duration,
    pub execute: Duration,
}

/// Which way bytes go, as the server sees it.
#[derive(Debug, Clone, Copy)]
pub enum Direction {
    Receive,
    Transmit,
}

/// See the module's text.
#[derive(Debug)]
pub struct Series {
    instruments: Arc<Instruments>,
    tenant: [KeyValue; 1],
    kinds: [OfKind; 6],
    phases: [[KeyValue; 2]; 3],
    directions: [[KeyValue; 2]; 2],
}

#[derive(Debug)]
struct OfKind {
    kind: [KeyValue; 2],
    queue: [KeyValue; 3],
    execute: [KeyValue; 3],
}

/// Counts a stream until it is dropped.
#[derive(Debug)]
pub struct CountedStream(Arc<Series>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.instruments.streams.add(-1, &self.0.tenant);
    }
}

impl Series {
    pub(super) fn new(instruments: Arc<Instruments>, tenant: &Arc<str>) -> Self {
        let tenant = KeyValue::new("tenant", tenant.clone());
        let with =
            |key: &'static str, value: &'static str| [tenant.clone(), KeyValue::new(key, value)];
        let kinds = JobKind::ALL.map(|kind| {
            let kind = with("kind", kind.name());
            let phase = |phase: &'static str| {
                let [tenant, kind] = kind.clone();
                [tenant, kind, KeyValue::new("phase", phase)]
            };
            OfKind { queue: phase("queue"), execute: phase("execute"), kind: kind.clone() }
        });
        Series {
            instruments,
            kinds,
            phases: ["wire", "queue", "execute"].map(|phase| with("phase", phase)),
            directions: ["receive", "transmit"].map(|way| with("direction", way)),
            tenant: [tenant],
        }
    }

    /// A job has run.
    pub fn ran(&self, ran: Ran) {
        let Ran { kind, n_tokens, queue, execute, share } = ran;
        let (of, labels) = (&self.instruments, &self.kinds[kind as usize]);
        if n_tokens > 0 {
            of.tokens.add(n_tokens as u64, &labels.kind);
        }
        of.device_time.add(share.as_secs_f64(), &labels.kind);
        if kind != JobKind::Control {
            of.job_duration.record(queue.as_secs_f64(), &labels.queue);
            of.job_duration.record(execute.as_secs_f64(), &labels.execute);
        }
    }

    /// A Step was applied.
    pub fn stepped(&self, phases: Phases) {
        let Phases { wire, queue, execute } = phases;
        self.instruments.steps.add(1, &self.tenant);
        for (phase, labels) in [wire, queue, execute].into_iter().zip(&self.phases) {
            self.instruments.step_duration.record(phase.as_secs_f64(), labels);
        }
    }

    /// A frame or an answer.
    pub fn io(&self, direction: Direction, n_bytes: usize) {
        self.instruments.network_io.add(n_bytes as u64, &self.directions[direction as usize]);
    }

    /// A client is connected, until this is dropped.
    pub fn stream(self: &Arc<Self>) -> CountedStream {
        self.instruments.streams.add(1, &self.tenant);
        CountedStream(self.clone())
    }

    /// A snapshot was written in this time, or was not.
    pub fn snapshot(&self, lasted: Duration, written: Result<u64, &Error>) {
        match written {
            Ok(n_bytes) => {
                self.instruments.snapshot_duration.record(lasted.as_secs_f64(), &self.tenant);
                self.instruments.snapshot_written.add(n_bytes, &self.tenant);
            }
            Err(error) => {
                let [tenant] = self.tenant.clone();
                let labels = [tenant, KeyValue::new("label", error.label())];
                self.instruments.snapshot_failures.add(1, &labels);
            }
        }
    }

    /// A call or a frame was refused.
    pub fn refused(&self, label: &'static str) {
        let [tenant] = self.tenant.clone();
        self.instruments.errors.add(1, &[tenant, KeyValue::new("label", label)]);
    }
}
