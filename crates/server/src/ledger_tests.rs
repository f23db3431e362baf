use super::*;
use tokio_stream::StreamExt as _;

use BytesKind::{Adapters, Caches, Tapes, Weights, Workspace};

fn is_ready(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::Pin::new(future).poll(&mut context).is_ready()
}

#[test]
fn bytes_are_taken_at_once_or_not_at_all() {
    let ledger = Ledger::new(Some(100));
    let weights = ledger.reserve(Weights, 60).unwrap();
    let tape = ledger.reserve(Tapes, 30).unwrap();
    let shortage = ledger.reserve(Workspace, 11).unwrap_err();
    assert_eq!(shortage, Shortage { kind: Workspace, need: 11, free: 10, budget: 100 });
    let text = shortage.to_string();
    assert!(["11", "10", "100", "workspace"].iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(ledger.free(), Some(10));
    drop(tape);
    assert_eq!(ledger.free(), Some(40));
    let _workspace = ledger.reserve(Workspace, 40).unwrap();
    assert_eq!(ledger.free(), Some(0));
    assert_eq!(weights.bytes(), 60);
}

#[test]
fn peaks_are_kept_by_kind_and_in_all() {
    let ledger = Ledger::new(None);
    drop(ledger.reserve(Tapes, 50).unwrap());
    drop(ledger.reserve(Workspace, 70).unwrap());
    let _adapters = ledger.reserve(Adapters, 10).unwrap();
    let Usage { budget, now, peak, peak_total } = ledger.usage();
    assert_eq!(budget, None);
    assert_eq!(now, ByKind { adapters: 10, ..ByKind::default() });
    assert_eq!(peak, ByKind { adapters: 10, tapes: 50, workspace: 70, ..ByKind::default() });
    assert_eq!(peak_total, 70);
    assert_eq!(ledger.free(), None);
}

#[test]
fn a_reservation_grows_and_shrinks_or_stays() {
    let ledger = Ledger::new(Some(100));
    let mut tape = ledger.reserve(Tapes, 80).unwrap();
    let shortage = tape.resize(101).unwrap_err();
    assert_eq!((shortage.need, shortage.free), (21, 20));
    assert_eq!((tape.bytes(), ledger.usage().now.tapes), (80, 80));
    tape.resize(100).unwrap();
    assert_eq!(ledger.free(), Some(0));
    tape.resize(5).unwrap();
    assert_eq!((tape.bytes(), ledger.free()), (5, Some(95)));
    tape.shrink_to(9);
    assert_eq!((tape.bytes(), ledger.free()), (5, Some(95)));
    tape.shrink_to(2);
    assert_eq!((tape.bytes(), ledger.free()), (2, Some(98)));
    drop(tape);
    assert_eq!(ledger.usage().now, ByKind::default());
}

#[test]
fn what_is_missing_and_what_never_fits() {
    let ledger = Ledger::new(Some(100));
    let _weights = ledger.reserve(Weights, 40).unwrap();
    let _adapters = ledger.reserve(Adapters, 50).unwrap();
    ledger.set_work_room(6);
    assert_eq!((ledger.missing(Adapters, 4), ledger.missing(Adapters, 9)), (0, 5));
    assert_eq!((ledger.missing(Workspace, 10), ledger.missing(Tapes, 11)), (0, 1));
    assert_eq!((ledger.most(Adapters), ledger.most(Tapes)), (Some(54), Some(60)));
    assert_eq!(Ledger::new(None).most(Adapters), None);
    assert_eq!(Ledger::new(None).missing(Adapters, u64::MAX), 0);
}

#[test]
fn what_is_there_already_counts_beyond_the_budget() {
    let ledger = Ledger::new(Some(10));
    let there = ledger.count(Workspace, 25);
    assert_eq!(ledger.free(), Some(0));
    assert!(ledger.reserve(Tapes, 1).is_err());
    drop(there);
    assert_eq!(ledger.free(), Some(10));
    assert_eq!(ledger.usage().peak_total, 25);
}

#[test]
fn adapters_leave_room_for_work() {
    let ledger = Ledger::new(Some(100));
    let _weights = ledger.reserve(Weights, 40).unwrap();
    ledger.set_work_room(20);
    assert_eq!(ledger.reserve(Adapters, 41).unwrap_err().free, 40);
    let _first = ledger.reserve(Adapters, 30).unwrap();
    // Work in its room does not push adapters away, and work may take all that is left.
    let tape = ledger.reserve(Tapes, 20).unwrap();
    let second = ledger.reserve(Adapters, 10).unwrap();
    drop((tape, second));
    let _work = ledger.reserve(Workspace, 30).unwrap();
    // A room that is larger than half of what the weights leave is cut to that.
    ledger.set_work_room(1000);
    assert_eq!(ledger.reserve(Adapters, 1).unwrap_err().free, 0);
    assert_eq!(ledger.free(), Some(0));
}

#[tokio::test]
async fn caches_leave_the_same_room_and_press_for_what_is_beside_it() {
    let ledger = Ledger::new(Some(100));
    let _weights = ledger.reserve(Weights, 40).unwrap();
    ledger.set_work_room(20);
    let idle = ledger.reserve(Adapters, 30).unwrap();
    let shortage = ledger.reserve(Caches, 15).unwrap_err();
    assert_eq!((shortage.free, ledger.free()), (10, Some(30)));
    assert!(shortage.to_string().contains("caches"), "{shortage}");
    ledger.press(shortage);
    let wanted = ledger.pressed().await;
    assert_eq!(ledger.missing(Workspace, wanted), 5);
    idle.shrink_to(25);
    assert_eq!(ledger.missing(Workspace, wanted), 0);
    let _cache = ledger.reserve(Caches, 15).unwrap();
    assert_eq!(ledger.usage().now.caches, 15);
    // Work is never short of its room because of them.
    let _work = ledger.reserve(Workspace, 20).unwrap();
}

#[test]
fn slack_is_what_was_not_wanted_for_a_while_and_is_told_once() {
    let ledger = Ledger::new(Some(1000));
    let weights = ledger.reserve(Weights, 100).unwrap();
    let leaver = ledger.reserve(Adapters, 300).unwrap();
    let microbatch = || drop(ledger.reserve(Tapes, 200).unwrap());
    microbatch();
    drop(leaver);
    // One look sees that it went, the next that nobody came for it.
    assert_eq!(ledger.take_slack(1), 0);
    microbatch();
    assert_eq!(ledger.take_slack(1), 0);
    microbatch();
    assert_eq!(ledger.take_slack(301), 0, "too little");
    microbatch();
    assert_eq!(ledger.take_slack(300), 300, "none of what microbatches want again and again");
    for _ in 0..3 {
        microbatch();
        assert_eq!(ledger.take_slack(1), 0);
    }
    // Training has ended.
    assert_eq!((ledger.take_slack(1), ledger.take_slack(1)), (0, 200));
    assert_eq!(ledger.take_slack(1), 0);
    assert_eq!(weights.bytes(), 100);
}

#[test]
fn no_freed_byte_is_missed() {
    let ledger = Ledger::new(Some(10));
    let taken = ledger.reserve(Tapes, 10).unwrap();
    let mut freed = Box::pin(ledger.freed());
    // Before the first poll.
    drop(taken);
    assert!(is_ready(&mut freed));
    let mut later = Box::pin(ledger.freed());
    assert!(!is_ready(&mut later));
    let mut taken = ledger.reserve(Tapes, 10).unwrap();
    taken.resize(10).unwrap();
    assert!(!is_ready(&mut later));
    taken.resize(9).unwrap();
    assert!(is_ready(&mut later));
}

#[tokio::test]
async fn many_wait_and_all_are_served() {
    let ledger = Ledger::new(Some(3));
    let work = |_| {
        let ledger = ledger.clone();
        async move {
            loop {
                let freed = ledger.freed();
                match ledger.reserve(Workspace, 2) {
                    Ok(taken) => {
                        tokio::task::yield_now().await;
                        return taken.bytes();
                    }
                    Err(_) => freed.await,
                }
            }
        }
    };
    let tasks: Vec<_> = (0..50).map(work).map(tokio::spawn).collect();
    let mut served = 0;
    let mut tasks = tokio_stream::iter(tasks);
    while let Some(task) = tasks.next().await {
        served += task.await.unwrap();
    }
    assert_eq!(served, 100);
    assert_eq!(ledger.usage().now.total(), 0);
    assert_eq!(ledger.usage().peak_total, 2);
}

#[tokio::test]
async fn pressure_says_how_much_is_needed() {
    let ledger = Ledger::new(Some(10));
    let _taken = ledger.reserve(Adapters, 8).unwrap();
    for need in [5, 9, 4] {
        let shortage = ledger.reserve(Workspace, need).unwrap_err();
        ledger.press(shortage);
    }
    assert_eq!(ledger.pressed().await, 9);
    let waiting = {
        let ledger = ledger.clone();
        tokio::spawn(async move { ledger.pressed().await })
    };
    tokio::task::yield_now().await;
    ledger.press(ledger.reserve(Tapes, 3).unwrap_err());
    assert_eq!(waiting.await.unwrap(), 3);
}
