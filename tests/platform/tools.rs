//! The tools are what they are taken for.

use offshoot_platform::tool;
use std::process::Command;

fn says(name: &str, args: &[&str]) -> String {
    let output = Command::new(tool(name)).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn each_tool_runs_and_says_what_it_is() {
    for (name, args, expected) in [
        ("rotel", &["--version"][..], "rotel"),
        ("prometheus", &["--version"], "prometheus, version"),
        ("promtool", &["--version"], "promtool, version"),
        ("helm", &["version"], "v4"),
        ("kubernetes-validate", &["--version"], "1."),
        ("buildah", &["--version"], "buildah version"),
        ("bwrap", &["--version"], "bubblewrap"),
        ("cyclonedx-validate", &["--version"], "cyclonedx-python-lib"),
        ("check-jsonschema", &["--version"], "jsonschema, version"),
        ("chromium", &["--version"], "Chromium"),
    ] {
        let said = says(name, args);
        assert!(said.contains(expected), "{name} {args:?} said: {said}");
    }
}
