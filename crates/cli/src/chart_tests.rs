//! What the Helm chart writes into server.toml, the program takes: of each of its reviewed renders.

use crate::serve_config::settings;
use serde_json::json;
use std::fs;
use std::path::Path;

/// The text below `server.toml: |` of a rendered ConfigMap.
fn server_toml(render: &str) -> Option<String> {
    let (_, rest) = render.split_once("\n  server.toml: |\n")?;
    let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
    Some(lines.map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line))).collect())
}

#[test]
fn the_program_takes_the_settings_that_the_chart_writes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/offshoot/ci/golden");
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("server.toml");
    let mut n_seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let Some(toml) = server_toml(&text) else { continue };
        fs::write(&file, &toml).unwrap();
        let config = settings(Some(&file), json!({}))
            .unwrap_or_else(|error| panic!("{}: {error:#}\n{toml}", path.display()));
        config.validate().unwrap_or_else(|error| panic!("{}: {error}\n{toml}", path.display()));
        let host = config.listen.host.as_str();
        assert!(["0.0.0.0", "::"].contains(&host), "{host}: {}", path.display());
        n_seen += 1;
        if path.ends_with("everything.yaml") {
            assert_eq!(config.limits.memory_bytes, Some(75_161_927_680));
            assert_eq!(
                (config.limits.batch_wait_seconds, config.session.turn_seconds),
                (0.002, 0.5)
            );
            assert_eq!((config.drain.timeout_seconds, config.session.snapshot_steps), (90.5, 100));
            assert_eq!(config.tls.cert, Some("/etc/offshoot-tls/tls.crt".into()));
            assert_eq!(config.access.tenants, Some("/etc/offshoot-tenants/teams.toml".into()));
        }
    }
    assert!(n_seen >= 10, "{n_seen} renders");
}
