use super::definition::{self as metric, Definition, Type};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, UpDownCounter};

/// What is recorded when it happens. The rest is looked at when somebody asks: see `observed`.
#[derive(Debug)]
pub struct Instruments {
    pub step_duration: Histogram<f64>,
    pub steps: Counter<u64>,
    pub job_duration: Histogram<f64>,
    pub tokens: Counter<u64>,
    pub device_time: Counter<f64>,
    pub network_io: Counter<u64>,
    pub batch_tokens: Histogram<u64>,
    pub batch_sessions: Histogram<u64>,
    pub engine_restarts: Counter<u64>,
    pub streams: UpDownCounter<i64>,
    pub snapshot_duration: Histogram<f64>,
    pub snapshot_written: Counter<u64>,
    pub snapshot_failures: Counter<u64>,
    pub errors: Counter<u64>,
}

impl Instruments {
    pub fn new(meter: &Meter) -> Self {
        let counter = |of: &Definition| {
            let builder = meter.u64_counter(of.name).with_unit(of.unit);
            builder.with_description(of.about).build()
        };
        let instruments = Instruments {
            step_duration: seconds(meter, &metric::STEP_DURATION),
            steps: counter(&metric::STEPS),
            job_duration: seconds(meter, &metric::JOB_DURATION),
            tokens: counter(&metric::TOKENS_DONE),
            device_time: meter
                .f64_counter(metric::DEVICE_TIME.name)
                .with_unit(metric::DEVICE_TIME.unit)
                .with_description(metric::DEVICE_TIME.about)
                .build(),
            network_io: counter(&metric::NETWORK_IO),
            batch_tokens: numbers(meter, &metric::BATCH_TOKENS),
            batch_sessions: numbers(meter, &metric::BATCH_SESSIONS),
            engine_restarts: counter(&metric::ENGINE_RESTARTS),
            streams: meter
                .i64_up_down_counter(metric::STREAMS.name)
                .with_unit(metric::STREAMS.unit)
                .with_description(metric::STREAMS.about)
                .build(),
            snapshot_duration: seconds(meter, &metric::SNAPSHOT_DURATION),
            snapshot_written: counter(&metric::SNAPSHOT_WRITTEN),
            snapshot_failures: counter(&metric::SNAPSHOT_FAILURES),
            errors: counter(&metric::ERRORS),
        };
        // Present from the start: a rate of what begins at 1 would miss the first.
        instruments.engine_restarts.add(0, &[]);
        instruments
    }

    /// A batch has run.
    pub fn batch(&self, kind: &'static str, n_sessions: usize, n_tokens: usize) {
        let kind = [KeyValue::new("kind", kind)];
        self.batch_tokens.record(n_tokens as u64, &kind);
        self.batch_sessions.record(n_sessions as u64, &kind);
    }
}

fn bounds(of: &Definition) -> Vec<f64> {
    match of.kind {
        Type::Histogram(bounds) => bounds.to_vec(),
        Type::Counter | Type::Gauge => Vec::new(),
    }
}

fn seconds(meter: &Meter, of: &Definition) -> Histogram<f64> {
    let builder = meter.f64_histogram(of.name).with_unit(of.unit).with_description(of.about);
    builder.with_boundaries(bounds(of)).build()
}

fn numbers(meter: &Meter, of: &Definition) -> Histogram<u64> {
    let builder = meter.u64_histogram(of.name).with_unit(of.unit).with_description(of.about);
    builder.with_boundaries(bounds(of)).build()
}
