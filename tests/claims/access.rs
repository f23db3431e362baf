//! What is written down about who did what, and what never is.

use crate::tenants::{Shared, entry, token};
use offshoot_client::Client;
use offshoot_tests::run::{open_request, train};
use serde_json::Value;
use std::path::Path;

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_says_who_did_what_and_holds_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let text = entry("blue", &[("blue", "")]) + &entry("red", &[("red", "")]);
    let shared = Shared::start_with_text(&text, |config| {
        config.access.audit_log = Some(path.clone());
    })
    .await;
    let (blue, red) = (shared.client("blue").await.unwrap(), shared.client("red").await.unwrap());
    let h = blue.describe().await.unwrap().hidden_size;
    let session = blue.open(open_request(&blue).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    let id = session.id().clone();
    let taken = session.snapshot().await.unwrap();
    session.export().await.unwrap();
    assert!(red.restore(&id, None).await.is_err());
    session.close(false).await.unwrap();
    let session = blue.restore(&id, Some(&taken.snapshot_id)).await.unwrap().0;
    session.close(true).await.unwrap();
    for _ in 0..20 {
        // Without a token.
        match Client::connect(&shared.server.endpoint()).await {
            Ok(client) => assert!(client.describe().await.is_err()),
            Err(error) => assert!(error.to_string().contains("token"), "{error}"),
        }
    }
    shared.write(&(text + "\n# The same.\n"));
    shared.server.reload();
    shared.server.drain().await;

    let lines = lines(&path);
    let told = |line: &Value| {
        let part = |key: &str| line[key].as_str().unwrap_or("-").to_string();
        format!("{} {} {}", part("tenant"), part("action"), part("outcome"))
    };
    let all: Vec<String> = lines.iter().map(told).collect();
    let mut at = 0;
    for expected in [
        "blue open ok",
        "blue attach ok",
        "blue snapshot ok",
        "blue export ok",
        "red restore unknown_session",
        "blue close ok",
        "blue restore ok",
        "blue forget ok",
        "- refused_authentication unauthenticated",
        "- tenants_reloaded ok",
    ] {
        let found = all[at..].iter().position(|line| line == expected);
        at += found.unwrap_or_else(|| panic!("{expected} is not behind {at} in {all:#?}"));
    }
    let refused = lines.iter().filter(|line| line["action"] == "refused_authentication");
    let counts: Vec<u64> = refused.map(|line| line["count"].as_u64().unwrap_or(1)).collect();
    assert!(counts.len() <= 2 && counts.iter().sum::<u64>() >= 20, "{counts:?}");
    let restored = lines.iter().find(|line| told(line) == "blue restore ok").unwrap();
    assert_eq!(restored["session"], id.as_str());
    assert_eq!(restored["snapshot"], taken.snapshot_id.as_str());
    assert_eq!(restored["token"], "blue");
    assert!(restored["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(restored["time"].as_str().unwrap().ends_with('Z'));
    let text = std::fs::read_to_string(&path).unwrap();
    for name in ["blue", "red"] {
        assert!(!text.contains(&token(name)) && !text.contains("AAAA"));
    }
}
