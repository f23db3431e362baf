//! A conversation at the terminal.

use super::{Speaker, Spoken};
use offshoot_trainer::TrainError;
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};
use tokio::sync::mpsc;

const COMMANDS: &str = "/reset forgets the conversation, /exit ends it";

/// What was said so far.
pub struct Conversation {
    system: Option<String>,
    messages: Vec<Value>,
}

impl Conversation {
    pub fn new(system: Option<&str>) -> Self {
        let mut conversation =
            Conversation { system: system.map(String::from), messages: Vec::new() };
        conversation.reset();
        conversation
    }

    pub fn reset(&mut self) {
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        self.messages = system.collect();
    }

    pub fn say(&mut self, role: &str, text: &str) {
        self.messages.push(json!({ "role": role, "content": text }));
    }

    /// What was said last is taken back.
    fn unsay(&mut self) {
        self.messages.pop();
    }

    pub fn messages(&self) -> &[Value] {
        &self.messages
    }
}

/// What somebody typed.
enum Typed<'a> {
    Nothing,
    Reset,
    Exit,
    Unknown,
    Said(&'a str),
}

impl<'a> Typed<'a> {
    fn parse(line: &'a str) -> Self {
        match line.trim() {
            "" => Typed::Nothing,
            "/reset" => Typed::Reset,
            "/exit" | "/quit" => Typed::Exit,
            // A path or a fraction is no command.
            word if word.starts_with('/') && word[1..].chars().all(char::is_alphabetic) => {
                Typed::Unknown
            }
            said => Typed::Said(said),
        }
    }
}

/// Asks and answers until somebody ends it. False: by Ctrl-C, while nothing was being said.
pub async fn converse(speaker: &mut Speaker<'_>, system: Option<&str>) -> anyhow::Result<bool> {
    let at_terminal = std::io::stdin().is_terminal();
    let mut lines = lines_of_input();
    let mut conversation = Conversation::new(system);
    if at_terminal {
        eprintln!("{COMMANDS}; Ctrl-C breaks an answer off.");
    }
    loop {
        if at_terminal {
            eprint!("> ");
            let _ = std::io::stderr().flush();
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            () = speaker.interrupts.wait() => return Ok(false),
        };
        let Some(line) = line else { return Ok(true) };
        match Typed::parse(&line) {
            Typed::Nothing => {}
            Typed::Exit => return Ok(true),
            Typed::Reset => conversation.reset(),
            Typed::Unknown => eprintln!("no such command; {COMMANDS}"),
            Typed::Said(text) => {
                conversation.say("user", text);
                answer(speaker, &mut conversation, text).await?;
                if speaker.printer.is_closed() {
                    return Ok(true);
                }
            }
        }
    }
}

async fn answer(
    speaker: &mut Speaker<'_>,
    conversation: &mut Conversation,
    said: &str,
) -> anyhow::Result<()> {
    let prompt = speaker.tokenizer.encode_conversation(conversation.messages())?;
    match speaker.speak(said, &prompt).await {
        Ok(Spoken::Whole(answer) | Spoken::BrokenOff(answer)) => {
            conversation.say("assistant", &answer);
            // Another answer when the same is said again.
            speaker.options.sampling.seed = speaker.options.sampling.seed.wrapping_add(1);
        }
        Err(error) if matches!(error.downcast_ref(), Some(TrainError::Prompt { .. })) => {
            eprintln!("{error:#}. {COMMANDS}");
            conversation.unsay();
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Read on a thread of its own, which lives until the process ends: a read cannot be called off.
fn lines_of_input() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let lines = std::io::stdin().lock().lines();
        for line in lines.map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_words_after_a_slash() {
        assert!(matches!(Typed::parse("  "), Typed::Nothing));
        assert!(matches!(Typed::parse("/reset "), Typed::Reset));
        assert!(matches!(Typed::parse("/exit"), Typed::Exit));
        assert!(matches!(Typed::parse("/help"), Typed::Unknown));
        assert!(matches!(Typed::parse("/etc/passwd"), Typed::Said("/etc/passwd")));
        assert!(matches!(Typed::parse(" hello /reset"), Typed::Said("hello /reset")));
    }

    #[test]
    fn a_reset_keeps_what_the_system_said() {
        let mut conversation = Conversation::new(Some("Be brief."));
        conversation.say("user", "Hi");
        conversation.say("assistant", "Hello");
        assert_eq!(conversation.messages().len(), 3);
        conversation.reset();
        assert_eq!(conversation.messages(), [json!({"role": "system", "content": "Be brief."})]);
        conversation.say("user", "Hi");
        conversation.unsay();
        assert_eq!(conversation.messages().len(), 1);
        assert!(Conversation::new(None).messages().is_empty());
    }
}
