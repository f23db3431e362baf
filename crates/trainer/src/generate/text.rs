//! Tokens become text piece by piece: whole characters only, and nothing of a stop string.

use crate::TrainError;
use crate::tokenizer::Tokenizer;
use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper,
};

type Decoding<'a> = DecodeStream<
    'a,
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// The text of one generation while it grows.
pub(super) struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    decoding: Decoding<'a>,
    ids: Vec<u32>,
    /// Length in bytes of what was decoded so far.
    decoded: usize,
    held: Held<'a>,
    /// All that was given out.
    text: String,
}

/// What one more token gave.
#[derive(Debug, PartialEq)]
pub(super) struct Piece {
    /// May be empty: half a character, or what may become a stop string.
    pub text: String,
    /// A stop string is complete: the text ends here.
    pub stopped: bool,
}

impl<'a> Writer<'a> {
    pub fn new(tokenizer: &'a Tokenizer, stop: &'a [String]) -> Self {
        Writer {
            tokenizer,
            decoding: tokenizer.inner().decode_stream(true),
            ids: Vec::new(),
            decoded: 0,
            held: Held { stop, text: String::new() },
            text: String::new(),
        }
    }

    pub fn push(&mut self, id: u32) -> Result<Piece, TrainError> {
        self.ids.push(id);
        let wrong = |e: tokenizers::Error| self.tokenizer.wrong(e.to_string());
        let new = self.decoding.step(id).map_err(wrong)?.unwrap_or_default();
        self.decoded += new.len();
        let piece = self.held.push(&new);
        self.text += &piece.text;
        Ok(piece)
    }

    /// What was held back and will not become a stop string any more; half a character at the end is
    /// left out. Not after a stop string.
    pub fn finish(&mut self) -> Result<String, TrainError> {
        let whole = self.tokenizer.decode(&self.ids)?;
        let rest = whole.get(self.decoded..).unwrap_or_default();
        let mut last = self.held.push(rest.trim_end_matches(char::REPLACEMENT_CHARACTER)).text;
        last += &std::mem::take(&mut self.held.text);
        self.text += &last;
        Ok(last)
    }

    /// All that was given out.
    pub fn into_text(self) -> String {
        self.text
    }
}

/// Text that may be the beginning of a stop string.
struct Held<'a> {
    stop: &'a [String],
    text: String,
}

impl Held<'_> {
    fn push(&mut self, new: &str) -> Piece {
        self.text += new;
        if let Some(start) = self.stop.iter().filter_map(|stop| self.text.find(stop)).min() {
            self.text.truncate(start);
            return Piece { text: std::mem::take(&mut self.text), stopped: true };
        }
        let held = self.text.split_off(self.text.len() - self.n_bytes_to_hold());
        Piece { text: std::mem::replace(&mut self.text, held), stopped: false }
    }

    /// Length of the longest end of the text with which a stop string begins.
    fn n_bytes_to_hold(&self) -> usize {
        let begins_stop = |from: usize| {
            let end = &self.text[from..];
            self.stop.iter().any(|stop| stop.starts_with(end))
        };
        let mut starts = self.text.char_indices().map(|(i, _)| i);
        starts.find(|&i| begins_stop(i)).map_or(0, |i| self.text.len() - i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::weights::Checkpoint;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny_text");
        Tokenizer::load(&Checkpoint::open(&dir).unwrap()).unwrap()
    }

    /// Pieces of `text`, what `finish` gave, and whether it was stopped.
    fn write(text: &str, stop: &[&str]) -> (Vec<String>, String, bool) {
        let tokenizer = tokenizer();
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut writer = Writer::new(&tokenizer, &stop);
        let (mut pieces, mut stopped) = (Vec::new(), false);
        for id in tokenizer.encode_continuation(text).unwrap() {
            let piece = writer.push(id).unwrap();
            pieces.push(piece.text);
            stopped = piece.stopped;
            if stopped {
                break;
            }
        }
        let last = if stopped { String::new() } else { writer.finish().unwrap() };
        assert_eq!(writer.into_text(), pieces.concat() + &last);
        (pieces, last, stopped)
    }

    #[test]
    fn pieces_are_whole_characters_and_add_up() {
        // Each of these characters is several tokens of this vocabulary.
        let text = "naïve 漢字 \u{1F333}\u{1F333} end é";
        let (pieces, last, stopped) = write(text, &[]);
        assert!(!stopped);
        assert_eq!(pieces.concat() + &last, text);
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        assert!(pieces.iter().filter(|piece| piece.is_empty()).count() >= 8, "{pieces:?}");
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() >= 10, "{pieces:?}");
    }

    #[test]
    fn half_a_character_at_the_end_is_left_out() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode_continuation("tree \u{1F333}").unwrap();
        let mut writer = Writer::new(&tokenizer, &[]);
        for id in &ids[..ids.len() - 1] {
            writer.push(*id).unwrap();
        }
        assert_eq!(writer.finish().unwrap(), "");
        assert_eq!(writer.into_text(), "tree ");
    }

    #[test]
    fn special_tokens_are_no_text() {
        let (pieces, last, _) = write("a<|im_end|>b", &[]);
        assert_eq!(pieces.concat() + &last, "ab");
    }

    #[test]
    fn nothing_of_a_stop_string_is_given_out() {
        let (pieces, _, stopped) = write("one\n\nUser: two", &["\n\nUser:"]);
        assert!(stopped);
        assert_eq!(pieces.concat(), "one");
        // Held back, and given out when it turns out to be something else.
        let (pieces, last, stopped) = write("one\n\nUse", &["\n\nUser:"]);
        assert!(!stopped);
        assert_eq!((pieces.concat().as_str(), last.as_str()), ("one", "\n\nUse"));
    }

    #[test]
    fn the_earliest_of_several_stop_strings_counts() {
        let stop = ["ab".to_string(), "b".to_string(), "c".to_string()];
        let mut held = Held { stop: &stop, text: String::new() };
        let none = |text: &str| Piece { text: text.into(), stopped: false };
        assert_eq!(held.push("xa"), none("x"));
        assert_eq!(held.push("a"), none("a"));
        assert_eq!(held.push("bc"), Piece { text: String::new(), stopped: true });
        // Several candidates at once: as much is held as the longest may need.
        let stop = ["aab".to_string(), "ax".to_string()];
        let mut held = Held { stop: &stop, text: String::new() };
        assert_eq!(held.push("aa"), none(""));
        assert_eq!(held.push("a"), none("a"));
        assert_eq!(held.push("x"), Piece { text: "a".into(), stopped: true });
    }
}
