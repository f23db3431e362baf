use super::args::{BenchArgs, End, Mode, Variety};
use super::memory::MemorySeen;
use super::numbers::{jain_index, percentile};
use super::session::Measured;
use offshoot_client::{FrameReport, MemoryReport, ServerDescription};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// A finished measurement.
pub struct Report<'a> {
    pub args: &'a BenchArgs,
    pub server: ServerDescription,
    /// Of each busy session, in the order of [`BenchArgs::sizes`].
    pub sessions: Vec<Measured>,
    pub memory: MemorySeen,
}

/// A part of the time of a frame.
type Part = (&'static str, fn(&FrameReport) -> Duration);

const PARTS: [Part; 4] = [
    ("round_trip", |report| report.round_trip),
    ("wire", FrameReport::wire),
    ("queue", |report| report.queue),
    ("execute", |report| report.execute),
];

const MB: f64 = 1e6;

impl Report<'_> {
    fn n_tokens(&self, i: usize) -> u64 {
        self.args.sizes()[i].n_tokens() * self.sessions[i].n_microbatches
    }

    /// Of each session, over its own time.
    fn speeds(&self) -> Vec<f64> {
        let speed = |(i, session): (usize, &Measured)| self.n_tokens(i) as f64 / session.seconds;
        self.sessions.iter().enumerate().map(speed).collect()
    }

    /// Until the last session was done.
    fn seconds(&self) -> f64 {
        self.sessions.iter().map(|session| session.seconds).fold(0.0, f64::max)
    }

    fn tokens_per_second(&self) -> f64 {
        let n_tokens: u64 = (0..self.sessions.len()).map(|i| self.n_tokens(i)).sum();
        n_tokens as f64 / self.seconds()
    }

    /// Sessions with microbatches of one size, by name.
    fn groups(&self) -> Vec<(&'static str, &[Measured])> {
        match self.sessions.split_last() {
            Some((heavy, others)) if self.args.load.heavy.is_some() => {
                vec![("others", others), ("heavy", std::slice::from_ref(heavy))]
            }
            _ => vec![("all", &self.sessions)],
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        self.write_setting(out)?;
        let speeds = self.speeds();
        let sum = |count: fn(&Measured) -> u64| self.sessions.iter().map(count).sum::<u64>();
        let n_microbatches = sum(|session| session.n_microbatches);
        write!(out, "\n{:.1} tokens/s in all: ", self.tokens_per_second())?;
        writeln!(out, "{n_microbatches} microbatches in {:.2} s", self.seconds())?;
        let by_session: Vec<String> = speeds.iter().map(|speed| format!("{speed:.1}")).collect();
        writeln!(out, "tokens/s by session: {}", by_session.join(", "))?;
        writeln!(out, "Jain's fairness index: {:.4}", jain_index(&speeds))?;
        let n_retries = sum(Measured::n_retries);
        if n_retries > 0 {
            writeln!(out, "the server was too full for a frame {n_retries} times")?;
        }
        self.write_latencies(out)?;
        self.write_memory(out)
    }

    fn write_setting(&self, out: &mut String) -> std::fmt::Result {
        let (args, server) = (self.args, &self.server);
        let load = &args.load;
        let what = match load.mode {
            Mode::Train => format!("training, {} microbatches a step", args.accumulate()),
            Mode::Eval => "forward in evaluation mode".into(),
        };
        let sizes = args.sizes();
        write!(out, "{} sessions of {} tokens", load.sessions, sizes[0])?;
        if let (Some(heavy), Some(_)) = (sizes.last(), load.heavy) {
            write!(out, ", one of {heavy}")?;
        }
        writeln!(out, ", {} idle: {what}, {} in flight", load.idle_sessions, load.in_flight)?;
        let variety = match args.adapter.adapters {
            Variety::Alike => "alike",
            Variety::Different => "different",
        };
        write!(out, "rank {}, adapters {variety}", args.adapter.rank)?;
        write!(out, "; {} on the wire, ", args.wire.wire_dtype.name())?;
        match args.wire.bandwidth_mbit {
            Some(mbit) => write!(out, "{mbit} Mbit/s, ")?,
            None => write!(out, "unbounded, ")?,
        }
        writeln!(out, "{} ms each way", args.wire.latency_ms)?;
        let (s1, s2, n) = (server.split_point_1, server.split_point_2, server.n_layers);
        let place = match args.server.server {
            Some(_) => "in its own process",
            None => "in this process: it shares cores and memory with the clients",
        };
        let (name, dtype, device) = (&server.model_name, &server.compute_dtype, &server.device);
        writeln!(out, "server: {name}, layers {s1}..{s2} of {n}, {dtype} on {device}, {place}")
    }

    fn write_latencies(&self, out: &mut String) -> std::fmt::Result {
        let header: Vec<String> =
            PARTS.iter().map(|(name, _)| format!("{:>19}", name.replace('_', " "))).collect();
        writeln!(out, "\n{:23}{}{:>12}", "ms: p50 / p99", header.concat(), "mean batch")?;
        for (group, sessions) in self.groups() {
            for (kind, frames) in kinds(sessions) {
                if frames.is_empty() {
                    continue;
                }
                let label = if group == "all" { kind.into() } else { format!("{kind}, {group}") };
                let cells = PARTS.map(|part| {
                    let [p50, p99] = percentiles(&frames, part);
                    format!(
                        "{:>19}",
                        format!("{:.2} / {:.2}", milliseconds(p50), milliseconds(p99))
                    )
                });
                let batch = mean_batch_jobs(&frames);
                writeln!(out, "{label:23}{}{batch:>12.2}", cells.concat())?;
            }
        }
        Ok(())
    }

    fn write_memory(&self, out: &mut String) -> std::fmt::Result {
        let MemorySeen { peak, begin, n_readings } = &self.memory;
        let columns = ["at the beginning", "highest reading", "peak since start"];
        let [first, second, third] = columns.map(|name| format!("{name:>19}"));
        writeln!(out, "\n{:23}{first}{second}{third}", "server's bytes, MB")?;
        let cell = |bytes: u64| format!("{:>19.1}", bytes as f64 / MB);
        for (begin, peak) in bytes(begin).into_iter().zip(bytes(peak)) {
            let since_start = peak.since_start.map(cell).unwrap_or_default();
            let (name, begin, peak) = (begin.name, cell(begin.now), cell(peak.now));
            writeln!(out, "{name:23}{begin}{peak}{since_start}")?;
        }
        let MemoryReport { live_sessions, sessions_on_device, open_microbatches, .. } = peak;
        writeln!(
            out,
            "at most {live_sessions} live sessions, {sessions_on_device} of them on the device, and \
             {open_microbatches} open microbatches in {n_readings} readings"
        )
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let (args, server) = (self.args, &self.server);
        let speeds = self.speeds();
        let sessions: Vec<Value> = (0..self.sessions.len())
            .map(|i| {
                let (size, session) = (args.sizes()[i], &self.sessions[i]);
                json!({
                    "sequences": size.sequences,
                    "tokens": size.tokens,
                    "rank": super::lora(args, server, i).r,
                    "microbatches": session.n_microbatches,
                    "steps": session.n_steps,
                    "seconds": session.seconds,
                    "n_tokens": self.n_tokens(i),
                    "tokens_per_second": speeds[i],
                    "retries": session.n_retries(),
                })
            })
            .collect();
        let latencies: Value = self
            .groups()
            .into_iter()
            .map(|(group, sessions)| {
                let kinds = kinds(sessions).map(|(kind, frames)| (kind.into(), latency(&frames)));
                (group.into(), Value::Object(kinds.into_iter().collect()))
            })
            .collect::<serde_json::Map<String, Value>>()
            .into();
        json!({
            "setting": self.setting(),
            "seconds": self.seconds(),
            "tokens_per_second": self.tokens_per_second(),
            "jain_index": jain_index(&speeds),
            "sessions": sessions,
            "latency_seconds": latencies,
            "memory": {
                "begin": memory(&self.memory.begin),
                "peak": memory(&self.memory.peak),
            },
        })
    }

    fn setting(&self) -> Value {
        let (args, server) = (self.args, &self.server);
        json!({
            "model": server.model_name,
            "split_point_1": server.split_point_1,
            "split_point_2": server.split_point_2,
            "layers": server.n_layers,
            "compute_dtype": server.compute_dtype,
            "device": server.device,
            "server_in_this_process": args.server.server.is_none(),
            "mode": match args.load.mode { Mode::Train => "train", Mode::Eval => "eval" },
            "sessions": args.load.sessions,
            "idle_sessions": args.load.idle_sessions,
            "in_flight": args.load.in_flight,
            "accumulate": args.accumulate(),
            "rank": args.adapter.rank,
            "adapters_differ": args.adapter.adapters == Variety::Different,
            "wire_dtype": args.wire.wire_dtype.name(),
            "latency_ms": args.wire.latency_ms,
            "bandwidth_mbit": args.wire.bandwidth_mbit,
            "warm_up": args.measure.warm_up,
            "end": match args.end() {
                End::After(time) => json!({ "seconds": time.as_secs_f64() }),
                End::Steps(n) => json!({ "steps": n }),
            },
        })
    }
}

/// The frames of some sessions by kind.
fn kinds(sessions: &[Measured]) -> [(&'static str, Vec<FrameReport>); 2] {
    let all = |frames: fn(&Measured) -> &Vec<FrameReport>| {
        sessions.iter().flat_map(|session| frames(session).iter().copied()).collect()
    };
    [("forward", all(|session| &session.forward)), ("backward", all(|session| &session.backward))]
}

/// The 50th and the 99th of a part of the time; each part is sorted by itself.
fn percentiles(frames: &[FrameReport], (_, part): Part) -> [Duration; 2] {
    let mut values: Vec<Duration> = frames.iter().map(part).collect();
    values.sort_unstable();
    [0.5, 0.99].map(|share| percentile(&values, share))
}

/// Frames of a batch: each stands for its share of one. Zero if there were none.
fn mean_batch_jobs(frames: &[FrameReport]) -> f64 {
    let n_batches: f64 = frames.iter().map(|frame| 1.0 / f64::from(frame.batch_jobs.max(1))).sum();
    if frames.is_empty() { 0.0 } else { frames.len() as f64 / n_batches }
}

fn latency(frames: &[FrameReport]) -> Value {
    let mut all = json!({ "count": frames.len(), "mean_batch_jobs": mean_batch_jobs(frames) });
    for part in PARTS {
        let [p50, p99] = percentiles(frames, part).map(|time| time.as_secs_f64());
        all[part.0] = json!({ "p50": p50, "p99": p99 });
    }
    all
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One kind of bytes.
struct Bytes {
    name: &'static str,
    now: u64,
    /// The most since the server's start, where it tells.
    since_start: Option<u64>,
}

fn bytes(report: &MemoryReport) -> [Bytes; 6] {
    let peak = report.peak.as_ref();
    let bytes = |name, now, since_start| Bytes { name, now, since_start };
    [
        bytes("resident", report.resident_bytes, None),
        bytes("weights", report.weights_bytes, None),
        bytes("adapters", report.adapter_bytes, peak.map(|peak| peak.adapter_bytes)),
        bytes("tapes", report.tape_bytes, peak.map(|peak| peak.tape_bytes)),
        bytes("workspace", report.workspace_bytes, peak.map(|peak| peak.workspace_bytes)),
        bytes("host", report.host_bytes, None),
    ]
}

fn memory(report: &MemoryReport) -> Value {
    let mut all = json!({
        "live_sessions": report.live_sessions,
        "sessions_on_device": report.sessions_on_device,
        "open_microbatches": report.open_microbatches,
    });
    for Bytes { name, now, since_start } in bytes(report) {
        all[format!("{name}_bytes")] = json!(now);
        if let Some(most) = since_start {
            all[format!("{name}_bytes_since_start")] = json!(most);
        }
    }
    all
}
