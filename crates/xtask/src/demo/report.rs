//! The closing report.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Team;
use super::metrics::LOSS_WINDOW;

pub struct Report {
    pub teams: Vec<TeamReport>,
    pub memory: Memory,
    pub model: String,
    pub sample_prompt: String,
}

/// Pairs are before and after training.
pub struct TeamReport {
    pub team: &'static Team,
    pub train_loss: [f64; 2],
    pub eval_loss: [f64; 2],
    pub sample: [String; 2],
    pub tokens_per_second: f64,
    /// Below the repository's root.
    pub adapter: String,
}

/// Resident bytes of the server.
pub struct Memory {
    /// All readings with no live session, with one, and with two.
    readings: [Vec<u64>; 3],
    pub peak: u64,
}

impl Memory {
    /// Starts with a reading before the first session.
    pub fn idle(bytes: u64) -> Self {
        Self { readings: [vec![bytes], vec![], vec![]], peak: 0 }
    }

    /// Keeps a reading that was taken with `n_sessions` live.
    pub fn add(&mut self, n_sessions: usize, bytes: u64) {
        // What a session leaves stays with the server, so only readings on the way up tell what so
        // many sessions take.
        let on_the_way_up = self.readings[n_sessions + 1..].iter().all(Vec::is_empty);
        if n_sessions > 0 && on_the_way_up {
            self.readings[n_sessions].push(bytes);
        }
    }

    fn median(&self, n_sessions: usize) -> f64 {
        let mut readings = self.readings[n_sessions].clone();
        readings.sort_unstable();
        readings.get(readings.len() / 2).map_or(f64::NAN, |&bytes| bytes as f64)
    }
}

impl Report {
    pub fn print(&self, took: Duration) {
        println!("\nOne trunk, two teams: {:.0} s from start to end\n", took.as_secs_f64());
        println!("{:24}{:>22}{:>22}", "", self.teams[0].team.name, self.teams[1].team.name);
        let row = |label: &str, cell: &dyn Fn(&TeamReport) -> String| {
            println!("{label:24}{:>22}{:>22}", cell(&self.teams[0]), cell(&self.teams[1]));
        };
        row("text", &|t| t.team.about.into());
        row("training loss*", &|t| change(t.train_loss));
        row("evaluation loss", &|t| change(t.eval_loss));
        row("tokens per second", &|t| format!("{:.0}", t.tokens_per_second));

        println!("* mean of the first and of the last {LOSS_WINDOW} steps (half of a shorter run)");

        println!("\nMemory of the server (resident)");
        let [none, one, two] = [0, 1, 2].map(|n| self.memory.median(n) / 1e6);
        println!("  no session              {none:>5.0} MB");
        println!("  one session, training   {one:>5.0} MB, {:+.0} MB", one - none);
        println!("  two sessions, training  {two:>5.0} MB, {:+.0} MB", two - one);
        println!("  highest                 {:>5.0} MB", self.memory.peak as f64 / 1e6);

        println!("\nBoth teams go on from the same prompt");
        for line in self.sample_prompt.lines() {
            println!("  | {line}");
        }
        for team in &self.teams {
            println!("\nTeam {}", team.team.name);
            for (when, text) in ["before", "after"].iter().zip(&team.sample) {
                println!("  {when}:");
                for line in wrap(text, 76) {
                    println!("    {line}");
                }
            }
        }

        println!("\nAdapters, as PEFT directories for the whole model");
        for team in &self.teams {
            println!("  {}", team.adapter);
        }
        println!("\nLoad one with PEFT (pip install transformers peft gguf)\n");
        println!("{}", self.snippet());
    }

    fn snippet(&self) -> String {
        let base = match self.model.rsplit_once('/') {
            Some((folder, file)) if file.ends_with(".gguf") => {
                let folder = folder
                    .rsplit_once("/.demo/")
                    .map_or_else(|| folder.to_owned(), |(_, below)| format!(".demo/{below}"));
                format!("\"{folder}\", gguf_file=\"{file}\"")
            }
            _ => format!("{:?}", self.model),
        };
        format!(
            "  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  base = AutoModelForCausalLM.from_pretrained({base})
  model = PeftModel.from_pretrained(base, {:?})",
            self.teams[0].adapter
        )
    }

    /// The claims of the demo.
    pub fn check(&self) -> Result<()> {
        for t in &self.teams {
            for (which, [before, after]) in
                [("training", t.train_loss), ("evaluation", t.eval_loss)]
            {
                ensure!(
                    after < before,
                    "the {which} loss of team {} did not fall: {before:.3} to {after:.3}",
                    t.team.name
                );
            }
            ensure!(t.sample[0] != t.sample[1], "training changed no word of {}", t.team.name);
        }
        ensure!(
            self.teams[0].sample[1] != self.teams[1].sample[1],
            "both teams' adapters say the same"
        );
        Ok(())
    }
}

fn change([before, after]: [f64; 2]) -> String {
    format!("{before:.3} -> {after:.3}")
}

/// Lines of at most `width` characters where words allow it; the text's own line breaks stay.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.trim().lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            } else if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::wrap;

    #[test]
    fn wrapped_text_keeps_its_words_and_line_breaks() {
        assert_eq!(wrap("one two three\nfour", 7), ["one two", "three", "four"]);
        assert_eq!(wrap("unbreakable word", 4), ["unbreakable", "word"]);
    }
}
