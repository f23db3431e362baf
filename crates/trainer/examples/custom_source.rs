//! Training on texts that lie in no file of a known kind: here a help desk's transcript, read from
//! its own notation. Any iterator of records is a source.
//!
//! ```text
//! cargo run -p offshoot-trainer --example custom_source                     # shows the samples
//! cargo run -p offshoot-trainer --example custom_source MODEL SERVER        # trains five steps
//! ```
//!
//! MODEL is a path or hub name, SERVER the address of an `offshoot serve` that holds its trunk.

use offshoot_model::weights::Checkpoint;
use offshoot_trainer::data::source::{DataSource, Located, Place, Record, Sources};
use offshoot_trainer::data::{DataOptions, DataSet};
use offshoot_trainer::tokenizer::Tokenizer;
use offshoot_trainer::{CancelToken, TrainError, TrainOptions, train_with_sources};

const TRANSCRIPT: &str = "\
[09:12] caller> The printer prints blank pages.
[09:12] desk> Take the tape off the new cartridge.
[09:40] caller> My screen is upside down.
[09:41] desk> Press Ctrl, Alt and the up arrow together.
[10:03] caller> I cannot log in since the holidays.
[10:04] desk> Your password has expired. Choose a new one on the login page.
[10:31] caller> The network drive is gone.
[10:33] desk> Connect to the VPN first, then open the drive again.
";

/// Each answer of the desk with the call before it.
struct Transcript {
    name: String,
    text: String,
}

impl DataSource for Transcript {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn records(&self) -> Result<Box<dyn Iterator<Item = Located> + Send + '_>, TrainError> {
        let mut call = String::new();
        Ok(Box::new(self.text.lines().enumerate().filter_map(move |(i, line)| {
            let place = Place::line(self.name.as_str(), i + 1);
            let Some((_, said)) = line.split_once("] ") else {
                return Some(
                    Err(place.wrong("expected \"[HH:MM] \" at the beginning of the line")),
                );
            };
            match said.split_once("> ") {
                Some(("caller", text)) => {
                    call = text.to_string();
                    None
                }
                Some(("desk", text)) => {
                    let (prompt, completion) = (std::mem::take(&mut call), text.to_string());
                    Some(Ok((place, Record::Completion { prompt, completion })))
                }
                _ => Some(Err(place.wrong("expected \"caller> \" or \"desk> \" after the time"))),
            }
        })))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let transcript = Transcript { name: "desk.log".into(), text: TRANSCRIPT.into() };
    let sources = Sources { train: vec![Box::new(transcript)], eval: Vec::new() };
    let mut args = std::env::args().skip(1);
    match (args.next(), args.next()) {
        (Some(model), Some(server)) => train_on(sources, &model, &server),
        (model, _) => {
            let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny_text");
            show(&sources, model.as_deref().unwrap_or(tiny))
        }
    }
}

/// What the source's records become.
fn show(sources: &Sources, model: &str) -> Result<(), Box<dyn std::error::Error>> {
    let tokenizer = Tokenizer::load_with(&Checkpoint::find(model)?, None)?;
    let data = DataSet::load(&sources.train, &DataOptions::default(), &tokenizer)?;
    for i in 0..data.len() {
        let sample = data.sample(i);
        let ids: Vec<u32> = sample.ids.iter().map(|&id| id as u32).collect();
        println!("{} tokens: {:?}", ids.len(), tokenizer.decode(&ids)?);
    }
    println!("{}", data.stats);
    Ok(())
}

fn train_on(sources: Sources, model: &str, server: &str) -> Result<(), Box<dyn std::error::Error>> {
    let output = std::env::temp_dir().join(format!("custom_source-{}", std::process::id()));
    // The file that the options name is not read: the sources stand in its place.
    let mut options = TrainOptions::new(model, server, "desk.log".into(), output);
    options.steps.max_steps = Some(5);
    options.steps.batch_size = Some(2);
    options.optimizer.learning_rate = 1e-3;
    let runtime = tokio::runtime::Runtime::new()?;
    let summary = runtime.block_on(train_with_sources(options, sources, CancelToken::default()))?;
    println!("losses {:?}, adapter in {:?}", summary.losses, summary.adapter);
    Ok(())
}
