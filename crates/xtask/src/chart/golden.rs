//! Renders that somebody has read, in charts/offshoot/ci/golden: a change of the chart shows there what it
//! changes for users.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Rendered;

/// Replaces them all.
pub fn write(folder: &Path, sets: &[Rendered]) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    for set in sets {
        for (file, text) in files(set) {
            fs::write(folder.join(file), text)?;
        }
    }
    eprintln!("chart: wrote {}; read its difference before you commit it", folder.display());
    Ok(())
}

/// Where they differ from what was rendered, and those that are too many or missing.
pub fn differences(folder: &Path, sets: &[Rendered]) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("{}: `cargo xtask chart --update` writes it", folder.display()))?;
    let mut there = BTreeSet::new();
    for entry in entries {
        there.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    let mut wrong = Vec::new();
    for set in sets {
        for (file, text) in files(set) {
            if !there.remove(&file) {
                wrong.push(format!("ci/golden/{file} is missing: `cargo xtask chart --update`"));
            } else if let Some(line) =
                first_difference(&fs::read_to_string(folder.join(&file))?, text)
            {
                wrong.push(format!(
                    "not as in ci/golden/{file}, {line}. If that is meant: `cargo xtask chart --update`"
                ));
            }
        }
    }
    wrong.extend(there.iter().map(|file| format!("ci/golden/{file} belongs to no set of values")));
    Ok(wrong)
}

fn files(set: &Rendered) -> [(String, &str); 2] {
    [(format!("{}.yaml", set.name), &set.text), (format!("{}.notes.txt", set.name), &set.notes)]
}

/// Where and how two texts first differ.
fn first_difference(expected: &str, found: &str) -> Option<String> {
    if expected == found {
        return None;
    }
    let (mut old, mut new) = (expected.lines(), found.lines());
    let mut number = 1;
    loop {
        match (old.next(), new.next()) {
            (Some(old), Some(new)) if old == new => number += 1,
            (None, None) => return Some("in its last line's end".into()),
            (old, new) => {
                let shown = |line: Option<&str>| line.unwrap_or("(its end)").to_owned();
                return Some(format!(
                    "line {number}: expected `{}`, rendered `{}`",
                    shown(old),
                    shown(new)
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, text: &str) -> Rendered {
        let notes = format!("notes of {name}\n");
        Rendered { name: name.into(), text: text.into(), notes, documents: Vec::new() }
    }

    #[test]
    fn a_change_a_missing_file_and_one_too_many_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        write(folder, &[set("a", "x: 1\ny: 2\n"), set("b", "z: 1\n")]).unwrap();
        assert!(
            differences(folder, &[set("a", "x: 1\ny: 2\n"), set("b", "z: 1\n")])
                .unwrap()
                .is_empty()
        );
        let wrong =
            differences(folder, &[set("a", "x: 1\ny: 3\n"), set("c", "")]).unwrap().join("\n");
        assert!(wrong.contains("line 2: expected `y: 2`, rendered `y: 3`"), "{wrong}");
        assert!(
            wrong.contains("c.yaml is missing") && wrong.contains("b.yaml belongs to no"),
            "{wrong}"
        );
        assert!(wrong.contains("c.notes.txt is missing"), "{wrong}");
    }
}
