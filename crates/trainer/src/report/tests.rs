use super::*;

fn eval(step: u64) -> Event {
    Event::Eval(EvalEvent { step, loss: 1.5, best: 1.25, ..EvalEvent::default() })
}

fn reporter(dir: &Path, step: u64) -> Reporter {
    let options =
        ReportOptions { output_dir: dir, step, n_steps: 9, log_interval: 1, tensorboard: false };
    Reporter::new(&options).unwrap()
}

/// Kind and step of each line.
fn lines(dir: &Path) -> Vec<(String, u64)> {
    let text = fs::read_to_string(dir.join(METRICS_FILE)).unwrap();
    let parse = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        (event["event"].as_str().unwrap().to_string(), event["step"].as_u64().unwrap())
    };
    text.lines().map(parse).collect()
}

#[test]
fn a_resumed_run_goes_on_in_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut report = reporter(dir.path(), 0);
    for step in [0, 3, 6] {
        report.event(&eval(step)).unwrap();
    }
    drop(report);
    let path = dir.path().join(METRICS_FILE);
    fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"event\":\"st").unwrap();
    let mut report = reporter(dir.path(), 3);
    report.event(&eval(7)).unwrap();
    report.rewind(3).unwrap();
    report.event(&eval(8)).unwrap();
    let eval = |step: u64| ("eval".to_string(), step);
    assert_eq!(lines(dir.path()), [eval(0), eval(3), eval(8)]);
    reporter(dir.path(), 0);
    assert_eq!(lines(dir.path()), []);
}

#[test]
fn an_event_is_a_flat_object_with_its_time() {
    let dir = tempfile::tempdir().unwrap();
    reporter(dir.path(), 0).event(&eval(4)).unwrap();
    let text = fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
    let line: Value = serde_json::from_str(&text).unwrap();
    assert!(text.starts_with("{\"event\":\"eval\",\"step\":4,"), "{text}");
    assert_eq!((&line["loss"], &line["best"]), (&1.5.into(), &1.25.into()));
    let time = line["time"].as_str().unwrap();
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
    assert_eq!(shape, "9999-99-99T99:99:99.999Z", "{time}");
}
