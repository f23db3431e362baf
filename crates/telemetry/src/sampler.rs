//! Which traces are kept. Of a trace that another process began, that process has decided; a share of
//! those that begin here is kept; and what is linked to kept traces, such as a batch to its jobs, is
//! kept with them.

use opentelemetry::trace::{Link, SpanKind, TraceContextExt, TraceId};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, SamplingResult, ShouldSample};

/// Decides of traces that begin here.
#[derive(Debug, Clone)]
struct Roots {
    share: Sampler,
}

/// Which traces are kept: of one that another process began that process has decided; `ratio` is the share of those that begin here;
/// and what is linked to kept traces is kept.
pub fn sampler(ratio: f64) -> Sampler {
    let share = Sampler::TraceIdRatioBased(ratio);
    Sampler::ParentBased(Box::new(Roots { share }))
}

impl ShouldSample for Roots {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        if links.is_empty() {
            return self.share.should_sample(parent, trace_id, name, kind, attributes, links);
        }
        let is_kept = links.iter().any(|link| link.span_context.is_sampled());
        let trace_state = parent
            .map(|parent| parent.span().span_context().trace_state().clone())
            .unwrap_or_default();
        SamplingResult {
            decision: if is_kept {
                SamplingDecision::RecordAndSample
            } else {
                SamplingDecision::Drop
            },
            attributes: Vec::new(),
            trace_state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceState};

    fn span(trace: u128, sampled: bool) -> SpanContext {
        let flags = if sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        let (trace, span) = (TraceId::from(trace), SpanId::from(7));
        SpanContext::new(trace, span, flags, true, TraceState::default())
    }

    fn decide(ratio: f64, parent: Option<SpanContext>, links: &[SpanContext]) -> bool {
        let parent = parent.map(|span| Context::new().with_remote_span_context(span));
        let links: Vec<Link> = links.iter().map(|span| Link::with_context(span.clone())).collect();
        // The lowest id, which every ratio above 0 keeps, and the highest, which none below 1 does.
        let decision = sampler(ratio).should_sample(
            parent.as_ref(),
            TraceId::from(u128::MAX),
            "engine.batch",
            &SpanKind::Internal,
            &[],
            &links,
        );
        decision.decision == SamplingDecision::RecordAndSample
    }

    #[test]
    fn whoever_began_the_trace_has_decided() {
        assert!(decide(0.0, Some(span(1, true)), &[]));
        assert!(!decide(1.0, Some(span(1, false)), &[]));
    }

    #[test]
    fn a_share_of_those_that_begin_here_is_kept() {
        assert!(decide(1.0, None, &[]));
        assert!(!decide(0.5, None, &[]));
        assert!(!decide(0.0, None, &[]));
    }

    #[test]
    fn what_is_linked_to_a_kept_trace_is_kept() {
        assert!(decide(0.0, None, &[span(1, false), span(2, true)]));
        assert!(!decide(1.0, None, &[span(1, false)]));
    }
}
