//! Which files of a folder, or of a repository of the hub, belong to which config and split: as the
//! data set's card says, otherwise from the files' names, by the rules of the `datasets` package.

use super::Format;
use super::card::{self, Config};
use globset::GlobBuilder;
use std::collections::{BTreeMap, BTreeSet};

const TRAIN: &str = "train";
/// What each split is called in names of files and folders.
const KEYWORDS: [(&str, &[&str]); 3] = [
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];
/// Beside the data in many folders; never data.
const NOT_DATA: [&str; 9] = [
    "readme.md",
    "readme.txt",
    "license.md",
    "license.txt",
    "requirements.txt",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// The files of a data set.
pub(crate) struct Folder {
    /// Paths within it, with slashes.
    pub files: Vec<String>,
    /// Its README.md.
    pub card: Option<String>,
    /// The files are `CONFIG/SPLIT/FILE`, as in the hub's own conversion to Parquet.
    pub converted: bool,
}

/// The files of one config, by split.
#[derive(Debug, PartialEq)]
pub(crate) struct Splits(BTreeMap<String, Vec<String>>);

/// Whether a file of this name can hold records.
pub(crate) fn is_data(path: &str) -> bool {
    let hidden = path.split('/').any(|part| part.starts_with(['.', '_']));
    let name = path.rsplit('/').next().unwrap_or(path).to_lowercase();
    !hidden && !NOT_DATA.contains(&name.as_str()) && Format::of_name(&name).is_some()
}

impl Folder {
    /// The splits of `config`; without one, of the default or only one.
    ///
    /// # Errors
    /// Names the configs if there are several, or none of this name. No file at all is no error.
    pub fn splits(&self, config: Option<&str>) -> Result<Splits, String> {
        let configs = match &self.card {
            Some(card) => card::configs(card)?,
            None => Vec::new(),
        };
        let configs = if configs.is_empty() { self.folders(config) } else { configs };
        let chosen = choose(&configs, config)?;
        if chosen.data_files.is_empty() {
            return Ok(self.by_name(&chosen.folder));
        }
        let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (split, patterns) in &chosen.data_files {
            let mut files = Vec::new();
            for pattern in patterns {
                files.extend(self.matching(&format!("{}{pattern}", chosen.folder))?);
            }
            match split {
                Some(split) => splits.entry(split.clone()).or_default().extend(files),
                None => splits.extend(by_name(&files, "")),
            }
        }
        splits.retain(|_, files| !files.is_empty());
        Ok(Splits(splits))
    }

    /// Configs where no card names any: the folders of a conversion, or the one asked for.
    fn folders(&self, config: Option<&str>) -> Vec<Config> {
        let top = self.files.iter().filter(|file| is_data(file)).filter_map(|file| {
            let (folder, _) = file.split_once('/')?;
            Some(folder.to_string())
        });
        let of_folder =
            |name: String| Config { folder: format!("{name}/"), name, ..Config::default() };
        let folders = top.collect::<BTreeSet<_>>().into_iter().map(of_folder);
        match (self.converted, config) {
            (false, None | Some("default")) => {
                vec![Config { name: "default".into(), ..Config::default() }]
            }
            _ => folders.collect(),
        }
    }

    fn matching(&self, pattern: &str) -> Result<Vec<String>, String> {
        let glob = GlobBuilder::new(pattern).literal_separator(true).build();
        let glob = glob.map_err(|error| format!("the pattern \"{pattern}\": {error}"))?;
        let glob = glob.compile_matcher();
        let mut found: Vec<_> =
            self.files.iter().filter(|file| glob.is_match(file)).cloned().collect();
        found.retain(|file| Format::of_name(file).is_some());
        found.sort();
        Ok(found)
    }

    fn by_name(&self, folder: &str) -> Splits {
        let inside = self.files.iter().filter(|file| file.starts_with(folder) && is_data(file));
        let files: Vec<String> = inside.cloned().collect();
        if !self.converted {
            return Splits(by_name(&files, folder));
        }
        let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for file in files {
            if let Some((split, _)) = file[folder.len()..].split_once('/') {
                let split = split.strip_prefix("partial-").unwrap_or(split).to_string();
                splits.entry(split).or_default().push(file);
            }
        }
        splits.values_mut().for_each(|files| files.sort());
        Splits(splits)
    }
}

fn choose<'a>(configs: &'a [Config], asked: Option<&str>) -> Result<&'a Config, String> {
    let names = || {
        let names: Vec<_> = configs.iter().map(|config| format!("\"{}\"", config.name)).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    };
    match (asked, configs) {
        (Some(asked), _) => configs.iter().find(|config| config.name == asked).ok_or_else(|| {
            format!(
                "there is no config \"{asked}\" (--dataset-config); the configs are {}",
                names()
            )
        }),
        (None, [only]) => Ok(only),
        (None, _) => {
            let mut defaults = configs.iter().filter(|c| c.default || c.name == "default");
            defaults.next().ok_or_else(|| {
                format!("it has several configs; choose one with --dataset-config: {}", names())
            })
        }
    }
}

/// Sorts files into splits by the first rule that finds any: shards in `data/`, names of folders,
/// names of files. Without a split in any name, all are to train on.
fn by_name(files: &[String], folder: &str) -> BTreeMap<String, Vec<String>> {
    let files = of_one_format(files);
    let rules = [split_of_shard, split_of_folder, split_of_file];
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for rule in rules {
        for file in &files {
            if let Some(split) = rule(&file[folder.len()..]) {
                splits.entry(split.into()).or_default().push(file.to_string());
            }
        }
        if !splits.is_empty() {
            break;
        }
    }
    if splits.is_empty() && !files.is_empty() {
        splits.insert(TRAIN.into(), files.into_iter().cloned().collect());
    }
    splits.values_mut().for_each(|files| files.sort());
    splits
}

/// The files of the kind that most files are of: the others are the same data again, or notes.
fn of_one_format(files: &[String]) -> Vec<&String> {
    let formats =
        [Format::Text, Format::Tsv, Format::Csv, Format::Json, Format::JsonLines, Format::Parquet];
    let of = |format: Format| {
        files.iter().filter(move |file| Format::of_name(file) == Some(format)).collect::<Vec<_>>()
    };
    // The last of equals wins.
    formats.into_iter().map(of).max_by_key(Vec::len).unwrap_or_default()
}

/// `data/train_sft-00000-of-00001.parquet`: there any word is a split's name.
fn split_of_shard(path: &str) -> Option<&str> {
    let stem = path.strip_prefix("data/")?.split('.').next()?;
    let (rest, total) = stem.rsplit_once("-of-")?;
    let (name, index) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(total) && digits(index) && !name.is_empty()).then_some(name)
}

/// `data/dev/a.csv`; the innermost folder wins.
fn split_of_folder(path: &str) -> Option<&str> {
    let (folders, _) = path.rsplit_once('/')?;
    folders.rsplit('/').find_map(split_in)
}

/// `test.jsonl`, `my_dev-2.csv`.
fn split_of_file(path: &str) -> Option<&str> {
    split_in(path.rsplit('/').next()?)
}

/// The split that is a word of this name.
fn split_in(name: &str) -> Option<&'static str> {
    let between = |c: char| "-_ .".contains(c) || c.is_ascii_digit();
    name.split(between).find_map(keyword)
}

fn keyword(word: &str) -> Option<&'static str> {
    let known = KEYWORDS.iter().find(|(_, words)| words.contains(&word));
    known.map(|(split, _)| *split)
}

impl Splits {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The files of a split, also by another of its usual names; the error names those there are.
    pub fn files(&self, split: &str) -> Result<&[String], String> {
        let same = |name: &str| keyword(name).is_some() && keyword(name) == keyword(split);
        let found = self
            .0
            .get(split)
            .or_else(|| self.0.iter().find(|(name, _)| same(name)).map(|(_, files)| files));
        found.map(Vec::as_slice).ok_or_else(|| {
            let names: Vec<_> = self.0.keys().map(|name| format!("\"{name}\"")).collect();
            let part = match split.contains(['[', '+']) {
                true => " (to take a part of one, use --max-train-samples or --eval-fraction)",
                false => "",
            };
            format!(
                "there is no split \"{split}\"; the splits are {}{part}; choose with --train-split and --eval-split",
                names.join(", ")
            )
        })
    }

    /// All of them.
    pub fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    /// What is evaluated on unless something else is asked for.
    pub fn evaluation(&self) -> Option<&str> {
        let named = |wanted| self.0.keys().find(|name| keyword(name) == Some(wanted));
        named("validation").or_else(|| named("test")).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str], card: Option<&str>) -> Folder {
        let files = files.iter().map(|file| file.to_string()).collect();
        Folder { files, card: card.map(String::from), converted: false }
    }

    /// `split: file file` of each split.
    fn splits(folder: &Folder, config: Option<&str>) -> Result<Vec<String>, String> {
        let splits = folder.splits(config)?;
        Ok(splits.0.iter().map(|(split, files)| format!("{split}: {}", files.join(" "))).collect())
    }

    /// Against tests/make_data_splits.py.
    #[test]
    fn files_are_sorted_as_the_datasets_package_sorts_them() {
        let reference = include_str!("../../../tests/data_splits.json");
        let reference: serde_json::Value = serde_json::from_str(reference).unwrap();
        let cases = reference["cases"].as_array().unwrap();
        assert!(cases.len() > 15);
        for case in cases {
            let files = serde_json::from_value(case["files"].clone()).unwrap();
            let folder = Folder { files, card: None, converted: false };
            let found = serde_json::to_value(&folder.splits(None).unwrap().0).unwrap();
            assert_eq!(found, case["splits"], "{:?}", folder.files);
        }
    }

    #[test]
    fn scripts_and_notes_are_no_data() {
        assert!(folder(&["script.py", "README.md"], None).splits(None).unwrap().is_empty());
    }

    #[test]
    fn a_split_is_found_by_its_usual_names_and_a_missing_one_names_the_others() {
        let splits = folder(&["train.csv", "dev.csv", "test.csv"], None).splits(None).unwrap();
        assert_eq!(splits.files("dev").unwrap(), ["dev.csv"]);
        assert_eq!(splits.evaluation(), Some("validation"));
        let error = splits.files("unsupervised").unwrap_err();
        let known = "the splits are \"test\", \"train\", \"validation\"";
        assert!(error.contains(known), "{error}");
        let error = splits.files("train[:10%]").unwrap_err();
        assert!(error.contains("--max-train-samples"), "{error}");
    }

    const CARD: &str = "---
license: cc-by-sa-3.0
configs:
- config_name: wikitext-103-v1
  data_files:
  - split: test
    path: wikitext-103-v1/test-*
  - split: train
    path: wikitext-103-v1/train-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: [wikitext-2-raw-v1/train-*, 'extra/**/*.parquet']
- config_name: by-name
  data_dir: named
- config_name: mapped
  data_files: {train: 'x/{a,b}.csv', held: x/c.csv}
- config_name: listed
  data_files: [x/train.csv, x/test.csv]
---
# WikiText
";

    #[test]
    fn the_card_says_which_files_a_config_has() {
        let files = [
            "wikitext-103-v1/test-00000-of-00001.parquet",
            "wikitext-103-v1/train-00000-of-00002.parquet",
            "wikitext-103-v1/train-00001-of-00002.parquet",
            "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "extra/deep/more.parquet",
            "named/train.jsonl",
            "named/test.jsonl",
            "x/a.csv",
            "x/b.csv",
            "x/c.csv",
            "x/train.csv",
            "x/test.csv",
        ];
        let folder = folder(&files, Some(CARD));
        let of = |config| splits(&folder, Some(config)).unwrap();
        assert_eq!(
            of("wikitext-103-v1"),
            [format!("test: {}", files[0]), format!("train: {} {}", files[1], files[2])]
        );
        assert_eq!(of("wikitext-2-raw-v1"), [format!("train: {} {}", files[3], files[4])]);
        assert_eq!(of("by-name"), ["test: named/test.jsonl", "train: named/train.jsonl"]);
        assert_eq!(of("mapped"), ["held: x/c.csv", "train: x/a.csv x/b.csv"]);
        assert_eq!(of("listed"), ["test: x/test.csv", "train: x/train.csv"]);
        let error = folder.splits(Some("wikitext-2")).unwrap_err();
        assert!(
            error.contains("the configs are \"wikitext-103-v1\", \"wikitext-2-raw-v1\""),
            "{error}"
        );
        let error = folder.splits(None).unwrap_err();
        assert!(error.contains("choose one with --dataset-config: \"wikitext-103-v1\""), "{error}");
        let broken = Folder { card: Some("---\nconfigs: [\n---".into()), ..folder };
        assert!(broken.splits(None).unwrap_err().contains("front matter of README.md"));
    }

    #[test]
    fn a_conversion_has_folders_of_configs_and_splits() {
        let files = [
            "plain/train_sft/0001.parquet",
            "plain/train_sft/0000.parquet",
            "plain/partial-test/0000.parquet",
            "other/train/0000.parquet",
        ];
        let folder = Folder { converted: true, ..folder(&files, None) };
        let found = splits(&folder, Some("plain")).unwrap();
        assert_eq!(
            found,
            [
                "test: plain/partial-test/0000.parquet",
                "train_sft: plain/train_sft/0000.parquet plain/train_sft/0001.parquet"
            ]
        );
        let error = folder.splits(None).unwrap_err();
        assert!(error.contains("\"other\", \"plain\""), "{error}");
    }
}
