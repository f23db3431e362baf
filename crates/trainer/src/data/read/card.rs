//! A data set's card: the front matter of its README.md names configs and their files.

use saphyr::{LoadableYamlNode, Yaml};

/// One config as the card describes it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Config {
    pub name: String,
    /// To be taken when none is asked for.
    pub default: bool,
    /// Folder of the files, with a slash at the end; empty for the top.
    pub folder: String,
    /// Split (none: seen from the files' names) and patterns of file names.
    pub data_files: Vec<(Option<String>, Vec<String>)>,
}

/// The configs that a README.md lists; empty if it has no such list.
pub(super) fn configs(readme: &str) -> Result<Vec<Config>, String> {
    let Some(matter) = front_matter(readme) else { return Ok(Vec::new()) };
    let wrong = |problem: String| format!("the front matter of README.md: {problem}");
    let documents = Yaml::load_from_str(&matter).map_err(|error| wrong(error.to_string()))?;
    let configs = documents.first().and_then(|top| top.as_mapping_get("configs"));
    let Some(configs) = configs.and_then(|list| list.as_sequence()) else { return Ok(Vec::new()) };
    configs.iter().map(|config| self::config(config).map_err(wrong)).collect()
}

/// What stands between the first two lines of three dashes.
fn front_matter(readme: &str) -> Option<String> {
    let mut lines = readme.trim_start_matches('\u{feff}').lines();
    (lines.next()?.trim_end() == "---").then_some(())?;
    let lines: Vec<&str> = lines.take_while(|line| line.trim_end() != "---").collect();
    Some(lines.join("\n"))
}

fn config(config: &Yaml) -> Result<Config, String> {
    let text = |name: &str| config.as_mapping_get(name).and_then(|value| value.as_str());
    let name = text("config_name").ok_or("a config has no \"config_name\"")?;
    let folder = text("data_dir").unwrap_or_default().trim_start_matches("./").trim_matches('/');
    let folder = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    let data_files = match config.as_mapping_get("data_files") {
        None => Vec::new(),
        Some(files) => data_files(files)
            .ok_or_else(|| format!("\"data_files\" of config \"{name}\" are no names of files"))?,
    };
    let default = config.as_mapping_get("default").and_then(|value| value.as_bool());
    Ok(Config { name: name.into(), default: default.unwrap_or(false), folder, data_files })
}

fn data_files(files: &Yaml) -> Option<Vec<(Option<String>, Vec<String>)>> {
    if let Some(splits) = files.as_mapping() {
        let of_split = |(split, files): (&Yaml, &Yaml)| {
            Some((Some(split.as_str()?.to_string()), patterns(files)?))
        };
        return splits.iter().map(of_split).collect();
    }
    let entries = match files.as_sequence() {
        Some(entries) if entries.iter().all(|entry| entry.as_mapping().is_some()) => entries,
        _ => return Some(vec![(None, patterns(files)?)]),
    };
    let of_entry = |entry: &Yaml| {
        let split = entry.as_mapping_get("split").and_then(|split| split.as_str());
        Some((split.map(String::from), patterns(entry.as_mapping_get("path")?)?))
    };
    entries.iter().map(of_entry).collect()
}

fn patterns(files: &Yaml) -> Option<Vec<String>> {
    let pattern = |file: &Yaml| Some(file.as_str()?.trim_start_matches("./").to_string());
    match files.as_sequence() {
        Some(list) => list.iter().map(pattern).collect(),
        None => Some(vec![pattern(files)?]),
    }
}
