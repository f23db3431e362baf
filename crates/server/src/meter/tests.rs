use super::meters::tell_all_now;
use super::*;
use crate::metrics::JobKind;
use crate::session::SessionId;
use crate::store::{Kept, Record, Store, tests as store_tests};
use serde_json::Value;
use std::path::Path;

fn ran(kind: JobKind, n_tokens: usize, millis: u64) -> Ran {
    let share = Duration::from_millis(millis);
    Ran { kind, n_tokens, queue: Duration::from_millis(2), execute: 2 * share, share }
}

#[test]
fn a_meter_counts_each_thing_once() {
    let meter = Meter::default();
    for (kind, n_tokens) in [(JobKind::Forward, 10), (JobKind::Evaluate, 5), (JobKind::Extend, 1)] {
        meter.ran(ran(kind, n_tokens, 100));
    }
    meter.ran(ran(JobKind::Backward, 10, 200));
    assert_eq!(meter.shared_loss(), None);
    meter.stepped(Phases::default(), None);
    meter.stepped(Phases::default(), Some(1.5));
    meter.stepped(Phases::default(), None);
    meter.received(100);
    meter.sent(40);
    meter.holds(7);
    meter.holds(9);
    meter.holds(8);
    let used = meter.snapshot();
    assert_eq!((used.tokens, used.steps, used.peak_bytes), (16, 3, 9));
    assert_eq!((used.bytes_in, used.bytes_out), (100, 40));
    assert!((used.device_seconds - 0.5).abs() < 1e-9, "{}", used.device_seconds);
    assert_eq!(meter.shared_loss(), Some(1.5));
    assert_eq!(meter.waits(), (4, Duration::from_millis(8)));
    // What the next life begins with.
    let again = Meter::new(None, meter.metered());
    assert_eq!(again.used(), meter.used());
    assert_eq!(again.metered(), meter.metered());
}

/// A session in a store, with the meters that it is counted in.
struct Rig {
    meters: Meters,
    store: Arc<Store>,
    id: SessionId,
    log: std::path::PathBuf,
    dir: tempfile::TempDir,
}

fn open_store(dir: &Path) -> Arc<Store> {
    Arc::new(Store::open(&dir.join("store"), Kept { of_client: 2, of_server: 2 }).unwrap())
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (store, id) = (open_store(dir.path()), SessionId::new());
        let meter = Arc::new(Meter::default());
        let (tenant, metering) = ("blue".into(), meter.metered());
        let record = Record { tenant, metering, ..store_tests::record() };
        store.create(id, record, store_tests::snapshot(0)).unwrap();
        let log = dir.path().join("metering.jsonl");
        let meters = Meters::start(None, Some(&log)).unwrap();
        meters.enter(id, meter);
        Rig { meters, store, id, log, dir }
    }

    fn meter(&self) -> Arc<Meter> {
        self.meters.get(self.id).unwrap()
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// As the server does when it starts again: the store is opened, and the session revived.
    fn restart(self) -> Rig {
        let Rig { meters, store, id, log, dir } = self;
        drop(meters);
        drop(store);
        let store = open_store(dir.path());
        let meters = Meters::start(None, Some(&log)).unwrap();
        meters.of(id, &"blue".into(), store.record(id).unwrap().unwrap().metering);
        Rig { meters, store, id, log, dir }
    }
}

#[test]
fn the_log_has_each_use_once_also_over_restarts() {
    let mut rig = Rig::new();
    let follow = |rig: &mut Rig| {
        let meters = Arc::new(std::mem::take(&mut rig.meters));
        rig.store.follow(meters.clone());
        meters
    };
    let meters = follow(&mut rig);
    let used = |meter: &Meter, n| {
        meter.ran(ran(JobKind::Forward, n, 10));
        meter.received(n);
    };
    used(&meters.get(rig.id).unwrap(), 100);
    tell_all_now(&meters, &rig.store);
    // Nothing happened since: no line.
    tell_all_now(&meters, &rig.store);
    used(&meters.get(rig.id).unwrap(), 20);
    drop(meters);
    // Killed: what is neither in the log nor with a snapshot is lost, what is told is not told again.
    let mut rig = rig.restart();
    let meters = follow(&mut rig);
    let meter = meters.get(rig.id).unwrap();
    assert_eq!(meter.used().tokens, 100);
    used(&meter, 3);
    assert!(meters.tell_left(rig.id, "blue", Left::Parked));
    rig.store.save_meter(rig.id).unwrap();
    meters.forget(rig.id);
    assert!(meters.get(rig.id).is_none());

    let lines = rig.lines();
    let all = |key: &str| lines.iter().map(|line| line[key].clone()).collect::<Vec<_>>();
    assert_eq!(all("why"), ["running", "parked"]);
    assert_eq!(all("tokens"), [100, 3]);
    assert_eq!(all("bytes_in"), [100, 3]);
    assert_eq!(all("device_seconds"), [0.01, 0.01]);
    assert!(lines.iter().all(|line| line["tenant"] == "blue"), "{lines:?}");
    assert!(lines.iter().all(|line| line["session"] == rig.id.to_string()), "{lines:?}");
    // One period after the other.
    assert_eq!(lines[0]["until"], lines[1]["since"]);
    assert!(lines[0]["since"].as_str() <= lines[0]["until"].as_str());
}

#[test]
fn what_cannot_be_written_is_written_later() {
    let rig = Rig::new();
    rig.meter().received(5);
    // Nobody can append to a folder.
    std::fs::remove_file(&rig.log).unwrap();
    std::fs::create_dir(&rig.log).unwrap();
    assert!(!rig.meters.tell_left(rig.id, "blue", Left::Closed));
    std::fs::remove_dir(&rig.log).unwrap();
    assert!(rig.meters.tell_left(rig.id, "blue", Left::Closed));
    let text = std::fs::read_to_string(&rig.log).unwrap();
    let line: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!((&line["bytes_in"], &line["why"]), (&5.into(), &"closed".into()));
}

#[test]
fn a_log_that_cannot_be_opened_is_said_at_the_start() {
    let Err(error) = Meters::start(None, Some(Path::new("/dev/null/metering.jsonl"))) else {
        panic!("there is no such folder")
    };
    assert!(error.to_string().contains("metering log /dev/null/metering.jsonl"), "{error}");
}
