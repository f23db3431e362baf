use super::*;
use crate::report::WireErrors;
use crate::{DoneEvent, EvalEvent};

/// Made by TensorBoard's own writer, see `make_events.py` beside it.
const REFERENCE: &[u8] = include_bytes!("../../../tests/tensorboard/events.tfevents");

const WALL_TIME: f64 = 1_790_000_000.25;

fn margins(value: f64) -> std::collections::BTreeMap<String, f64> {
    [("rewards/margins".to_string(), value)].into()
}

fn step(step: u64) -> Event {
    Event::Step(StepEvent {
        step,
        epoch: 0.25,
        loss: 2.0625,
        learning_rate: 1e-4,
        grad_norm: 0.7,
        tokens_per_second: 107.5,
        steps_per_second: 0.5,
        wait_seconds: 1.5,
        extra: margins(-0.125),
        ..StepEvent::default()
    })
}

fn eval(step: u64) -> Event {
    let extra = margins(0.5);
    Event::Eval(EvalEvent { step, loss: 1.75, best: 1.5, extra, ..EvalEvent::default() })
}

fn sample(step: u64) -> Event {
    let (prompt, text) = ("Why is the sky\nblue?".into(), " Größe.".into());
    Event::Sample { step, prompt, text }
}

fn bytes_of(what: impl IntoIterator<Item = (i64, What)>) -> Vec<u8> {
    let records = what
        .into_iter()
        .map(|(step, what)| framed(&Record { wall_time: WALL_TIME, step, what: Some(what) }));
    records.flatten().collect()
}

/// Every whole record of a file, and how many bytes stand behind them.
fn records(bytes: &[u8]) -> (Vec<Record>, usize) {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some((record, length)) = first_record(&bytes[at..]) {
        found.push(record);
        at += length;
    }
    (found, bytes.len() - at)
}

/// What each file of a run shows: the steps of its summaries.
fn steps_shown(output_dir: &Path) -> Vec<Vec<i64>> {
    let files = event_files(&output_dir.join(FOLDER)).unwrap();
    let shown = files.iter().map(|path| {
        let (records, rest) = records(&fs::read(path).unwrap());
        assert_eq!(rest, 0, "{path:?} has bytes that are no record");
        let summaries = records.iter().filter(|r| matches!(r.what, Some(What::Summary(_))));
        summaries.map(|record| record.step).collect()
    });
    shown.collect()
}

#[test]
fn events_are_what_tensorboards_own_writer_makes() {
    let version = (0, What::FileVersion("brain.Event:2".into()));
    let start = (5, What::SessionLog(SessionLog { status: START }));
    let events = [step(5), eval(5), sample(5)];
    let summaries = events.iter().map(|event| {
        let (step, summary) = summary(event).unwrap();
        (step as i64, What::Summary(summary))
    });
    let ours = bytes_of([version, start].into_iter().chain(summaries));
    let (theirs, rest) = records(REFERENCE);
    assert_eq!((theirs.len(), rest), (5, 0));
    assert_eq!(records(&ours).0, theirs);
    assert_eq!(ours, REFERENCE);
}

#[test]
fn a_run_that_goes_on_shows_no_step_twice_and_none_to_come() {
    let dir = tempfile::tempdir().unwrap();
    let mut board = TensorBoard::open(dir.path(), 0).unwrap();
    board.event(&eval(0)).unwrap();
    for n in 1..=6 {
        board.event(&step(n)).unwrap();
    }
    board.event(&eval(6)).unwrap();
    drop(board);
    // Died in the middle of a record.
    let first = event_files(&dir.path().join(FOLDER)).unwrap().remove(0);
    let mut bytes = fs::read(&first).unwrap();
    bytes.truncate(bytes.len() - 3);
    fs::write(&first, bytes).unwrap();

    let mut board = TensorBoard::open(dir.path(), 4).unwrap();
    assert_eq!(steps_shown(dir.path()), [vec![0, 1, 2, 3, 4], vec![]]);
    board.event(&step(5)).unwrap();
    board.event(&step(6)).unwrap();
    board.rewind(5).unwrap();
    board.event(&step(6)).unwrap();
    assert_eq!(steps_shown(dir.path()), [vec![0, 1, 2, 3, 4], vec![5], vec![6]]);

    // A TensorBoard that has already read the first two files takes steps back at this mark.
    let last = event_files(&dir.path().join(FOLDER)).unwrap().pop().unwrap();
    let (marks, _) = records(&fs::read(last).unwrap());
    assert_eq!(marks[1].what, Some(What::SessionLog(SessionLog { status: START })));
    assert_eq!(marks[1].step, 6);

    board.rewind(0).unwrap();
    assert!(steps_shown(dir.path()).concat().is_empty());
}

#[test]
fn later_files_have_later_names() {
    let name = |last: &str| next_name(Some(&PathBuf::from(last)));
    let far = "events.out.tfevents.9990000000.0009.offshoot";
    assert_eq!(name(far), "events.out.tfevents.9990000000.0010.offshoot");
    let (old, now) = ("events.out.tfevents.1000000000.0002.offshoot", next_name(None));
    assert!(name(old) > now && name(old).ends_with(".0003.offshoot"), "{}", name(old));
}

#[test]
fn what_is_no_curve_and_no_text_is_left_out() {
    let done = DoneEvent {
        step: 1,
        interrupted: false,
        seconds: 1.0,
        training_seconds: 1.0,
        wait_seconds: 0.0,
        tokens: 1,
        best: None,
        wire_error: WireErrors::default(),
    };
    assert!(summary(&Event::Done(done)).is_none());
    let long = "word ".repeat(40);
    assert_eq!(sample_tag(&long).len(), "Sample/".len() + TAG_CHARS);
}
