//! Where texts come from makes no difference to what is learned from them.

use super::{Place, assert_same_adapters, run};
use offshoot_tests::TestServer;
use offshoot_trainer::data::source::{self, DataSource, DataSpec, Located, Record, Sources};
use offshoot_trainer::{CancelToken, TrainError, TrainOptions, train_with_sources};
use std::fmt::Write;
use std::fs;

/// Paragraphs in memory.
struct Paragraphs(Vec<String>);

impl Paragraphs {
    fn of(place: &Place) -> Paragraphs {
        let text = fs::read_to_string(place.dir.path().join("train.txt")).unwrap();
        Paragraphs(text.split("\n\n").map(|text| text.trim().to_string()).collect())
    }

    fn sources(&self) -> Sources {
        Sources { train: vec![Box::new(Paragraphs(self.0.clone()))], eval: Vec::new() }
    }
}

impl DataSource for Paragraphs {
    fn name(&self) -> String {
        "memory".into()
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        Ok(Box::new(self.0.iter().enumerate().filter(|(_, text)| !text.is_empty()).map(
            |(i, text)| Ok((source::Place::row("memory", i + 1), Record::Text(text.clone()))),
        )))
    }
}

/// Five steps.
fn options(place: &Place, server: &TestServer, output: &str) -> TrainOptions {
    let mut options = place.options(server, output);
    options.steps.max_steps = Some(5);
    options.sources.eval_files.clear();
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn own_sources_and_tables_train_like_the_text_file() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let text_file = run(options(&place, &server, "text_file")).await;
    let adapter = text_file.adapter.clone().unwrap();

    let paragraphs = Paragraphs::of(&place);
    let mut own = options(&place, &server, "own");
    // What it names is not looked at.
    own.sources = DataSpec::files(vec!["nowhere.txt".into()]);
    let summary =
        train_with_sources(own.clone(), paragraphs.sources(), CancelToken::default()).await;
    let summary = summary.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(summary.losses, text_file.losses);
    assert_same_adapters(&summary.adapter.unwrap(), &adapter);

    // Again from its checkpoint.
    own.output.resume = Some(place.dir.path().join("own/checkpoint_step_4").display().to_string());
    own.output.dir = place.dir.path().join("resumed");
    let resumed = train_with_sources(own, paragraphs.sources(), CancelToken::default());
    assert_eq!(resumed.await.unwrap().losses, text_file.losses[4..]);

    let mut csv = "id,body\n".to_string();
    for (i, text) in paragraphs.0.iter().enumerate().filter(|(_, text)| !text.is_empty()) {
        writeln!(csv, "{i},\"{text}\"").unwrap();
    }
    let table = place.dir.path().join("table.csv");
    fs::write(&table, csv).unwrap();
    let mut of_table = options(&place, &server, "table");
    of_table.sources = DataSpec::files(vec![table]);
    of_table.sources.columns.text = Some("body".into());
    assert_eq!(run(of_table).await.losses, text_file.losses);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn splits_and_held_out_parts_are_evaluated_on() {
    let place = Place::new();
    let server = TestServer::start_with(place.server()).await;
    let folder = place.dir.path().join("set");
    fs::create_dir_all(folder.join("train")).unwrap();
    fs::create_dir_all(folder.join("dev")).unwrap();
    fs::copy(place.dir.path().join("train.txt"), folder.join("train/a.txt")).unwrap();
    fs::write(folder.join("dev/a.txt"), "The trunk holds the branches.").unwrap();

    let text_file = run(options(&place, &server, "text_file")).await;
    assert!(text_file.evaluations.is_empty());
    let mut of_folder = options(&place, &server, "folder");
    of_folder.sources =
        DataSpec { dataset_name: Some(folder.display().to_string()), ..DataSpec::default() };
    let of_folder = run(of_folder).await;
    assert_eq!(of_folder.losses, text_file.losses);
    assert!(!of_folder.evaluations.is_empty());

    let mut held_out = options(&place, &server, "held_out");
    held_out.sources.eval_fraction = 0.3;
    let held_out = run(held_out).await;
    assert!(!held_out.evaluations.is_empty());
    assert_ne!(held_out.losses, text_file.losses);
    server.drain().await;
}
