use super::*;
use crate::error::Error;

fn fine() -> ServerConfig {
    let mut config = ServerConfig::default();
    config.model.name = "some/model".into();
    config.model.split_point_2 = 3;
    config
}

fn mistakes(config: &ServerConfig) -> Vec<&'static str> {
    match config.validate() {
        Ok(()) => Vec::new(),
        Err(Error::Config(Mistakes(all))) => all.iter().map(|m| m.key).collect(),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn all_mistakes_come_at_once() {
    assert!(mistakes(&fine()).is_empty());
    let mut config = fine();
    config.model.split_point_1 = 5;
    config.model.device = "tpu".into();
    config.limits.max_rank = 0;
    config.session.lease_seconds = f64::NAN;
    assert_eq!(
        mistakes(&config),
        ["model.split_point_2", "model.device", "limits.max_rank", "session.lease_seconds"]
    );
    assert!(config.validate().unwrap_err().to_string().contains("limits.max_rank is \"0\""));
}

#[test]
fn only_loopback_without_a_word() {
    for host in ["127.0.0.1", "::1", "localhost", "127.3.2.1"] {
        let mut config = fine();
        config.listen.host = host.into();
        assert!(mistakes(&config).is_empty(), "{host}");
    }
    let mut config = fine();
    config.listen.host = "0.0.0.0".into();
    let text = config.validate().unwrap_err().to_string();
    assert!(text.contains("without access.tenants") && text.contains("offshoot tenant"), "{text}");
    assert!(text.contains("allow_insecure_network"), "{text}");
    config.access.tenants = Some("tenants.toml".into());
    let text = config.validate().unwrap_err().to_string();
    assert!(text.contains("tls.cert") && text.contains("allow_insecure_network"), "{text}");
    let mut encrypted = config.clone();
    (encrypted.tls.cert, encrypted.tls.key) = (Some("c".into()), Some("k".into()));
    assert!(mistakes(&encrypted).is_empty());
    encrypted.access.tenants = None;
    assert_eq!(mistakes(&encrypted), ["listen.host"]);
    config.listen.allow_insecure_network = true;
    assert!(mistakes(&config).is_empty());
}

#[test]
fn http_follows_the_same_rule_where_it_listens() {
    let mut config = fine();
    config.http.host = "0.0.0.0".into();
    // Nothing listens there.
    assert!(mistakes(&config).is_empty());
    config.http.port = Some(9464);
    assert_eq!(mistakes(&config), ["http.host"]);
    let mut kept = config.clone();
    kept.access.tenants = Some("tenants.toml".into());
    assert_eq!(mistakes(&kept), ["http.host"]);
    (kept.tls.cert, kept.tls.key) = (Some("c".into()), Some("k".into()));
    assert!(mistakes(&kept).is_empty());
    config.listen.allow_insecure_network = true;
    assert!(mistakes(&config).is_empty());
    config.http.host = "console.example".into();
    assert_eq!(mistakes(&config), ["http.host"]);
}

#[test]
fn unknown_keys_are_errors() {
    let text = r#"{"limits": {"max_rnk": 3}}"#;
    let error = serde_json::from_str::<ServerConfig>(text).unwrap_err().to_string();
    assert!(error.contains("max_rnk"), "{error}");
    let text = r#"{"model": {"dtype": "bf16"}, "limits": {"max_rank": 3}}"#;
    let config: ServerConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.model.dtype, ComputeDType::Bf16);
    assert_eq!(config.limits.max_rank, 3);
    assert_eq!(config.limits.max_tokens_per_microbatch, 8192);
}

#[test]
fn bytes_are_written_as_people_do() {
    let read = |text: &str| serde_json::from_str::<LimitsConfig>(text);
    for (text, bytes) in [("\"8GiB\"", 8 << 30), ("\"1.5 GB\"", 1_500_000_000), ("12345", 12345)] {
        let config = read(&format!(r#"{{"memory_bytes": {text}}}"#)).unwrap();
        assert_eq!(config.memory_bytes, Some(bytes), "{text}");
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(read(&again).unwrap(), config);
    }
    assert_eq!(read("{}").unwrap().memory_bytes, None);
    assert!(read(r#"{"memory_bytes": "much"}"#).is_err());
}
