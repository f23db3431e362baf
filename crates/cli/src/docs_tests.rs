//! The documents name options that exist, and the pages that they link to.

use crate::Cli;
use clap::{Command, CommandFactory};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// README and the pages of docs, with their text.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md")];
    for dir in ["docs", "docs/decisions"] {
        let entries = fs::read_dir(root().join(dir)).unwrap();
        paths.extend(entries.map(|entry| entry.unwrap().path()));
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

fn options_of(command: &Command) -> BTreeSet<String> {
    let own = command.get_arguments();
    let names = own.flat_map(|arg| {
        arg.get_long_and_visible_aliases().unwrap_or_default().into_iter().map(String::from)
    });
    let nested = command.get_subcommands().flat_map(options_of);
    names.chain(nested).chain(["help".into(), "version".into()]).collect()
}

/// Command lines of `offshoot` in code blocks, continued lines joined, each with its subcommand.
fn command_lines(text: &str) -> Vec<(String, String)> {
    let joined = text.replace("\\\n", " ");
    let mut found = Vec::new();
    for line in joined.lines() {
        let line = line.trim().trim_start_matches("$ ");
        if let Some(rest) = line.strip_prefix("offshoot ")
            && let Some(subcommand) = rest.split_whitespace().next()
        {
            let words = rest.split(" # ").next().unwrap_or(rest);
            found.push((subcommand.to_string(), words.to_string()));
        }
    }
    found
}

/// The name of an option in a word such as `--name=value`.
fn option(word: &str) -> Option<&str> {
    let name = word.strip_prefix("--")?;
    let end = name.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).unwrap_or(name.len());
    Some(&name[..end]).filter(|name| !name.is_empty())
}

/// Options of other programs that the documents name.
const OF_OTHERS: [&str; 6] =
    ["atomic", "stop-timeout", "no-healthcheck", "health-cmd", "gpus", "build-arg"];

#[test]
fn every_option_in_the_documents_exists() {
    let cli = Cli::command();
    let all = options_of(&cli);
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        for (subcommand, line) in command_lines(&text) {
            let Some(command) = cli.find_subcommand(&subcommand) else {
                if subcommand.chars().all(|c| c.is_ascii_lowercase()) {
                    wrong.push(format!("{}: no subcommand {subcommand}", path.display()));
                }
                continue;
            };
            let known = options_of(command);
            for name in line.split_whitespace().filter_map(option) {
                if !known.contains(name) && !["log", "log-format"].contains(&name) {
                    wrong.push(format!("{}: {subcommand} has no --{name}", path.display()));
                }
            }
        }
        // `--option` in the running text.
        for span in text.split('`').skip(1).step_by(2).filter(|span| span.starts_with("--")) {
            for name in span.split_whitespace().filter_map(option) {
                if !all.contains(name) && !OF_OTHERS.contains(&name) {
                    wrong.push(format!("{}: no command has --{name}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Links of Markdown to files of this repository.
#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            if file.starts_with("http") {
                continue;
            }
            let linked = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            if !linked.exists() {
                wrong.push(format!("{}: {target}", path.display()));
            } else if !anchor.is_empty() {
                let text = fs::read_to_string(&linked).unwrap();
                let headings = text.lines().filter(|line| line.starts_with('#'));
                if !headings.map(anchor_of).any(|known| known == anchor) {
                    wrong.push(format!("{}: {target} has no such heading", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// As GitHub makes it from a heading.
fn anchor_of(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// docs/options.md is made from the options themselves: `OFFSHOOT_UPDATE_DOCS=1 cargo test -p
/// offshoot options` writes it.
#[test]
fn the_page_of_options_is_what_the_commands_say() {
    let path = root().join("docs/options.md");
    let page = page_of_options();
    if std::env::var_os("OFFSHOOT_UPDATE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    assert!(
        committed == page,
        "docs/options.md is not what the commands say; write it again with OFFSHOOT_UPDATE_DOCS=1 cargo test -p offshoot options"
    );
}

fn page_of_options() -> String {
    let mut cli = Cli::command();
    cli.build();
    let mut page = String::from(
        "# Every option of every command\n\nMade from `offshoot COMMAND --help` by a test. Each option of \
         `offshoot train` can also stand in a file: `--config run.toml`.\n",
    );
    for command in cli.get_subcommands().filter(|command| command.get_name() != "help") {
        describe(&mut page, command, command.get_name());
    }
    page
}

fn describe(page: &mut String, command: &Command, name: &str) {
    let about = command.get_long_about().or(command.get_about()).unwrap_or_default();
    *page += &format!("\n## offshoot {name}\n\n{}\n", one_line(&about.to_string()));
    let mut heading = None;
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        if ["help", "version", "log"].contains(&arg.get_id().as_str()) {
            continue;
        }
        let own = arg.get_help_heading().unwrap_or("Options").to_string();
        if heading.as_ref() != Some(&own) {
            *page += &format!("\n### {name}: {own}\n\n| | |\n|---|---|\n");
            heading = Some(own);
        }
        *page += &format!("| `{}` | {} |\n", usage(arg), meaning(arg));
    }
    for nested in command.get_subcommands().filter(|nested| nested.get_name() != "help") {
        describe(page, nested, &format!("{name} {}", nested.get_name()));
    }
}

fn usage(arg: &clap::Arg) -> String {
    let values = arg.get_value_names().unwrap_or_default();
    let values: Vec<&str> = values.iter().map(|name| name.as_str()).collect();
    let takes = arg.get_action().takes_values();
    match arg.get_long() {
        Some(long) if takes => format!("--{long} {}", values.join(" ")),
        Some(long) => format!("--{long}"),
        None => values.join(" "),
    }
    .replace('|', "\\|")
}

fn meaning(arg: &clap::Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).unwrap_or_default();
    let mut text = one_line(&help.to_string());
    if arg.get_action().takes_values() {
        for value in arg.get_possible_values().iter().filter(|value| !value.is_hide_set()) {
            text += &format!("; `{}`", value.get_name());
            if let Some(help) = value.get_help() {
                text += &format!(": {}", one_line(&help.to_string()));
            }
        }
        let defaults = arg.get_default_values();
        if !defaults.is_empty() {
            let defaults: Vec<_> = defaults.iter().map(|value| value.to_string_lossy()).collect();
            text += &format!(" (default: `{}`)", defaults.join(","));
        }
    }
    text.replace('|', "\\|")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
