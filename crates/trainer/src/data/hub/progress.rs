use hf_hub::api::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// How far a download is: a bar where somebody looks on, a line every few seconds elsewhere.
pub(super) struct Shown {
    name: String,
    file: String,
    total_bytes: usize,
    done_bytes: usize,
    logged: Instant,
    bar: Option<ProgressBar>,
}

impl Shown {
    pub fn new(name: &str) -> Self {
        let style = ProgressStyle::with_template(
            "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        let bar = std::io::stderr().is_terminal().then(|| {
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Shown {
            name: name.into(),
            file: String::new(),
            total_bytes: 0,
            done_bytes: 0,
            logged: Instant::now(),
            bar,
        }
    }
}

impl Progress for Shown {
    /// Called twice for each file, and once more for each retry.
    fn init(&mut self, size: usize, filename: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(size as u64);
            bar.set_position(0);
            bar.set_message(filename.to_string());
        } else if self.file != filename {
            tracing::info!(name = self.name, file = filename, bytes = size, "fetching");
        }
        self.file = filename.into();
        self.total_bytes = size;
        self.done_bytes = 0;
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size;
        if let Some(bar) = &self.bar {
            bar.inc(size as u64);
        } else if self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            let percent = 100 * self.done_bytes / self.total_bytes.max(1);
            tracing::info!(name = self.name, file = self.file, percent, "fetching");
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        tracing::debug!(name = self.name, file = self.file, bytes = self.done_bytes, "fetched");
    }
}
