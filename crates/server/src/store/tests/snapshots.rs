use super::*;

#[test]
fn a_session_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    store.create(session, record(), snapshot(0)).unwrap();
    let taken = store.add_snapshot(session, snapshot(4)).unwrap();
    drop(store);

    let store = open(&dir, 3).unwrap();
    let found = store.record(session).unwrap().unwrap();
    assert_eq!(found.head().unwrap(), &taken);
    assert_eq!((taken.step, taken.sequence, taken.bytes), (4, 12, 1010));
    let read = store.read(session, &taken).unwrap();
    assert_eq!(read.state, vec![4; 1000]);
    assert_eq!(read.answers.unwrap(), vec![4; 10]);
}

#[test]
fn the_last_few_snapshots_are_kept_and_the_files_of_others_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let (session, other) = (SessionId::new(), SessionId::new());
    store.create(session, record(), snapshot(0)).unwrap();
    // The same content, named twice.
    store.create(other, record(), snapshot(0)).unwrap();
    for step in 1..=3 {
        store.add_snapshot(session, snapshot(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [2, 3]);
    assert_eq!(files(&store), named(&store));
    let first = store.record(other).unwrap().unwrap();
    store.read(other, first.head().unwrap()).unwrap();

    store.forget(session).unwrap();
    store.forget(other).unwrap();
    assert!(files(&store).is_empty());
    assert!(store.record(session).unwrap().is_none());
}

#[test]
fn what_the_client_still_names_is_kept_until_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    let mut names: Vec<String> = Vec::new();
    for step in 1..=3 {
        let unknown = "99-step99".to_string();
        let keep: Vec<String> = std::iter::once(unknown).chain(names.clone()).collect();
        store.keep(session, &keep).unwrap();
        names.push(store.add_snapshot(session, snapshot(step)).unwrap().id);
    }
    assert_eq!(kept(&store, session), [0, 1, 2, 3]);
    // The first two of those named that are there, the last two, and what the server took itself.
    store.keep(session, &[names[0].clone(), names[0].clone(), names[1].clone()]).unwrap();
    for step in 4..=9 {
        store.add_snapshot(session, snapshot(step)).unwrap();
        store.add_snapshot(session, own(step + 10)).unwrap();
    }
    assert_eq!(kept(&store, session), [1, 2, 8, 9, 19]);
    drop(store);
    let store = open(&dir, 2).unwrap();
    store.keep(session, &names[1..2]).unwrap();
    store.add_snapshot(session, snapshot(20)).unwrap();
    assert_eq!(kept(&store, session), [2, 9, 19, 20]);
    assert_eq!(files(&store), named(&store));
    // Never more than as many as are kept of the last.
    let all: Vec<String> =
        store.record(session).unwrap().unwrap().snapshots.iter().map(|s| s.id.clone()).collect();
    store.keep(session, &all).unwrap();
    store.add_snapshot(session, snapshot(21)).unwrap();
    store.add_snapshot(session, snapshot(22)).unwrap();
    assert_eq!(kept(&store, session), [2, 9, 19, 21, 22]);
}

#[test]
fn sessions_are_written_at_once_and_no_file_is_lost_or_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let session = SessionId::new();
                store.create(session, record(), snapshot(0)).unwrap();
                for step in 1..12 {
                    // All have the same content at the same step: they name each other's files.
                    let taken = store.add_snapshot(session, snapshot(step)).unwrap();
                    assert_eq!(store.read(session, &taken).unwrap().state, vec![step as u8; 1000]);
                }
                if kept(&store, session) != [10, 11] {
                    panic!("{:?}", kept(&store, session));
                }
            });
        }
    });
    assert_eq!(files(&store), named(&store));
    assert_eq!(files(&store).len(), 4);
}

#[test]
fn what_the_server_takes_by_itself_pushes_out_nothing_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    store.add_snapshot(session, snapshot(1)).unwrap();
    for step in 2..=5 {
        store.add_snapshot(session, own(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [1, 5]);
    for step in 6..=8 {
        store.add_snapshot(session, snapshot(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [5, 7, 8]);
    // A session that was set back to one of the server's goes on from there.
    let oldest = store.record(session).unwrap().unwrap().snapshots[0].clone();
    store.set_head(session, &oldest.id, 0).unwrap();
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap().step, 5);
    store.add_snapshot(session, own(9)).unwrap();
    assert_eq!(kept(&store, session), [7, 8, 9]);
    assert_eq!(files(&store), named(&store));
}

#[test]
fn a_snapshot_of_the_server_can_become_one_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 2).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    store.add_snapshot(session, snapshot(1)).unwrap();
    // At the same point, as after a drain; and while it is parked.
    let drained = store.add_snapshot(session, own(2)).unwrap();
    assert_eq!(drained.origin, Origin::Server);
    let asked = store.add_snapshot(session, snapshot(2)).unwrap();
    assert_eq!((&asked.id, asked.origin), (&drained.id, Origin::Client));
    assert_eq!(store.add_snapshot(session, own(2)).unwrap(), asked);
    let parked = store.add_snapshot(session, own(3)).unwrap();
    assert_eq!(store.claim_head(session).unwrap().id, parked.id);
    for step in 4..=6 {
        store.add_snapshot(session, own(step)).unwrap();
    }
    assert_eq!(kept(&store, session), [2, 3, 6]);

    // Set back and asked for again: the newest of its kind, and the one before goes first.
    store.set_head(session, &asked.id, 0).unwrap();
    store.add_snapshot(session, snapshot(2)).unwrap();
    store.add_snapshot(session, snapshot(7)).unwrap();
    assert_eq!(kept(&store, session), [6, 2, 7]);
    assert_eq!(files(&store), named(&store));
    store.forget(session).unwrap();
    assert!(files(&store).is_empty());
}

#[test]
fn a_snapshot_asked_for_twice_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    store.create(session, record(), snapshot(0)).unwrap();
    let first = store.add_snapshot(session, snapshot(1)).unwrap();
    assert_eq!(store.add_snapshot(session, snapshot(1)).unwrap(), first);
    assert_eq!(store.record(session).unwrap().unwrap().snapshots.len(), 2);
}

#[test]
fn an_earlier_point_that_lands_late_is_kept_and_is_no_head() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Kept { of_client: 3, of_server: 2 }).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    let newer = store.add_snapshot(session, snapshot(4)).unwrap();
    store.add_snapshot(session, own(3)).unwrap();
    let found = store.record(session).unwrap().unwrap();
    assert_eq!(found.head().unwrap(), &newer);
    assert_eq!(kept(&store, session), [0, 3, 4]);
    store.add_snapshot(session, own(5)).unwrap();
    assert_eq!(kept(&store, session), [3, 4, 5]);
}

#[test]
fn what_an_actor_that_ended_was_writing_does_not_land() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    let first = store.create(session, record(), own(0)).unwrap();
    let ended = AtomicBool::new(false);
    let second = store.add_snapshot_unless(&ended, session, own(1)).unwrap();
    ended.store(true, Ordering::Release);
    let late = store.add_snapshot_unless(&ended, session, own(2));
    assert!(matches!(late, Err(Error::Ended)));
    assert_eq!(store.record(session).unwrap().unwrap().head().unwrap(), &second);
    assert_ne!(first.id, second.id);
    assert_eq!(files(&store), named(&store));
}

#[test]
fn a_client_that_was_taken_over_from_stays_so_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let session = SessionId::new();
    let store = open(&dir, 3).unwrap();
    let first = store.create(session, record(), own(0)).unwrap();
    store.set_epoch(session, 7).unwrap();
    store.set_epoch(session, 5).unwrap();
    store.set_head(session, &first.id, 6).unwrap();
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert_eq!(store.whole_head(session).unwrap().epoch, 7);
}

#[test]
fn one_snapshot_is_deleted_with_its_files_but_never_the_one_that_the_session_goes_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 3).unwrap();
    let session = SessionId::new();
    store.create(session, record(), own(0)).unwrap();
    let [first, second, head] = [1, 2, 3].map(|step| {
        let taken = store.add_snapshot(session, snapshot(step)).unwrap();
        assert_eq!((taken.reason(), own(step).why.origin()), ("client", Origin::Server));
        assert!(taken.taken_millis > 1_700_000_000_000);
        taken.id
    });
    store.keep(session, std::slice::from_ref(&first)).unwrap();
    let told = |id: &str| store.delete_snapshot(session, id).unwrap_err();
    assert!(matches!(told(&head), Error::HeadSnapshot { .. }));
    assert!(matches!(told("9-step9"), Error::UnknownSnapshot { .. }));
    store.delete_snapshot(session, &first).unwrap();
    assert!(matches!(told(&first), Error::UnknownSnapshot { .. }));
    let left = store.record(session).unwrap().unwrap();
    assert_eq!((left.head.as_str(), left.kept.len()), (head.as_str(), 0));
    assert_eq!(files(&store), named(&store));
    drop(store);
    let store = open(&dir, 3).unwrap();
    assert!(!kept(&store, session).contains(&1) && kept(&store, session).contains(&2));
    assert!(store.read(session, left.snapshot(&second).unwrap()).is_ok());
}
