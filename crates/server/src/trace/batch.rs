//! Jobs on their way to the device and on it, and the batches that they share.

use super::TARGET;
use opentelemetry::trace::{SpanContext, TraceContextExt};
use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The spans of one job. Dropped with it, they end.
#[derive(Debug)]
pub struct JobSpans {
    /// Of the frame or the call that asked for it.
    asked: Span,
    waits: Span,
    runs: Span,
}

impl JobSpans {
    /// Nobody asked.
    #[cfg(test)]
    pub fn none() -> JobSpans {
        JobSpans { asked: Span::none(), waits: Span::none(), runs: Span::none() }
    }

    /// It waits from now on.
    pub fn submitted(asked: Span) -> JobSpans {
        let waits = match asked.is_disabled() {
            true => Span::none(),
            false => tracing::debug_span!(target: TARGET, parent: &asked, "queue.wait"),
        };
        JobSpans { asked, waits, runs: Span::none() }
    }

    /// Whoever asked for it.
    pub fn asked(&self) -> &Span {
        &self.asked
    }

    /// It runs by itself from now on.
    pub fn run_alone(&mut self, name: &'static str) {
        self.waits = Span::none();
        if !self.asked.is_disabled() {
            self.runs = self.run(name);
        }
    }

    /// It runs within a batch from now on.
    pub fn run_in(&mut self, batch: &BatchSpan, name: &'static str, n_tokens: usize) {
        self.run_alone(name);
        self.runs.record("offshoot.tokens", n_tokens);
        if let Some(context) = &batch.context {
            self.runs.add_link(context.clone());
        }
    }

    /// What its forward leaves for its backward.
    pub fn keeps(&self, tape: &'static str) {
        self.runs.record("offshoot.tape", tape);
    }

    fn run(&self, name: &'static str) -> Span {
        tracing::debug_span!(
            target: TARGET, parent: &self.asked, "engine.job",
            otel.name = name,
            offshoot.tokens = Empty,
            offshoot.tape = Empty,
        )
    }
}

/// A batch: a trace of its own, since it belongs to all of its jobs, with a link to each that is
/// sampled. There is none if no job is.
#[derive(Debug)]
pub struct BatchSpan {
    span: Span,
    context: Option<SpanContext>,
}

impl BatchSpan {
    /// Begins now.
    pub fn begin<'a>(
        kind: &'static str,
        n_tokens: usize,
        jobs: impl Iterator<Item = &'a JobSpans>,
    ) -> BatchSpan {
        let (mut n_jobs, mut links) = (0u64, Vec::new());
        for job in jobs {
            n_jobs += 1;
            links.extend(sampled(&job.asked));
        }
        if links.is_empty() {
            return BatchSpan { span: Span::none(), context: None };
        }
        let span = tracing::debug_span!(
            target: TARGET, parent: None, "engine.batch",
            offshoot.batch.kind = kind,
            offshoot.batch.jobs = n_jobs,
            offshoot.batch.tokens = n_tokens,
        );
        // Before it begins: they are why it is sampled.
        links.into_iter().for_each(|link| span.add_link(link));
        let context = sampled(&span);
        BatchSpan { span, context }
    }

    /// Runs what its phases are in.
    pub fn run<T>(&self, run: impl FnOnce() -> T) -> T {
        self.span.in_scope(run)
    }
}

/// A part of the batch that runs on this thread now. On an accelerator the host's time counts: what it
/// has asked for may still run in the next part.
pub fn phase(name: &'static str) -> Span {
    match Span::current().is_disabled() {
        true => Span::none(),
        false => tracing::debug_span!(target: TARGET, "engine.phase", otel.name = name),
    }
}

/// A span that somebody collects.
fn sampled(span: &Span) -> Option<SpanContext> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context().span().span_context().clone();
    (context.is_valid() && context.is_sampled()).then_some(context)
}
