//! `offshoot train --config FILE`: every option of the command also in a TOML file, and the options
//! of a run written down as such a file. Both look through the command's own list of options, so that
//! none can be forgotten.

use anyhow::Context;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, CommandFactory};
use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Names of unknown options that are this similar to a known one are taken for slips of the pen.
const SIMILAR: f64 = 0.8;

/// Options that say what is to be done now, not what the run is.
const NOT_STORED: [&str; 10] = [
    "config",
    "print_config",
    "resume",
    "dry_run",
    "log",
    "log_format",
    "otlp_endpoint",
    "otlp_protocol",
    "trace_ratio",
    "help",
];
/// Options that a file cannot have.
const NOT_IN_FILE: [&str; 3] = ["config", "print_config", "help"];

#[derive(Args)]
#[command(next_help_heading = "Config")]
pub struct ConfigArgs {
    /// Take options from this TOML file: each under its long name, with underscores or dashes, flat
    /// or in tables of any name. What is given here too wins over the file. Each run stores its own
    /// as OUTPUT_DIR/config.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the options that the run would have, as a file for --config, and end.
    #[arg(long)]
    pub print_config: bool,
    /// Do everything but train: check the options, read the data, compare with the server, load this
    /// side's layers, and say what the run would be. Nothing is written.
    #[arg(long)]
    pub dry_run: bool,
}

/// The command line, with the options of the file that it names by `--config` put behind it.
pub fn expand<C: CommandFactory>(
    mut args: Vec<OsString>,
    subcommand: &str,
) -> anyhow::Result<Vec<OsString>> {
    let lenient = without_required(C::command(), subcommand);
    // What is wrong here besides is said when the whole is parsed.
    let matches = lenient.clone().ignore_errors(true).try_get_matches_from(&args);
    let Ok(matches) = matches else { return Ok(args) };
    let Some(given) = matches.subcommand_matches(subcommand) else { return Ok(args) };
    let Some(path) = given.try_get_one::<PathBuf>("config").ok().flatten() else {
        return Ok(args);
    };
    let file = ConfigFile::read(path, &lenient, subcommand)?;
    for (id, words) in file.options {
        if !file.command.overrides(given, &id) {
            args.extend(words);
        }
    }
    Ok(args)
}

fn without_required(command: Command, subcommand: &str) -> Command {
    command.mut_subcommand(subcommand, |c| c.mut_args(|arg| arg.required(false)))
}

/// A subcommand with the options that it has from the whole program.
struct Known(Command);

impl Known {
    fn of(mut program: Command, subcommand: &str) -> Self {
        program.build();
        let command = program.find_subcommand(subcommand).expect("it is one of the program's");
        Known(command.clone())
    }

    fn options(&self) -> impl Iterator<Item = &Arg> {
        self.0.get_arguments().filter(|arg| arg.get_long().is_some())
    }

    fn find(&self, key: &str) -> Option<&Arg> {
        let long = key.replace('_', "-");
        self.options().find(|arg| arg.get_long() == Some(long.as_str()))
    }

    fn excludes(&self, one: &Arg, other: &Arg) -> bool {
        let among = |one, other: &Arg| {
            self.0.get_arg_conflicts_with(one).iter().any(|arg| arg.get_id() == other.get_id())
        };
        among(one, other) || among(other, one)
    }

    /// Whether the command line gives this option, or one that excludes it.
    fn overrides(&self, given: &ArgMatches, id: &str) -> bool {
        let is_given =
            |arg: &Arg| given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        let Some(of_file) = self.options().find(|arg| arg.get_id() == id) else { return false };
        self.options()
            .filter(|arg| is_given(arg))
            .any(|arg| arg.get_id() == of_file.get_id() || self.excludes(arg, of_file))
    }

    fn closest(&self, key: &str) -> Option<String> {
        let key = key.replace('-', "_");
        let names = self.options().filter(|arg| !arg.is_hide_set()).filter_map(Arg::get_long);
        let scored = names.map(|name| {
            let name = name.replace('-', "_");
            (strsim::jaro_winkler(&name, &key), name)
        });
        let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
        (best.0 >= SIMILAR).then_some(best.1)
    }
}

/// What kind of value an option takes.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Flag,
    Integer,
    Number,
    Text,
    /// Of a parser of its own, which takes what it takes.
    Other,
}

impl Kind {
    fn of(arg: &Arg) -> Kind {
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            return Kind::Flag;
        }
        let id = arg.get_value_parser().type_id();
        let is_one_of = |ids: &[TypeId]| ids.iter().any(|known| id == *known);
        let integers =
            [TypeId::of::<usize>(), TypeId::of::<u64>(), TypeId::of::<u32>(), TypeId::of::<u16>()];
        if is_one_of(&integers) {
            Kind::Integer
        } else if is_one_of(&[TypeId::of::<f64>(), TypeId::of::<f32>()]) {
            Kind::Number
        } else if is_one_of(&[TypeId::of::<String>(), TypeId::of::<PathBuf>()]) {
            Kind::Text
        } else {
            Kind::Other
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Kind::Flag => "true or false",
            Kind::Integer => "a whole number",
            Kind::Number => "a number",
            Kind::Text => "text in quotes",
            Kind::Other => "text or a number",
        }
    }

    /// The word of the command line that a value stands for.
    fn word(self, value: &Value) -> Option<String> {
        match (self, value) {
            (Kind::Integer | Kind::Number | Kind::Other, Value::Integer(n)) => Some(n.to_string()),
            (Kind::Number | Kind::Other, Value::Float(x)) => Some(x.to_string()),
            (Kind::Text | Kind::Other, Value::String(text)) => Some(text.clone()),
            // TOML's own whole numbers end at 2^63.
            (Kind::Integer, Value::String(text)) => text
                .parse::<u64>()
                .ok()
                .filter(|n| i64::try_from(*n).is_err())
                .map(|n| n.to_string()),
            _ => None,
        }
    }

    /// The value that a word of the command line stands for.
    fn value(self, word: &str) -> Value {
        match self {
            Kind::Integer => word.parse().map(Value::Integer).ok(),
            Kind::Number => word.parse().map(Value::Float).ok(),
            Kind::Flag | Kind::Text | Kind::Other => None,
        }
        .unwrap_or_else(|| Value::String(word.into()))
    }
}

/// A file's options as words of a command line.
struct ConfigFile {
    command: Known,
    /// By the option's id.
    options: BTreeMap<String, Vec<OsString>>,
}

impl ConfigFile {
    fn read(path: &Path, lenient: &Command, subcommand: &str) -> anyhow::Result<Self> {
        let name = path.display();
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("--config {name}: cannot be read; expected a TOML file of options")
        })?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            anyhow::anyhow!("--config {name} is not TOML: {}", error.to_string().trim())
        })?;
        let command = Known::of(lenient.clone(), subcommand);
        let mut reading = Reading {
            command: &command,
            lenient,
            subcommand,
            seen: BTreeMap::new(),
            problems: vec![],
        };
        let mut options = BTreeMap::new();
        reading.table(&table, "", &mut options);
        match &reading.problems[..] {
            [] => {}
            [problem] => anyhow::bail!("--config {name}: {problem}"),
            all => anyhow::bail!("--config {name}: {} mistakes\n  {}", all.len(), all.join("\n  ")),
        }
        Ok(ConfigFile { command, options })
    }
}

struct Reading<'a> {
    command: &'a Known,
    lenient: &'a Command,
    subcommand: &'a str,
    /// By the option's id, where it was seen.
    seen: BTreeMap<String, String>,
    problems: Vec<String>,
}

impl Reading<'_> {
    fn table(
        &mut self,
        table: &Table,
        inside: &str,
        options: &mut BTreeMap<String, Vec<OsString>>,
    ) {
        for (key, value) in table {
            let place = if inside.is_empty() { key.clone() } else { format!("{inside}.{key}") };
            if let Value::Table(table) = value {
                self.table(table, &place, options);
                continue;
            }
            match self.option(key, value, &place) {
                Ok((id, words)) => {
                    options.insert(id, words);
                }
                Err(problem) => self.problems.push(problem),
            }
        }
    }

    fn option(
        &mut self,
        key: &str,
        value: &Value,
        place: &str,
    ) -> Result<(String, Vec<OsString>), String> {
        let Some(arg) = self.command.find(key) else {
            let hint = match self.command.closest(key) {
                Some(name) => format!("; did you mean {name}?"),
                None => format!("; offshoot {} --help lists all options", self.subcommand),
            };
            return Err(format!("{place} is not an option{hint}"));
        };
        let id = arg.get_id().to_string();
        if NOT_IN_FILE.contains(&id.as_str()) {
            return Err(format!("{place} has no meaning in a file"));
        }
        if let Some(before) = self.seen.insert(id.clone(), place.into()) {
            return Err(format!("{place} stands there twice, also as {before}"));
        }
        let words = words(arg, value).ok_or_else(|| {
            let several = if takes_several(arg) { ", or a list" } else { "" };
            format!("{place} = {value}: expected {}{several}", Kind::of(arg).expected())
        })?;
        match self.parse_alone(&words) {
            None => Ok((id, words)),
            Some(problem) => Err(format!("{place} = {value}: {problem}")),
        }
    }

    /// What the option's own parser says against these words.
    fn parse_alone(&self, words: &[OsString]) -> Option<String> {
        let program = [OsString::from(self.lenient.get_name()), self.subcommand.into()];
        let line = program.iter().chain(words);
        let error = self.lenient.clone().try_get_matches_from(line).err()?;
        // Whether options fit together is seen when all of them are there.
        if error.kind() == ErrorKind::MissingRequiredArgument {
            return None;
        }
        let text = error.to_string();
        let text = text.trim_start_matches("error: ");
        let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("For more"));
        Some(lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" "))
    }
}

fn takes_several(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// `--name=value`, once for each value; none if the value is of another kind.
fn words(arg: &Arg, value: &Value) -> Option<Vec<OsString>> {
    let name = format!("--{}", arg.get_long()?);
    let kind = Kind::of(arg);
    if kind == Kind::Flag {
        let given = value.as_bool()?;
        return Some(if given { vec![name.into()] } else { vec![] });
    }
    let word = |value| kind.word(value).map(|word| OsString::from(format!("{name}={word}")));
    match value {
        Value::Array(values) if takes_several(arg) => values.iter().map(word).collect(),
        value => Some(vec![word(value)?]),
    }
}

/// The options of a run, as a file for `--config`.
pub struct Resolved {
    /// Name of a table, and of an option in it; the value, if it has one.
    entries: Vec<(String, String, Option<Value>)>,
}

impl Resolved {
    /// Of a parsed command line, defaults included.
    pub fn new(program: Command, subcommand: &str, given: &ArgMatches) -> Self {
        let command = Known::of(program, subcommand);
        let is_given = |arg: &&Arg| {
            given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        let chosen: Vec<&Arg> = command.options().filter(is_given).collect();
        let stored = command.options().filter(|arg| {
            let is_chosen = chosen.iter().any(|other| other.get_id() == arg.get_id());
            let hidden = arg.is_hide_set() && !is_chosen;
            !NOT_STORED.contains(&arg.get_id().as_str()) && !hidden
        });
        // A default that a given option excludes does not count.
        let excluded = |arg: &Arg| chosen.iter().any(|other| command.excludes(arg, other));
        let entry = |arg: &Arg| {
            let table = arg.get_help_heading().unwrap_or("other").to_lowercase().replace(' ', "_");
            let name = arg.get_long().unwrap_or_default().replace('-', "_");
            (
                table,
                name,
                value(arg, given).filter(|value| value.as_bool() == Some(false) || !excluded(arg)),
            )
        };
        Resolved { entries: stored.map(entry).collect() }
    }

    /// Gives an option this value, which was only found out later.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.1 == name) {
            entry.2 = Some(value.into());
        }
    }
}

impl std::fmt::Display for Resolved {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        writeln!(f, "# The options of a run of offshoot {}. Use them", env!("CARGO_PKG_VERSION"))?;
        writeln!(f, "# again with offshoot train --config FILE.")?;
        let mut tables: Vec<&str> = Vec::new();
        for (table, _, _) in &self.entries {
            if !tables.contains(&table.as_str()) {
                tables.push(table);
            }
        }
        for table in tables {
            writeln!(f, "\n[{table}]")?;
            for (_, name, value) in self.entries.iter().filter(|entry| entry.0 == table) {
                match value {
                    Some(value) => writeln!(f, "{name} = {value}")?,
                    None => writeln!(f, "# {name}")?,
                }
            }
        }
        Ok(())
    }
}

fn value(arg: &Arg, given: &ArgMatches) -> Option<Value> {
    let id = arg.get_id().as_str();
    let kind = Kind::of(arg);
    if kind == Kind::Flag {
        return Some(Value::Boolean(given.get_flag(id)));
    }
    let mut values: Vec<Value> =
        given.get_raw(id)?.map(|word| kind.value(&word.to_string_lossy())).collect();
    if takes_several(arg) { Some(Value::Array(values)) } else { values.pop() }
}

#[cfg(test)]
mod tests;
