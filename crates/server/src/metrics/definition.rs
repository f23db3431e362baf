//! Every metric once: its name, unit, kind, labels and what it means. Instruments are made from these, and
//! a test holds the table of docs/observability.md against them.

/// What its values are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Type {
    /// Only grows, until the server starts again.
    Counter,
    Gauge,
    /// Counted by these upper bounds.
    Histogram(&'static [f64]),
}

#[cfg(test)]
impl Type {
    /// As Prometheus says it.
    pub fn name(self) -> &'static str {
        match self {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram(_) => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// OpenTelemetry's name.
    pub name: &'static str,
    /// UCUM; annotations in braces say what is counted.
    pub unit: &'static str,
    pub kind: Type,
    pub labels: &'static [&'static str],
    pub about: &'static str,
}

#[cfg(test)]
impl Definition {
    /// The name on the Prometheus page, by OpenTelemetry's rules.
    pub fn prometheus_name(&self) -> String {
        let mut name = self.name.replace('.', "_");
        let suffix = match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            "Cel" => "_celsius",
            "W" => "_watts",
            "1" => "_ratio",
            _ => "",
        };
        name.push_str(suffix);
        if self.kind == Type::Counter {
            name.push_str("_total");
        }
        name
    }
}

/// From a quick frame on a GPU to a step that has waited for its turn.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// From one sequence's next token to the largest batch.
const TOKENS: &[f64] =
    &[1.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0];
const SESSIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0];

macro_rules! definitions {
    ($($constant:ident = $name:literal, $unit:literal, $kind:expr, [$($label:literal),*], $about:literal;)*) => {
        $(
            pub const $constant: Definition = Definition {
                name: $name, unit: $unit, kind: $kind, labels: &[$($label),*], about: $about,
            };
        )*
        /// All of them, in the order of the documentation.
        pub const ALL: &[&Definition] = &[$(&$constant),*];
    };
}

use Type::{Counter, Gauge, Histogram};

definitions! {
    STEP_DURATION = "offshoot.step.duration", "s", Histogram(SECONDS), ["tenant", "phase"],
        "From one applied Step of a session to the next: waiting for the device (queue), on it (execute), \
         and all else (wire): the network and the client's own layers. The three add up.";
    STEPS = "offshoot.steps", "{step}", Counter, ["tenant"], "Optimizer steps applied.";
    JOB_DURATION = "offshoot.job.duration", "s", Histogram(SECONDS), ["tenant", "kind", "phase"],
        "Of each frame that the device worked on: how long it waited (queue), and its batch ran (execute).";
    TOKENS_DONE = "offshoot.tokens", "{token}", Counter, ["tenant", "kind"],
        "Tokens through the trunk: forward, evaluate, extend, backward. Refused ones do not count.";
    DEVICE_TIME = "offshoot.device.time", "s", Counter, ["tenant", "kind"],
        "The device's time, each batch divided among its sessions by their rows.";
    NETWORK_IO = "offshoot.network.io", "By", Counter, ["tenant", "direction"],
        "Frames received and answers transmitted, as they are encoded, without TLS and HTTP/2.";
    BATCH_TOKENS = "offshoot.batch.tokens", "{token}", Histogram(TOKENS), ["kind"], "Tokens of a batch.";
    BATCH_SESSIONS = "offshoot.batch.sessions", "{session}", Histogram(SESSIONS), ["kind"],
        "Sessions that shared a batch.";
    ENGINE_BUSY = "offshoot.engine.busy.time", "s", Counter, [], "Time in which the engine worked.";
    ENGINE_TURN = "offshoot.engine.turn.duration", "s", Gauge, [],
        "How long what the engine is working on has been running; 0: it waits.";
    ENGINE_RESTARTS = "offshoot.engine.restarts", "{restart}", Counter, [],
        "Deaths of the engine after which it was started again, or was to be.";
    QUEUE_JOBS = "offshoot.queue.jobs", "{job}", Gauge, ["tenant"], "Frames that wait for the device.";
    QUEUE_LIMIT = "offshoot.queue.limit", "{job}", Gauge, [], "As many may wait: limits.max_queued_jobs.";
    QUEUE_AGE = "offshoot.queue.age", "s", Gauge, [], "How long the oldest of them waits.";
    VIRTUAL_TOKENS = "offshoot.queue.virtual.tokens", "{token}", Gauge, ["tenant"],
        "What a tenant has had of the device, over its weight: the lowest goes next, and who returns begins where \
         the others are. In tokens of a forward; those of a backward count one and a half.";
    MEMORY_USAGE = "offshoot.memory.usage", "By", Gauge, ["kind"],
        "Bytes of the device that are taken: weights, adapters, tapes, caches, workspace.";
    MEMORY_PEAK = "offshoot.memory.peak", "By", Gauge, [], "The most of all kinds together since the start.";
    MEMORY_BUDGET = "offshoot.memory.budget", "By", Gauge, [],
        "What they may take together; not there without a limit.";
    HOST_USAGE = "offshoot.host.memory.usage", "By", Gauge, [],
        "Bytes of the host's memory that sessions off the device take.";
    HOST_BUDGET = "offshoot.host.memory.budget", "By", Gauge, [], "What those may take.";
    PROCESS_MEMORY = "offshoot.process.memory", "By", Gauge, [], "Resident memory of the server's process.";
    TENANT_MEMORY = "offshoot.tenant.memory", "By", Gauge, ["tenant", "kind"],
        "A tenant's part of the device: adapters, and open (tapes and caches).";
    SESSIONS_BY_STATE = "offshoot.sessions", "{session}", Gauge, ["tenant", "state"],
        "Sessions with their adapters on the device, in host memory or on disk, and those that are parked.";
    SESSIONS_LIMIT = "offshoot.sessions.limit", "{session}", Gauge, [],
        "As many may be live, which is all but the parked: limits.max_live_sessions.";
    SESSIONS_WAITING = "offshoot.sessions.waiting", "{session}", Gauge, [],
        "Sessions that wait for room on the device.";
    STREAMS = "offshoot.streams", "{stream}", Gauge, ["tenant"], "Sessions whose client is connected.";
    MICROBATCHES = "offshoot.microbatches.open", "{microbatch}", Gauge, [],
        "Microbatches between their forward and backward.";
    CACHES = "offshoot.caches.open", "{cache}", Gauge, [], "Key/value caches on the device.";
    SNAPSHOT_DURATION = "offshoot.snapshot.duration", "s", Histogram(SECONDS), ["tenant"],
        "How long a snapshot took to be durable, from the copied tensors on.";
    SNAPSHOT_WRITTEN = "offshoot.snapshot.written", "By", Counter, ["tenant"], "Bytes of snapshots.";
    SNAPSHOT_FAILURES = "offshoot.snapshot.failures", "{snapshot}", Counter, ["tenant", "label"],
        "Snapshots that could not be written, by the error's label.";
    STORE_FREE = "offshoot.store.free", "By", Gauge, [], "Room on the store's disk for the server's user.";
    STORE_SIZE = "offshoot.store.size", "By", Gauge, [], "The store's disk.";
    ERRORS = "offshoot.errors", "{error}", Counter, ["tenant", "label"],
        "Refused calls and frames, by the error's label; the tenant is empty before somebody is known.";
    CONNECTIONS = "offshoot.connections", "{connection}", Gauge, [], "Connections of clients.";
    CONNECTIONS_LIMIT = "offshoot.connections.limit", "{connection}", Gauge, [],
        "As many may be open: limits.max_connections.";
    SERVING = "offshoot.serving", "{server}", Gauge, [],
        "1: the server takes frames. 0: it drains, or its engine is starting again.";
    DRAINING = "offshoot.draining", "{server}", Gauge, [], "1: the server is ending.";
    START_TIME = "offshoot.start.time", "s", Gauge, [], "When the server started, in Unix time.";
    BUILD_INFO = "offshoot.build.info", "{server}", Gauge, ["version", "commit", "model", "layers", "device", "dtype"],
        "Always 1; what runs is in the labels.";
    GPU_MEMORY_USAGE = "offshoot.gpu.memory.usage", "By", Gauge, ["gpu"],
        "Memory of the GPU in use by everybody, as its driver says.";
    GPU_MEMORY_LIMIT = "offshoot.gpu.memory.limit", "By", Gauge, ["gpu"], "Memory of the GPU.";
    GPU_UTILIZATION = "offshoot.gpu.utilization", "1", Gauge, ["gpu"],
        "Share of the last moments in which kernels ran on the GPU.";
    GPU_TEMPERATURE = "offshoot.gpu.temperature", "Cel", Gauge, ["gpu"], "Of the GPU.";
    GPU_POWER = "offshoot.gpu.power", "W", Gauge, ["gpu"], "What the GPU draws.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_say_whose_they_are() {
        let names: HashSet<_> = ALL.iter().map(|metric| metric.prometheus_name()).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(metric.name.starts_with("offshoot."), "{}", metric.name);
            assert!(metric.about.ends_with('.'), "{}: {}", metric.name, metric.about);
            assert!(!metric.labels.contains(&"session"), "{} has no bound", metric.name);
        }
    }
}
