//! Sequences that go on, in batches with others.

use super::*;
use crate::engine::caches::Asks;
use crate::session::ExtendWork;
use crate::trace::JobSpans;
use std::ops::Range;

impl Rig {
    /// The next tokens of a sequence of the session, whose rows are the same in every company.
    fn extend(&mut self, lane: u64, cache: u64, tokens: Range<usize>) -> Forwarded {
        let (reply, result) = oneshot::channel();
        let (h, all) = (self.hidden_size, self.tensor(lane + 100 * cache, 600).to_f32());
        let rows = all[tokens.start * h..tokens.end * h].to_vec();
        let hidden = HostTensor::from_f32(&rows, vec![tokens.len(), h], WireDType::F32);
        let work = ExtendWork { cache, start: tokens.start as u64, hidden };
        self.submit(lane, FrameWork::Extend { work: Box::new(work), reply });
        result
    }

    /// The same, at once and alone; it must work.
    fn extended(&mut self, lane: u64, cache: u64, tokens: Range<usize>) -> Vec<f32> {
        let result = self.extend(lane, cache, tokens);
        self.turn();
        forwarded(result).unwrap().hidden.to_f32()
    }

    /// The same, and it must be refused. Its number is free again.
    fn refused(&mut self, lane: u64, cache: u64, tokens: Range<usize>) -> Error {
        let result = self.extend(lane, cache, tokens);
        self.turn();
        *self.sequences.get_mut(&lane).unwrap() -= 1;
        forwarded(result).unwrap_err()
    }

    fn step(&mut self, lane: u64) {
        let (reply, stepped): (Reply<_>, _) = oneshot::channel();
        let work = StepWork { learning_rate: 0.1, clip_factor: 1.0, shared_loss: None };
        self.submit(lane, FrameWork::Step { work, reply });
        self.turn();
        stepped.blocking_recv().unwrap().unwrap();
    }

    fn drop_cache(&mut self, lane: u64, cache: u64) {
        let (reply, dropped) = oneshot::channel();
        self.submit(lane, FrameWork::DropCache { cache, reply });
        self.turn();
        dropped.blocking_recv().unwrap().unwrap();
    }

    fn cache_bytes(&self) -> u64 {
        self.worker.ledger.usage().now.caches
    }
}

/// All tokens of a session's sequence in one frame, alone.
fn whole(lane: u64, cache: u64, n_tokens: usize) -> Vec<f32> {
    let mut rig = rig(None);
    rig.admit(lane);
    rig.extended(lane, cache, 0..n_tokens)
}

#[test]
fn sequences_of_several_sessions_go_on_in_one_batch_beside_other_forwards() {
    for mode in [LoraMode::Loop, LoraMode::Stacked] {
        let mut rig = rig(None);
        rig.worker.part.set_lora_mode(mode);
        (0..4).for_each(|lane| rig.admit(lane));
        let mut outputs = [4, 6].map(|n| vec![0.0; n * rig.hidden_size]);
        for (lane, output) in outputs.iter_mut().enumerate() {
            *output = rig.extended(lane as u64, 7, 0..[4, 6][lane]);
        }
        // One token each, between a forward that trains and an evaluation.
        for token in 0..3 {
            let next = [0, 1].map(|lane| {
                let begin = [4, 6][lane as usize] + token;
                rig.extend(lane, 7, begin..begin + 1)
            });
            let others = (token == 1).then(|| (rig.train(2, 5), rig.forward(3, 4, Mode::Eval)));
            rig.turn();
            for (output, next) in outputs.iter_mut().zip(next) {
                let next = forwarded(next).unwrap();
                assert_eq!(next.times.n_jobs, if token == 1 { 4 } else { 2 });
                assert_eq!((next.tape_bytes, next.cache_bytes * 2), (0, rig.cache_bytes()));
                output.extend(next.hidden.to_f32());
            }
            if let Some((trains, evaluated)) = others {
                let trains = forwarded(trains).unwrap().hidden.to_f32();
                assert_close("training output", &trains, &alone(2, 5)[0]);
                assert_eq!(forwarded(evaluated).unwrap().cache_bytes, 0);
            }
        }
        for (lane, output) in outputs.iter().enumerate() {
            assert_close("sequence", output, &whole(lane as u64, 7, [7, 9][lane]));
        }
        // The tape of the mixed pass is whole.
        let grad = rig.backward(2, 5);
        rig.turn();
        assert_close("input gradient", &done(grad), &alone(2, 5)[1]);
    }
}

#[test]
fn caches_grow_in_the_ledger_and_go_from_it() {
    let mut rig = rig(None);
    (0..2).for_each(|lane| rig.admit(lane));
    let part_bytes = |rig: &Rig, n| rig.worker.part.cache_bytes(n);
    let mut output = rig.extended(0, 1, 0..250);
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 256));
    output.extend(rig.extended(0, 1, 250..290));
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 512));
    // No further than the limit.
    output.extend(rig.extended(0, 1, 290..599));
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 600));
    assert_close("grown", &output, &whole(0, 1, 599));

    // Begun anew in the same room, and a second one.
    assert_close("anew", &rig.extended(0, 1, 0..5), &whole(0, 1, 5));
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 600));
    rig.extended(0, 2, 0..5);
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 600 + 256));
    let error = rig.refused(0, 3, 0..5);
    assert!(matches!(error, Error::OpenCaches { limit: 2 }), "{error}");
    rig.drop_cache(0, 1);
    // Nobody minds if it is not there.
    rig.drop_cache(0, 1);
    rig.extended(0, 3, 0..5);
    // Another session's number is its own.
    let error = rig.refused(1, 3, 5..6);
    assert!(matches!(error, Error::NoCache { cache: 3 }), "{error}");
    rig.extended(1, 3, 0..2);
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 3 * 256));
    let (gone, _wait) = oneshot::channel();
    let job = Job { command: Command::Release { gone }, spans: JobSpans::none() };
    rig.scheduler.submit(LaneId(0), Kind::Control, 0, job).unwrap();
    rig.turn();
    assert_eq!(rig.cache_bytes(), part_bytes(&rig, 256));
    rig.step(1);
    assert_eq!(rig.worker.ledger.usage().now.total(), adapter_bytes(&rig));
    assert_eq!(rig.worker.caches.len(), 0);
}

#[test]
fn a_cache_is_only_gone_on_with_where_it_stands() {
    let mut rig = rig(None);
    rig.admit(0);
    assert!(matches!(rig.refused(0, 1, 3..4), Error::NoCache { cache: 1 }));
    let mut output = rig.extended(0, 1, 0..3);
    let error = rig.refused(0, 1, 4..5);
    assert!(matches!(error, Error::CacheStart { start: 4, held: 3, .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("holds 3 tokens") && text.contains("start = 0"), "{text}");
    output.extend(rig.extended(0, 1, 3..6));
    assert_close("after refusals", &output, &whole(0, 1, 6));
    // Back to a prefix, and on from there.
    let h = rig.hidden_size;
    output.truncate(2 * h);
    output.extend(rig.extended(0, 1, 2..4));
    output.extend(rig.extended(0, 1, 4..5));
    assert_close("after going back", &output, &whole(0, 1, 5));
    let error = rig.refused(0, 1, 6..7);
    assert!(matches!(error, Error::CacheStart { held: 5, .. }), "{error}");
    rig.step(0);
    assert!(matches!(rig.refused(0, 1, 5..6), Error::NoCache { .. }), "it is of older weights");
}

#[test]
fn a_pass_that_failed_leaves_caches_as_they_were() {
    let mut rig = rig(None);
    (0..3).for_each(|lane| rig.admit(lane));
    let mut outputs = [0, 1].map(|lane| rig.extended(lane, 1, 0..4));
    rig.worker.row_limit = Some(5);
    let together = [0, 1].map(|lane| rig.extend(lane, 1, 4..7));
    rig.turn();
    for (output, again) in outputs.iter_mut().zip(together) {
        output.extend(forwarded(again).unwrap().hidden.to_f32());
    }
    // Alone it is too much as well: the cache stands where it stood, and a new one is not there.
    let (old, new) = (rig.refused(0, 1, 7..14), rig.refused(2, 1, 0..7));
    for error in [old, new] {
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    }
    assert_eq!(rig.worker.caches.len(), 2);
    rig.worker.row_limit = None;
    outputs[0].extend(rig.extended(0, 1, 7..9));
    assert_close("first", &outputs[0], &whole(0, 1, 9));
    assert_close("second", &outputs[1], &whole(1, 1, 7));
}

#[test]
fn a_sequence_that_overflows_disturbs_nobody() {
    for mode in [LoraMode::Loop, LoraMode::Stacked] {
        let mut rig = rig(None);
        rig.worker.part.set_lora_mode(mode);
        (0..3).for_each(|lane| rig.admit(lane));
        let mut good = rig.extended(0, 1, 0..4);
        rig.grow(1, f32::INFINITY);
        rig.grow(2, 1e30);
        for token in 4..7 {
            let next = rig.extend(0, 1, token..token + 1);
            let bad = [1, 2].map(|lane| rig.extend(lane, 1, 0..3));
            rig.turn();
            for (lane, bad) in [1, 2].into_iter().zip(bad) {
                let error = forwarded(bad).unwrap_err();
                assert!(matches!(error, Error::Overflow { .. }), "{error}");
                rig.sequences.insert(lane, 0);
            }
            good.extend(forwarded(next).unwrap().hidden.to_f32());
        }
        assert_close("good", &good, &whole(0, 1, 7));
        assert_eq!(rig.worker.caches.len(), 1);
    }
}

#[test]
fn idle_caches_go_before_anybody_waits() {
    let mut free = rig(None);
    (0..3).for_each(|lane| free.admit(lane));
    let part = &free.worker.part;
    let pass = part.workspace_bytes(2, Work::Forward) + part.prefix_bytes(2, 2);
    // Room for two caches.
    let budget = adapter_bytes(&free) + 2 * part.cache_bytes(256) + pass;
    let mut rig = rig(Some(budget));
    (0..3).for_each(|lane| rig.admit(lane));
    rig.extended(0, 1, 0..2);
    rig.extended(1, 1, 0..2);
    let mut waits = rig.extend(2, 1, 0..2);
    rig.turn();
    assert!(waits.try_recv().is_err(), "both are in use");
    assert_eq!(rig.worker.caches.len(), 2);

    // Later, by the clock of those who look.
    let later = std::time::Instant::now() + IDLE;
    let key = |lane| (LaneId(lane), 1);
    assert!(rig.worker.caches.drop_idle(later, Asks::Extend(key(0))), "not the one that asks");
    assert!(rig.worker.caches.get(key(0)).is_some() && rig.worker.caches.get(key(1)).is_none());
    rig.scheduler.let_go();
    rig.turn();
    forwarded(waits).unwrap();
    let error = rig.refused(1, 1, 2..3);
    assert!(matches!(error, Error::NoCache { .. }), "its client begins again: {error}");

    // What a session needs for its training, its own caches make room for at once.
    let training = rig.train(0, 6);
    rig.turn();
    forwarded(training).unwrap();
    let left = [0, 2].map(|lane| rig.worker.caches.get(key(lane)).is_some());
    assert_eq!(left, [false, true]);
}

#[test]
fn a_cache_that_never_fits_is_refused_at_once() {
    let mut free = rig(None);
    free.admit(0);
    let part = &free.worker.part;
    let budget =
        adapter_bytes(&free) + part.cache_bytes(300) + part.workspace_bytes(2, Work::Forward);
    let mut rig = rig(Some(budget));
    rig.admit(0);
    rig.extended(0, 1, 0..2);
    let error = rig.refused(0, 1, 2..258);
    assert!(matches!(error, Error::NoRoom { retry_after: None, .. }), "{error}");
    assert!(error.to_string().contains("shorter sequence"), "{error}");
    // What it holds is still there.
    rig.extended(0, 1, 2..4);
    assert_eq!(rig.cache_bytes(), rig.worker.part.cache_bytes(256));
}
