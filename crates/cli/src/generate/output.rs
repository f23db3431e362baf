//! Where texts go: piece by piece to the terminal, whole, or as JSON.

use super::args::OutputArgs;
use offshoot_trainer::generate::{EndReason, GenerateOptions, Generated};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;

#[derive(Clone, Copy, PartialEq)]
enum Style {
    Stream,
    Whole,
    Json,
}

/// Prints what comes; an error of standard output is kept for the end, when nothing waits for it.
pub struct Printer {
    style: Style,
    /// The prompt stands in front of what follows from it.
    with_prompt: bool,
    n_texts: usize,
    failed: Option<io::Error>,
}

impl Printer {
    /// `with_prompt`: a text is its prompt and what follows; else it is an answer.
    pub fn new(args: &OutputArgs, with_prompt: bool) -> Self {
        let style = match (args.json, args.no_stream) {
            (true, _) => Style::Json,
            (false, true) => Style::Whole,
            (false, false) => Style::Stream,
        };
        Printer { style, with_prompt, n_texts: 0, failed: None }
    }

    /// Before a text.
    pub fn begin(&mut self, prompt: &str) {
        if self.style == Style::Json {
            return;
        }
        if self.n_texts > 0 {
            self.write("\n");
        }
        if self.with_prompt && self.style == Style::Stream {
            self.write(prompt);
        }
    }

    /// A piece of it.
    pub fn piece(&mut self, piece: &str) {
        if self.style == Style::Stream {
            self.write(piece);
        }
    }

    /// It was interrupted.
    pub fn broken_off(&mut self) {
        if self.style == Style::Stream {
            self.write("\n");
        }
    }

    /// After it. `compared`: what came without caches, and its numbers.
    pub fn end(
        &mut self,
        prompt: &str,
        done: &Generated,
        options: &GenerateOptions,
        compared: Option<&Generated>,
    ) {
        self.n_texts += 1;
        match self.style {
            Style::Stream => self.write("\n"),
            Style::Whole if self.with_prompt => self.write(&format!("{prompt}{}\n", done.text)),
            Style::Whole => self.write(&format!("{}\n", done.text)),
            Style::Json => {
                let mut object = to_json(prompt, done, options);
                if let Some(without) = compared {
                    object["without_cache"] = numbers(without);
                    object["without_cache"]["same_text"] = json!(without.ids == done.ids);
                }
                self.write(&format!("{object}\n"));
            }
        }
    }

    /// What the people at the terminal want to know, but no program that reads the text.
    pub fn summary(&self, done: &Generated, seed: Option<u64>) {
        if self.style != Style::Json {
            eprintln!("{}", summary(done, seed));
        }
    }

    /// The predecessor's comparison.
    pub fn comparison(&self, done: &Generated, without: &Generated) {
        if self.style == Style::Json {
            return;
        }
        let ratio = without.total.as_secs_f64() / done.total.as_secs_f64();
        let same = match done.ids == without.ids {
            true => "the same text",
            false => "another text (products of more rows at once are rounded in another way)",
        };
        eprintln!("with caches {}", summary(done, None));
        eprintln!("without     {}", summary(without, None));
        eprintln!("{same}; with caches {ratio:.1} times as fast");
    }

    fn write(&mut self, text: &str) {
        if self.failed.is_some() {
            return;
        }
        let mut out = io::stdout().lock();
        // Flushed, since a piece seldom ends a line.
        self.failed = out.write_all(text.as_bytes()).and_then(|()| out.flush()).err();
    }

    /// Whether all was written. A reader that has gone away has read enough.
    pub fn finish(&mut self) -> io::Result<()> {
        match self.failed.take() {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }

    /// Nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.failed.is_some()
    }
}

fn to_json(prompt: &str, done: &Generated, options: &GenerateOptions) -> Value {
    let mut object = json!({
        "prompt": prompt,
        "text": done.text,
        "ids": done.ids,
        "prompt_tokens": done.n_prompt,
        "seed": options.sampling.seed,
    });
    if let (Some(object), Value::Object(numbers)) = (object.as_object_mut(), numbers(done)) {
        object.extend(numbers);
    }
    object
}

fn numbers(done: &Generated) -> Value {
    json!({
        "tokens": done.ids.len(),
        "end": done.end.name(),
        "seconds_to_first_token": seconds(done.first_token),
        "seconds": seconds(done.total),
        "tokens_per_second": done.tokens_per_second(),
        "sent_bytes": done.traffic.sent_bytes,
        "received_bytes": done.traffic.received_bytes,
    })
}

/// To the microsecond.
fn seconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e6
}

fn summary(done: &Generated, seed: Option<u64>) -> String {
    let mut line = format!("{} tokens", done.ids.len());
    line += match done.end {
        EndReason::Eos => ", ended by the model",
        EndReason::Stop => ", ended by a stop string",
        EndReason::Length => ", ended by --max-tokens",
        EndReason::Context => ", ended by the model's context",
    };
    line += &format!("; {:.2} s to the first token", done.first_token.as_secs_f64());
    if let Some(rate) = done.tokens_per_second() {
        line += &format!(", then {rate:.1} tokens/s");
    }
    let traffic = done.traffic;
    if traffic.sent_bytes > 0 {
        line +=
            &format!("; {} bytes sent, {} received", traffic.sent_bytes, traffic.received_bytes);
    }
    if let Some(seed) = seed {
        line += &format!("; seed {seed}");
    }
    line
}
