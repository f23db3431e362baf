//! The client's window under any requests and any answers, those of a server that keeps to the
//! protocol and those of one that does not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_client::fuzzing::{Done, NOBODY, Side};
use offshoot_proto::v1::{self, server_frame::Body};
use std::collections::{BTreeMap, BTreeSet};

fuzz_target!(|bytes: &[u8]| {
    let limits =
        v1::Limits { max_frames_in_flight: 4, max_open_microbatches: 2, ..Default::default() };
    let (mut side, mut tag, mut broken) = (Side::new(0, &limits), 0, false);
    let mut waiting = BTreeSet::new();
    // Microbatches with an answered forward, and the forward's tag.
    let mut open = BTreeMap::new();
    for op in bytes.chunks_exact(2) {
        let (what, which) = (op[0] % 12, u64::from(op[1]));
        let mut done = Vec::new();
        match what {
            0..=4 if side.has_room() => {
                tag += 1;
                waiting.insert(tag);
                match what {
                    0 => {
                        let mode = if which % 4 == 0 { v1::Mode::Eval } else { v1::Mode::Train };
                        let forward = v1::Forward { mode: mode as i32, ..Default::default() };
                        side.forward(forward, tag);
                    }
                    1 => match open.pop_first() {
                        Some((microbatch, of)) => side.backward(of, microbatch, tag),
                        None => side.step(v1::Step::default(), tag),
                    },
                    2 => side.step(v1::Step::default(), tag),
                    3 => side.extend(v1::Extend { cache: which, ..Default::default() }, tag),
                    _ => side.drop_cache(which, tag),
                }
            }
            5 => {
                if let Some((_, of)) = open.pop_last() {
                    side.give_up(of);
                }
            }
            6 => {
                let mut before = None;
                while let Some(frame) = side.send() {
                    assert_eq!(frame.acknowledged, side.answered());
                    assert!(frame.sequence > side.answered());
                    assert!(before.is_none_or(|before| frame.sequence == before + 1));
                    before = Some(frame.sequence);
                }
            }
            7 | 8 => {
                let sequence = match which % 8 {
                    0 => which / 8,
                    // Mostly the one that is due, or one of the next.
                    n => side.answered() + 1 + (n / 5),
                };
                let error = |code: v1::ErrorCode, retry_after_millis| {
                    let code = code as i32;
                    Body::Error(v1::FrameError { code, retry_after_millis, ..Default::default() })
                };
                let body = match (what, which / 64) {
                    (7, _) => Body::Step(v1::StepDone::default()),
                    (_, 0) => error(v1::ErrorCode::Exhausted, 5),
                    (_, 1) => error(v1::ErrorCode::Draining, 5),
                    (_, 2) => error(v1::ErrorCode::Invalid, 0),
                    _ => error(v1::ErrorCode::Sequence, 0),
                };
                match side.receive(v1::ServerFrame { sequence, body: Some(body) }) {
                    Some(some) => done = some,
                    None => broken = true,
                }
            }
            9 => side.release(),
            10 => broken = true,
            _ => {}
        }
        if broken {
            broken = false;
            done.extend(side.disconnected());
            let attached = v1::Attached {
                last_applied: side.answered() + which % 3,
                open_microbatches: open.keys().copied().collect(),
                ..Default::default()
            };
            let _ = side.attached(&attached);
        }
        for done in done {
            let tag = match done {
                Done::Applied { tag, microbatch } => {
                    if microbatch > 0 {
                        open.entry(microbatch).or_insert(tag);
                    }
                    tag
                }
                Done::Refused { tag } | Done::Aborted { tag } => tag,
            };
            assert!(tag == NOBODY || waiting.remove(&tag), "{tag} ended twice");
        }
    }
});
