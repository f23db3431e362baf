use anyhow::bail;
use std::io::{BufRead, IsTerminal, Write};

/// Asks before something is deleted, on a terminal; elsewhere `--yes` has to be said. An error: it is
/// not wanted.
pub fn confirm(question: &str, is_yes: bool) -> anyhow::Result<()> {
    if is_yes {
        return Ok(());
    }
    let (mut err, input) = (std::io::stderr(), std::io::stdin());
    if !input.is_terminal() || !err.is_terminal() {
        bail!("nobody can be asked here, since this is no terminal: {question} Say so with --yes");
    }
    write!(err, "{question} [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    input.lock().read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => bail!("nothing was deleted"),
    }
}
