use super::*;
use crate::claim::Claim;
use std::sync::Arc;

fn limits() -> v1::Limits {
    v1::Limits { max_frames_in_flight: 4, max_open_microbatches: 2, ..Default::default() }
}

fn window() -> Window<&'static str> {
    Window::new(0, &limits())
}

fn forward(claim: &Claim) -> Request {
    let forward = v1::Forward { mode: v1::Mode::Train as i32, ..Default::default() };
    Request::Forward { forward, interest: Arc::downgrade(claim) }
}

fn backward(microbatch: u64, claim: &Claim) -> Request {
    let backward = v1::Backward { microbatch, grad: None };
    Request::Backward { backward, claim: claim.clone() }
}

fn step() -> Request {
    Request::Step(v1::Step::default())
}

/// Everything that goes out now, as "number:kind".
fn sent<R>(window: &mut Window<R>) -> Vec<String> {
    std::iter::from_fn(|| window.take_unsent())
        .map(|frame| {
            let kind = match frame.body.unwrap() {
                Body::Forward(f) => format!("F{}", f.microbatch),
                Body::Backward(b) => format!("B{}", b.microbatch),
                Body::Step(_) => "S".to_string(),
                Body::Discard(d) => format!("D{}", d.microbatch),
                Body::Extend(e) => format!("E{}", e.cache),
                Body::DropCache(d) => format!("C{}", d.cache),
                Body::Hello(_) => "H".to_string(),
            };
            format!("{}:{kind}", frame.sequence)
        })
        .collect()
}

fn answer<R>(window: &mut Window<R>, sequence: u64) -> R {
    match window.applied(sequence) {
        Outcome::Answered(entry) => entry.reply,
        _ => panic!("frame {sequence} was not due"),
    }
}

/// The replies of frames that ended with this refusal.
fn refuse<R>(window: &mut Window<R>, sequence: u64, cause: Cause) -> Vec<R> {
    let mut ended = match window.refused(sequence, cause) {
        Outcome::Refused(entry) | Outcome::Aborted(entry) => vec![entry.reply],
        Outcome::Kept => vec![],
        _ => panic!("frame {sequence} was not due"),
    };
    ended.extend(window.settle().into_iter().map(|e| e.reply));
    ended
}

#[test]
fn numbers_run_on_and_answers_come_in_order() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f");
    w.push(step(), "s");
    assert_eq!(sent(&mut w), ["1:F1", "2:S"]);
    assert!(matches!(w.applied(2), Outcome::Unexpected { due: Some(1) }));
    assert_eq!(answer(&mut w, 1), "f");
    w.push(backward(1, &claim), "b");
    assert_eq!(sent(&mut w), ["3:B1"]);
    assert_eq!((answer(&mut w, 2), answer(&mut w, 3)), ("s", "b"));
    assert!(w.is_empty() && w.answered() == 3);
    assert!(matches!(w.applied(4), Outcome::Unexpected { due: None }));
}

#[test]
fn the_window_is_bounded() {
    let (mut w, claim) = (window(), Claim::default());
    for _ in 0..4 {
        assert!(w.has_room());
        w.push(forward(&claim), "f");
    }
    assert!(!w.has_room());
    assert_eq!(sent(&mut w).len(), 4);
    answer(&mut w, 1);
    assert!(w.has_room());
}

#[test]
fn a_refused_frame_takes_those_behind_it_with_it_and_frees_its_number() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(step(), "first");
    w.push(forward(&claim), "bad");
    w.push(forward(&claim), "behind");
    assert_eq!(sent(&mut w), ["1:S", "2:F2", "3:F3"]);
    w.push(step(), "unsent");
    answer(&mut w, 1);
    assert_eq!(refuse(&mut w, 2, Cause::Final), ["bad"]);
    // Nothing new until the server has refused what was on its way.
    assert!(!w.has_room());
    assert!(sent(&mut w).is_empty());
    assert_eq!(refuse(&mut w, 3, Cause::Final), ["behind", "unsent"]);
    assert!(w.has_room() && w.is_empty());
    w.push(forward(&claim), "again");
    assert_eq!(sent(&mut w), ["2:F2"]);
}

#[test]
fn a_refused_frame_with_a_hint_is_sent_again_with_those_behind_it() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f");
    w.push(step(), "s");
    assert_eq!(sent(&mut w), ["1:F1", "2:S"]);
    assert!(refuse(&mut w, 1, Cause::Retry).is_empty());
    assert!(refuse(&mut w, 2, Cause::Final).is_empty());
    assert!(sent(&mut w).is_empty());
    w.release();
    assert_eq!(sent(&mut w), ["1:F1", "2:S"]);
    assert_eq!((answer(&mut w, 1), answer(&mut w, 2)), ("f", "s"));
}

#[test]
fn backwards_overtake_forwards_that_the_server_cannot_take_yet() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    w.push(forward(&claim), "f2");
    sent(&mut w);
    answer(&mut w, 1);
    refuse(&mut w, 2, Cause::Drain);
    assert!(!w.may_leave(), "the server waits for microbatch 1");
    w.push(forward(&claim), "f3");
    w.push(backward(1, &claim), "b1");
    w.push(step(), "s");
    // The order of the rest stays, and so do the microbatches' names.
    assert_eq!(sent(&mut w), ["2:B1"]);
    assert_eq!(answer(&mut w, 2), "b1");
    assert!(sent(&mut w).is_empty());
    assert!(w.may_leave());
    assert!(w.disconnected().is_empty());
    assert_eq!(w.attached(2, &[]), Ok(()));
    assert_eq!(sent(&mut w), ["3:F2", "4:F3", "5:S"]);
}

#[test]
fn a_forward_without_room_goes_out_again_once_a_backward_has_made_some() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    w.push(forward(&claim), "f2");
    sent(&mut w);
    answer(&mut w, 1);
    refuse(&mut w, 2, Cause::Retry);
    w.push(backward(1, &claim), "b1");
    assert_eq!(sent(&mut w), ["2:B1"]);
    assert_eq!(answer(&mut w, 2), "b1");
    assert_eq!(sent(&mut w), ["3:F2"]);
}

#[test]
fn a_backward_overtakes_what_waits_for_room_for_a_cache() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    sent(&mut w);
    answer(&mut w, 1);
    let extend = v1::Extend { cache: 7, start: 0, hidden: None };
    w.push(Request::Extend(extend), "e");
    sent(&mut w);
    refuse(&mut w, 2, Cause::Retry);
    w.push(Request::DropCache(v1::DropCache { cache: 8 }), "c");
    w.push(backward(1, &claim), "b1");
    assert_eq!(sent(&mut w), ["2:B1"]);
    assert_eq!(answer(&mut w, 2), "b1");
    assert_eq!(sent(&mut w), ["3:E7", "4:C8"]);
}

/// As the task does before each command and each frame.
fn discard_abandoned(window: &mut Window<&'static str>) {
    for microbatch in window.abandoned() {
        window.push(Request::Discard(v1::Discard { microbatch }), "d");
    }
}

#[test]
fn what_nobody_wants_is_discarded_before_the_next_frame() {
    let (mut w, first, second) = (window(), Claim::default(), Claim::default());
    w.push(forward(&first), "f1");
    w.push(forward(&second), "f2");
    sent(&mut w);
    answer(&mut w, 1);
    assert!(w.abandoned().is_empty());
    // One whose forward is answered, and one whose forward is not.
    drop((first, second));
    discard_abandoned(&mut w);
    discard_abandoned(&mut w);
    w.push(step(), "s");
    assert_eq!(sent(&mut w), ["3:D1", "4:D2", "5:S"]);
    for sequence in 2..=5 {
        answer(&mut w, sequence);
    }
    assert!(w.is_empty() && w.abandoned().is_empty());
}

#[test]
fn a_backward_on_its_way_is_wanted_and_a_refused_one_is_not() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    sent(&mut w);
    answer(&mut w, 1);
    w.push(backward(1, &claim), "b1");
    drop(claim);
    assert!(w.abandoned().is_empty());
    sent(&mut w);
    assert_eq!(refuse(&mut w, 2, Cause::Final), ["b1"]);
    discard_abandoned(&mut w);
    assert_eq!(sent(&mut w), ["2:D1"]);
    // A server that does not do it is not asked for ever.
    assert_eq!(refuse(&mut w, 2, Cause::Final), ["d"]);
    assert!(w.abandoned().is_empty());
}

#[test]
fn a_discard_overtakes_as_a_backward_does_but_not_its_own_forward() {
    let (mut w, first, second) = (window(), Claim::default(), Claim::default());
    w.push(forward(&first), "f1");
    w.push(forward(&second), "f2");
    sent(&mut w);
    answer(&mut w, 1);
    refuse(&mut w, 2, Cause::Drain);
    drop(second);
    discard_abandoned(&mut w);
    assert!(sent(&mut w).is_empty() && !w.may_leave(), "the server waits for microbatch 1");
    drop(first);
    discard_abandoned(&mut w);
    assert_eq!(sent(&mut w), ["2:D1"]);
    answer(&mut w, 2);
    assert!(w.may_leave());
    w.release();
    assert_eq!(sent(&mut w), ["3:F2", "4:D2"]);
}

#[test]
fn a_backward_does_not_overtake_a_step() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    w.push(step(), "s");
    sent(&mut w);
    answer(&mut w, 1);
    refuse(&mut w, 2, Cause::Drain);
    w.push(backward(1, &claim), "b1");
    assert!(sent(&mut w).is_empty());
}

#[test]
fn a_backward_refused_with_a_hint_is_not_hurried() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    sent(&mut w);
    answer(&mut w, 1);
    w.push(backward(1, &claim), "b1");
    sent(&mut w);
    refuse(&mut w, 2, Cause::Retry);
    assert!(sent(&mut w).is_empty());
    w.release();
    assert_eq!(sent(&mut w), ["2:B1"]);
}

#[test]
fn only_the_frame_that_was_too_much_counts_its_retries() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f1");
    w.push(forward(&claim), "f2");
    w.push(step(), "s");
    sent(&mut w);
    let retries = |w: &mut Window<_>, sequence| match w.applied(sequence) {
        Outcome::Answered(entry) => entry.retries,
        _ => panic!("frame {sequence} was not due"),
    };
    assert_eq!(retries(&mut w, 1), 0);
    for _ in 0..2 {
        refuse(&mut w, 2, Cause::Retry);
        refuse(&mut w, 3, Cause::Final);
        w.release();
        sent(&mut w);
    }
    refuse(&mut w, 2, Cause::Drain);
    refuse(&mut w, 3, Cause::Final);
    w.release();
    sent(&mut w);
    assert_eq!((retries(&mut w, 2), retries(&mut w, 3)), (2, 0));
}

#[test]
fn after_a_break_everything_unanswered_goes_out_again() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "f");
    w.push(step(), "s");
    w.push(step(), "t");
    sent(&mut w);
    answer(&mut w, 1);
    assert!(w.disconnected().is_empty());
    // The server had applied frame 2, only its answer was lost: it has it recorded.
    assert_eq!(w.attached(2, &[1]), Ok(()));
    assert_eq!(sent(&mut w), ["2:S", "3:S"]);
}

#[test]
fn a_break_ends_what_a_refusal_had_doomed() {
    let (mut w, claim) = (window(), Claim::default());
    w.push(forward(&claim), "bad");
    w.push(step(), "behind");
    sent(&mut w);
    assert_eq!(refuse(&mut w, 1, Cause::Final), ["bad"]);
    let doomed: Vec<_> = w.disconnected().into_iter().map(|e| e.reply).collect();
    assert_eq!(doomed, ["behind"]);
    assert!(w.has_room());
}

#[test]
fn an_older_server_state_rolls_back() {
    let mut w: Window<&str> = Window::new(7, &limits());
    assert_eq!(w.attached(7, &[]), Ok(()));
    let lost_microbatches = vec![];
    assert_eq!(w.attached(6, &[]), Err(Gone::RolledBack { lost_microbatches }));
    assert_eq!(w.attached(8, &[]), Err(Gone::Ahead));
    w.push(step(), "s");
    assert_eq!(w.attached(8, &[]), Ok(()));
}

#[test]
fn a_lost_tape_rolls_back_only_if_somebody_needs_it() {
    let lost = |ids: &[u64]| Err(Gone::RolledBack { lost_microbatches: ids.to_vec() });
    let (mut w, first, second) = (window(), Claim::default(), Claim::default());
    w.push(forward(&first), "f1");
    w.push(forward(&second), "f2");
    sent(&mut w);
    answer(&mut w, 1);
    w.disconnected();
    // The server has applied both forwards, or only the first one.
    assert_eq!(w.attached(2, &[1, 2]), Ok(()));
    assert_eq!(w.attached(2, &[1]), lost(&[2]));
    assert_eq!(w.attached(1, &[1]), Ok(()));
    assert_eq!(w.attached(1, &[]), lost(&[1]));
    // A backward whose answer was lost is recorded and needs no tape.
    w.push(backward(1, &first), "b1");
    assert_eq!(w.attached(3, &[2]), Ok(()));
    assert_eq!(w.attached(2, &[2]), lost(&[1]));
    drop(second);
    assert_eq!(w.attached(3, &[]), Ok(()));
    // The caller's claim is gone, but the backward on its way still has one.
    drop(first);
    assert_eq!(w.attached(2, &[]), lost(&[1]));
}
