use super::*;

fn eval(step: u64) -> Event {
    Event::Eval(EvalEvent { step, loss: 1.5, best: 1.25, ..EvalEvent::default() })
}

fn reporter(dir: &Path, step: u64) -> Reporter {
    let options = ReportOptions {
        output_dir: dir,
        step,
        n_steps: 9,
        log_interval: 1,
        quiet: true,
        tensorboard: false,
    };
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

/// Every event with all of its fields.
fn one_of_each() -> [Event; 6] {
    let extra: std::collections::BTreeMap<_, _> = [("rewards/margins".to_string(), 0.5)].into();
    let start = StartEvent {
        step: 0,
        n_steps: 9,
        model: "tiny".into(),
        split_point_1: 1,
        split_point_2: 2,
        loss: "dpo".into(),
        lora_rank: 8,
        samples: 4,
        eval_samples: 2,
        session: "s".into(),
        version: "0".into(),
    };
    let done = DoneEvent {
        step: 9,
        interrupted: false,
        seconds: 1.0,
        training_seconds: 1.0,
        wait_seconds: 0.0,
        tokens: 8,
        best: None,
        wire_error: WireErrors::default(),
    };
    [
        Event::Start(start),
        Event::Step(StepEvent { step: 1, extra: extra.clone(), ..StepEvent::default() }),
        Event::Eval(EvalEvent { step: 1, extra, ..EvalEvent::default() }),
        Event::Sample { step: 1, prompt: "a".into(), text: "b".into() },
        Event::Checkpoint { step: 1, name: "c".into() },
        Event::Done(done),
    ]
}

/// The words in code spans at the beginning of each row of the table below `heading`.
fn documented(page: &str, heading: &str) -> Vec<String> {
    let section =
        page.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}")).1;
    let section = section.split("\n#").next().unwrap();
    let first_cells =
        section.lines().filter_map(|line| line.strip_prefix("| `")?.split('|').next());
    let names = first_cells.flat_map(|cell| cell.split('`').step_by(2).map(str::to_string));
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn the_page_on_monitoring_names_every_field() {
    let page = include_str!("../../../../docs/monitoring.md");
    for event in one_of_each() {
        let Ok(Value::Object(line)) = serde_json::to_value(&event) else { panic!("{event:?}") };
        let kind = line["event"].as_str().unwrap();
        let mut fields: Vec<_> = line.keys().filter(|name| *name != "event").cloned().collect();
        fields.sort();
        assert_eq!(documented(page, &format!("### `{kind}`")), fields, "{kind}");
    }
}

#[test]
fn the_page_on_monitoring_names_every_tag() {
    let page = include_str!("../../../../docs/monitoring.md");
    let documented = documented(page, "## TensorBoard");
    for tag in one_of_each().iter().flat_map(tensorboard::tags) {
        let name = match tag.split_once('/') {
            Some(("rewards" | "eval_rewards", _)) => continue,
            Some(("Sample", _)) => "Sample/...".to_string(),
            _ => tag,
        };
        assert!(documented.contains(&name), "{name} is not in {documented:?}");
    }
}
