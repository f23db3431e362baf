use super::*;
use offshoot_proto::v1::{StepDone, server_frame::Body};

fn state() -> SessionState {
    let limits = FrameLimits { max_frames_in_flight: 3, max_open_microbatches: 2 };
    SessionState::new(limits, Resume::default())
}

fn head(sequence: u64, effect: Effect) -> Head {
    let mut digest = [0; 32];
    digest[0] = sequence as u8;
    Head { sequence, acknowledged: 0, digest, effect }
}

/// An answer that tells which frame it answers.
fn answer(sequence: u64) -> ServerFrame {
    ServerFrame { sequence, body: Some(Body::Step(StepDone { step: sequence, snapshot: false })) }
}

fn run(state: &mut SessionState, head: &Head) -> Ticket {
    match state.admit(head) {
        Ok(Admission::Run(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

fn applied(state: &mut SessionState, ticket: Ticket, sequence: u64) {
    let step = Some(sequence);
    state.settle(ticket, Settled::Applied { answer: Box::new(answer(sequence)), bytes: 10, step });
}

fn refused(state: &mut SessionState, ticket: Ticket) {
    state.settle(ticket, Settled::Refused { lost: None });
}

fn go(state: &mut SessionState, head: &Head) {
    let ticket = run(state, head);
    applied(state, ticket, head.sequence);
}

#[test]
fn a_repeated_frame_gets_the_recorded_answer() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Nothing));
    go(&mut state, &head(2, Effect::Nothing));
    for _ in 0..2 {
        assert_eq!(
            state.admit(&head(1, Effect::Nothing)).unwrap(),
            Admission::Answered(Box::new(answer(1)))
        );
    }
    assert_eq!(state.applied(), 2);
}

#[test]
fn another_payload_under_a_used_number_is_refused() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Nothing));
    let mut other = head(1, Effect::Nothing);
    other.digest[5] = 1;
    assert!(matches!(state.admit(&other), Err(Error::Payload { sequence: 1 })));
    // Also while the first is still being computed.
    let ticket = run(&mut state, &head(2, Effect::Nothing));
    let other = Head { sequence: 2, ..other };
    assert!(matches!(state.admit(&other), Err(Error::Payload { sequence: 2 })));
    assert_eq!(state.admit(&head(2, Effect::Nothing)).unwrap(), Admission::Joined(ticket));
}

#[test]
fn a_gap_is_refused_and_named() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Nothing));
    let error = state.admit(&head(3, Effect::Nothing)).unwrap_err();
    assert!(matches!(error, Error::Gap { found: 3, expected: 2 }));
    // 0 is Hello's.
    assert!(state.admit(&head(0, Effect::Nothing)).is_err());
}

#[test]
fn answers_are_forgotten_when_acknowledged_or_out_of_the_window() {
    let mut state = state();
    for sequence in 1..=5 {
        go(&mut state, &head(sequence, Effect::Nothing));
    }
    let kept = |state: &SessionState| -> Vec<u64> {
        state.resume().answers.iter().map(|a| a.sequence).collect()
    };
    assert_eq!(kept(&state), [3, 4, 5]);
    let error = state.admit(&head(2, Effect::Nothing)).unwrap_err();
    assert!(matches!(error, Error::Forgotten { sequence: 2, applied: 5 }));
    go(&mut state, &Head { acknowledged: 4, ..head(6, Effect::Nothing) });
    assert_eq!(kept(&state), [5, 6]);
    assert!(matches!(state.admit(&head(4, Effect::Nothing)), Err(Error::Forgotten { .. })));
    assert!(matches!(state.acknowledge(7), Err(Error::Acknowledged { found: 7, applied: 6 })));
}

#[test]
fn microbatches_have_an_order() {
    let mut state = state();
    assert!(matches!(
        state.admit(&head(1, Effect::Close(9))),
        Err(Error::NoTape { microbatch: 9 })
    ));
    go(&mut state, &head(1, Effect::Open(9)));
    assert_eq!(state.open().get(&9), Some(&10));
    assert!(matches!(
        state.admit(&head(2, Effect::Open(9))),
        Err(Error::OpenTape { microbatch: 9 })
    ));
    assert!(matches!(
        state.admit(&head(2, Effect::Step)),
        Err(Error::StepWithOpen { microbatch: 9 })
    ));
    // What is in flight counts as done.
    let open = run(&mut state, &head(2, Effect::Open(8)));
    assert!(matches!(
        state.admit(&head(3, Effect::Open(7))),
        Err(Error::OpenMicrobatches { limit: 2 })
    ));
    let close = run(&mut state, &head(3, Effect::Close(8)));
    applied(&mut state, open, 2);
    applied(&mut state, close, 3);
    go(&mut state, &head(4, Effect::Close(9)));
    assert!(state.open().is_empty());
    go(&mut state, &head(5, Effect::Step));
    assert_eq!(state.step(), 5);
}

#[test]
fn a_discard_closes_what_is_open_and_minds_nothing_else() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Discard(9)));
    go(&mut state, &head(2, Effect::Open(9)));
    let open = run(&mut state, &head(3, Effect::Open(8)));
    // Also of a forward that is in flight; what it held may be opened again behind it.
    let discard = run(&mut state, &head(4, Effect::Discard(8)));
    let again = run(&mut state, &head(5, Effect::Open(7)));
    applied(&mut state, open, 3);
    applied(&mut state, discard, 4);
    applied(&mut state, again, 5);
    assert_eq!(state.open().keys().copied().collect::<Vec<_>>(), [7, 9]);
    state.drain();
    for (sequence, microbatch) in [(6, 7), (7, 9)] {
        go(&mut state, &head(sequence, Effect::Discard(microbatch)));
    }
    assert!(state.is_quiet());
}

#[test]
fn a_client_may_not_run_further_ahead_than_its_limit() {
    let mut state = state();
    for sequence in 1..=3 {
        run(&mut state, &head(sequence, Effect::Nothing));
    }
    assert!(matches!(state.admit(&head(4, Effect::Nothing)), Err(Error::InFlight { limit: 3 })));
    applied(&mut state, Ticket(0), 1);
    run(&mut state, &head(4, Effect::Nothing));
}

#[test]
fn a_refused_frame_dooms_those_behind_it_and_frees_its_number() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Open(1)));
    let close = run(&mut state, &head(2, Effect::Close(1)));
    let step = run(&mut state, &head(3, Effect::Step));
    refused(&mut state, close);
    assert_eq!(state.expected_applied(), 1);
    // The number is free, for another payload too, while the doomed frame is on its way back.
    let mut again = head(2, Effect::Close(1));
    again.digest[9] = 1;
    let close = run(&mut state, &again);
    refused(&mut state, step);
    let step = run(&mut state, &head(3, Effect::Step));
    applied(&mut state, close, 2);
    applied(&mut state, step, 3);
    assert_eq!((state.applied(), state.step()), (3, 3));
}

#[test]
fn a_tape_that_was_used_up_by_a_refusal_is_gone() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Open(1)));
    let close = run(&mut state, &head(2, Effect::Close(1)));
    state.settle(close, Settled::Refused { lost: Some(1) });
    assert!(matches!(state.admit(&head(2, Effect::Close(1))), Err(Error::NoTape { .. })));
    assert_eq!(state.applied(), 1);
}

#[test]
fn a_drain_lets_open_microbatches_finish_and_waits_for_no_step() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Open(1)));
    state.drain();
    assert!(matches!(state.admit(&head(2, Effect::Open(2))), Err(Error::Draining { .. })));
    assert!(!state.is_quiet(), "a tape is held, which no snapshot has");
    let close = run(&mut state, &head(2, Effect::Close(1)));
    assert!(!state.is_quiet(), "the engine is still at it");
    applied(&mut state, close, 2);
    assert!(state.is_quiet(), "the gradients are in the snapshot");
    // A Step that comes at once is taken.
    let step = run(&mut state, &head(3, Effect::Step));
    assert!(!state.is_quiet());
    applied(&mut state, step, 3);
    assert!(state.is_quiet());
}

#[test]
fn caches_count_until_a_step_and_keep_nobody_from_leaving() {
    let mut state = state();
    go(&mut state, &head(1, Effect::Extend(1)));
    go(&mut state, &head(2, Effect::Extend(2)));
    // It has grown, or begun anew: it is still one.
    go(&mut state, &head(3, Effect::Extend(1)));
    assert_eq!(state.cache_bytes(), 20);
    assert!(state.is_quiet());
    go(&mut state, &head(4, Effect::DropCache(2)));
    go(&mut state, &head(5, Effect::DropCache(9)));
    assert_eq!(state.cache_bytes(), 10);
    go(&mut state, &head(6, Effect::Step));
    assert_eq!(state.cache_bytes(), 0);
    go(&mut state, &head(7, Effect::Extend(1)));
    state.drop_caches();
    assert_eq!(state.cache_bytes(), 0);
    // They would not outlive the server.
    state.drain();
    assert!(matches!(state.admit(&head(8, Effect::Extend(1))), Err(Error::Draining { .. })));
    go(&mut state, &head(8, Effect::DropCache(1)));
}

#[test]
fn a_session_comes_back_with_its_answers_and_without_its_tapes() {
    let mut before = state();
    go(&mut before, &head(1, Effect::Open(1)));
    go(&mut before, &head(2, Effect::Close(1)));
    go(&mut before, &head(3, Effect::Open(2)));
    let limits = FrameLimits { max_frames_in_flight: 3, max_open_microbatches: 2 };
    let mut after = SessionState::new(limits, before.resume());
    assert_eq!(after.applied(), 3);
    assert_eq!(
        after.admit(&head(3, Effect::Open(2))).unwrap(),
        Admission::Answered(Box::new(answer(3)))
    );
    assert!(matches!(after.admit(&head(4, Effect::Close(2))), Err(Error::NoTape { .. })));
    go(&mut after, &head(4, Effect::Open(3)));
}
