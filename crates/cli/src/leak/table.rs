//! The meter's findings, for people.

use crate::noise_args::in_words;
use offshoot_trainer::leak::{LabelLeak, Leak, Recovered, SplitLeak};
use offshoot_trainer::noise::PrivacyOptions;
use offshoot_trainer::tokenizer::Tokenizer;
use std::fmt::Write;

/// Tokens of a sample that are shown.
const SHOWN_TOKENS: usize = 32;

/// Of which a linear map is badly fitted.
const FEW_TOKENS: usize = 5000;

const LAST_WORD: &str = "These readers are simple, and a stronger one recovers more: low numbers are no proof that your text is safe (docs/privacy.md).";

/// What is printed.
pub struct Shown<'a> {
    pub leak: &'a Leak,
    pub tokenizer: &'a Tokenizer,
    pub privacy: &'a PrivacyOptions,
}

impl Shown<'_> {
    /// All of it, with `n` samples as examples.
    pub fn text(&self, n: usize) -> anyhow::Result<String> {
        let Leak { tokens, samples, reader_tokens, baseline, .. } = self.leak;
        let mut text = format!(
            "{tokens} tokens of {samples} samples measured, without each sample's first; the linear reader knows {reader_tokens} tokens {}\n",
            match self.leak.reader_knows_part {
                true => "of the rest of your text",
                false => "of other text, and the public model",
            }
        );
        if *reader_tokens < FEW_TOKENS {
            text += "note: that is little; a reader who knows more reads more\n";
        }
        let noise = [("hidden states", self.privacy.hidden), ("gradients", self.privacy.gradients)];
        for (what, of) in noise.into_iter().filter(|(_, of)| !of.is_none()) {
            writeln!(text, "{what} as they would be sent: {}", in_words(of))?;
        }
        writeln!(
            text,
            "without any hidden state: always guessing the commonest token names {}, the ten commonest {}; frequent: the {} commonest of {} different tokens\n",
            percent(baseline.top_1).trim_start(),
            percent(baseline.top_10).trim_start(),
            baseline.frequent_tokens,
            baseline.distinct_tokens,
        )?;
        text += HEADER;
        for split in &self.leak.split_points {
            text += &row(split);
        }
        if let Some(labels) = &self.leak.labels {
            text += &of_labels(labels);
        }
        if n > 0 {
            text += &self.examples(n)?;
        }
        writeln!(text, "\n{LAST_WORD}")?;
        Ok(text)
    }

    /// Samples, and what the linear reader makes of them.
    fn examples(&self, n: usize) -> anyhow::Result<String> {
        let mut text = String::from("\nWhat the linear reader makes of it:\n");
        let mut start = 0;
        for ids in self.leak.texts.iter().take(n) {
            let length = (ids.len() - 1).min(SHOWN_TOKENS);
            writeln!(text, "\n  your text {}", self.line(&ids[1..][..length])?)?;
            for split in &self.leak.split_points {
                let guesses = &split.linear.guesses[start..][..length];
                writeln!(text, "  {:>9} {}", split.split_point_1, self.line(guesses)?)?;
            }
            start += ids.len() - 1;
        }
        Ok(text)
    }

    /// On one line.
    fn line(&self, ids: &[u32]) -> anyhow::Result<String> {
        Ok(on_one_line(&self.tokenizer.decode(ids)?))
    }
}

/// The last two are of the linear reader.
const HEADER: &str = "\
split           row norm         nearest         centred          linear        frequent            rare
point 1   median     95%   top 1  top 10   top 1  top 10   top 1  top 10   top 1  top 10   top 1  top 10
";

fn row(split: &SplitLeak) -> String {
    let SplitLeak { split_point_1, norms, nearest, centred, linear } = split;
    let mut line =
        format!("{split_point_1:>7}  {:>7.1} {:>7.1}", norms.median, norms.percentile_95);
    for reader in [nearest, centred, linear] {
        line += &format!("  {}  {}", percent(reader.top_1), percent(reader.top_10));
    }
    let Recovered { frequent_top_1, frequent_top_10, rare_top_1, rare_top_10, .. } = linear;
    for (top_1, top_10) in [(frequent_top_1, frequent_top_10), (rare_top_1, rare_top_10)] {
        line += &format!("  {}  {}", percent(*top_1), percent(*top_10));
    }
    line + "\n"
}

fn of_labels(of: &LabelLeak) -> String {
    let LabelLeak { split_point_2, labels, norms, baseline, direct, linear } = of;
    format!(
        "\nlabels from gradients at split point 2 = {split_point_2} ({labels} measured; row norm for one token's loss: median {:.3}, 95% {:.3})\n\
         \x20                        top 1  top 10\n\
         \x20 commonest token       {}  {}\n\
         \x20 most similar gradient {}  {}\n\
         \x20 linear                {}  {}\n",
        norms.median,
        norms.percentile_95,
        percent(baseline.top_1),
        percent(baseline.top_10),
        percent(direct.top_1),
        percent(direct.top_10),
        percent(linear.top_1),
        percent(linear.top_10),
    )
}

/// Where a line ends is written, and what has no sign; quotes stand as they are.
fn on_one_line(text: &str) -> String {
    let shown = |one: char| match one.is_control() {
        true => one.escape_debug().to_string(),
        false => one.to_string(),
    };
    text.chars().map(shown).collect()
}

/// Six wide, such as ` 79.5%`.
fn percent(share: f64) -> String {
    format!("{:>5.1}%", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_stand_as_they_are_and_ends_of_lines_are_written() {
        assert_eq!(on_one_line("it's \"ü\"\nx\u{4}"), "it's \"ü\"\\nx\\u{4}");
    }

    #[test]
    fn columns_stand_below_their_names() {
        let found =
            Recovered { top_1: 1.0, top_10: 1.0, rare_top_10: 0.125, ..Recovered::default() };
        let norms = offshoot_trainer::leak::Norms { median: 12.34, percentile_95: 1234.5 };
        let (nearest, centred, linear) = (found.clone(), found.clone(), found);
        let line = row(&SplitLeak { split_point_1: 28, norms, nearest, centred, linear });
        let header = HEADER.lines().last().unwrap();
        assert_eq!(line.trim_end().len(), header.len());
        for (end, value) in [("median", "12.3"), ("95%", "1234.5"), ("top 1 ", "100.0%")] {
            let end = header.find(end).unwrap() + end.trim_end().len();
            assert!(line[..end].ends_with(value), "{value}\n{header}\n{line}");
        }
        assert!(line.ends_with(" 12.5%\n"), "{line}");
    }
}
