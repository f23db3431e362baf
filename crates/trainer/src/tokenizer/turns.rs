//! Where the assistant speaks in a rendered conversation.

use super::chat::{ChatTemplate, Conversation, Rendered};
use crate::TrainError;
use serde_json::Value;
use std::ops::Range;

/// The text of a conversation and the assistant's turns in it, in bytes, from the message
/// `learn_from` on.
///
/// If the template marks them (`{% generation %}`), these are the turns. Otherwise a turn is what the
/// template adds after its generation prompt, with the token that ends the turn, without the white
/// space after that.
pub(super) fn render_with_turns(
    chat: &ChatTemplate,
    conversation: Conversation,
    learn_from: usize,
) -> Result<(String, Vec<Range<usize>>), TrainError> {
    let Rendered { text, turns: marked } = chat.render_with_turns(conversation)?;
    let from_assistant = |message: &Value| message["role"] == "assistant";
    if let Some(mut turns) = marked {
        let before = conversation.messages[..learn_from].iter().filter(|m| from_assistant(m));
        turns.drain(..before.count().min(turns.len()));
        return Ok((text, turns));
    }
    let messages = conversation.messages.iter().enumerate().skip(learn_from);
    let turns = messages
        .filter(|(_, message)| from_assistant(message))
        .map(|(i, _)| turn(chat, conversation, i, &text))
        .collect::<Result<_, _>>()?;
    Ok((text, turns))
}

/// The turn of message `i`.
fn turn(
    chat: &ChatTemplate,
    conversation: Conversation,
    i: usize,
    text: &str,
) -> Result<Range<usize>, TrainError> {
    // A template may refuse a conversation that ends here.
    let before = chat.render(conversation.first(i), true).ok();
    let before = before.filter(|before| text.starts_with(before)).map(|before| before.len());
    let after = chat.render(conversation.first(i + 1), false).ok();
    if let (Some(before), Some(after)) = (before, &after)
        && text.starts_with(after)
        && before < after.len()
    {
        return Ok(before..after.trim_end().len());
    }
    // Earlier messages are written otherwise when more follow, as where only the last turn shows
    // what the assistant thought: then the words are found by exchanging them.
    let words = words_in(chat, conversation, i, text)?.ok_or_else(|| TrainError::ChatTemplate {
        problem: format!(
            "where the assistant's words of message {i} begin and end cannot be told, because other messages change with them; mark them in a template of your own with {{% generation %}} and {{% endgeneration %}} (--chat-template FILE), or use prompt and completion instead of messages"
        ),
    })?;
    let begin = before.filter(|&before| before <= words.start).unwrap_or(words.start);
    let mut end = words.end;
    if let Some(after) = &after
        && let Some(words_there) = words_in(chat, conversation.first(i + 1), i, after)?
    {
        let closing = after[words_there.end..].trim_end();
        if text[end..].starts_with(closing) {
            end += closing.len();
        }
    }
    Ok(begin..end)
}

/// The part of `text` that changes with the content of message `i`. None if it is no text, or
/// appears nowhere.
fn words_in(
    chat: &ChatTemplate,
    conversation: Conversation,
    i: usize,
    text: &str,
) -> Result<Option<Range<usize>>, TrainError> {
    if !conversation.messages[i]["content"].is_string() {
        return Ok(None);
    }
    let mut messages = conversation.messages.to_vec();
    // In no text, so that nothing of the words is taken for something around them.
    messages[i]["content"] = "\u{fdd2}".into();
    let other = chat.render(Conversation { messages: &messages, ..conversation }, false)?;
    if other == text {
        return Ok(None);
    }
    let same = |(a, b): &(char, char)| a == b;
    let begin: usize =
        text.chars().zip(other.chars()).take_while(same).map(|(c, _)| c.len_utf8()).sum();
    let rest = text[begin..].chars().rev().zip(other[begin..].chars().rev());
    let behind: usize = rest.take_while(same).map(|(c, _)| c.len_utf8()).sum();
    Ok(Some(begin..text.len() - behind))
}
