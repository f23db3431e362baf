use super::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedKey, IsCa, KeyPair, generate_simple_self_signed,
};
use std::path::Path;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn own() -> CertifiedKey<KeyPair> {
    generate_simple_self_signed(["localhost".to_string()]).unwrap()
}

/// Files of these texts.
fn files(dir: &Path, cert: &str, key: &str) -> TlsFiles {
    let (cert_path, key_path) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert_path, cert).unwrap();
    std::fs::write(&key_path, key).unwrap();
    let config = TlsConfig { cert: Some(cert_path), key: Some(key_path), client_ca: None };
    TlsFiles::of(&config).unwrap()
}

fn load(files: &TlsFiles) -> Result<Identity, TlsError> {
    files.identity(&files.read()?)
}

#[test]
fn files_are_loaded_and_what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (own(), own());
    let (cert, key) = (a.cert.pem(), a.signing_key.serialize_pem());
    assert_eq!(load(&files(dir.path(), &cert, &key)).unwrap().offers.grpc.alpn_protocols, [b"h2"]);
    let refusal = |cert: &str, key: &str| {
        load(&files(dir.path(), cert, key)).err().expect("it is refused").to_string()
    };
    let other_key = refusal(&cert, &b.signing_key.serialize_pem());
    assert!(other_key.contains("does not belong to the first certificate"), "{other_key}");
    assert!(refusal("", &key).contains("-----BEGIN CERTIFICATE-----"));
    assert!(refusal(&cert, &cert).contains("-----BEGIN PRIVATE KEY-----"));
    let half = &key[..key.len() / 2];
    let cut_off = refusal(&cert, half);
    assert!(cut_off.contains("tls.key") && cut_off.contains("cut off"), "{cut_off}");
    // Nothing of a key in a text.
    let line = half.lines().nth(1).unwrap();
    assert!(!cut_off.contains(&line[..8]));
    let mut gone = files(dir.path(), &cert, &key);
    gone.cert = dir.path().join("none.pem");
    assert!(load(&gone).err().unwrap().to_string().contains("none.pem"));
}

#[test]
fn what_clients_refuse_is_known_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let why = |names: &[&str], is_ca: IsCa| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.is_ca = is_ca;
        let cert = params.self_signed(&key).unwrap().pem();
        load(&files(dir.path(), &cert, &key.serialize_pem())).unwrap().refused_for.join("; ")
    };
    assert_eq!(why(&["localhost"], IsCa::ExplicitNoCa), "");
    assert_eq!(why(&["localhost"], IsCa::NoCa), "");
    let as_openssl_makes_it = IsCa::Ca(BasicConstraints::Unconstrained);
    let text = why(&["localhost"], as_openssl_makes_it);
    assert!(text.contains("a CA's") && !text.contains("subjectAltName"), "{text}");
    assert!(why(&[], IsCa::ExplicitNoCa).contains("no subjectAltName"));
}

#[test]
fn the_days_left_are_those_of_the_first_end_in_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let key = KeyPair::generate().unwrap();
    let until = |end: SystemTime| {
        let mut params = CertificateParams::new(["localhost".to_string()]).unwrap();
        params.not_after = end.into();
        params.self_signed(&key).unwrap().pem()
    };
    let (long, short) = (until(now + 100 * DAY), until(now + 5 * DAY + DAY / 2));
    let pem = key.serialize_pem();
    let days = |cert: &str| load(&files(dir.path(), cert, &pem)).unwrap().days_left(now);
    assert_eq!(days(&short), 5);
    assert_eq!(days(&format!("{long}{short}")), 5);
    assert_eq!(days(&until(now - DAY / 2)), -1);
    assert_eq!(days(&until(now - DAY * 3 / 2)), -2);
}

#[test]
fn a_change_counts_when_it_has_settled_and_once() {
    let mut changes = Changes::since([0; 32]);
    assert!(!changes.settled([0; 32]));
    // Half written, then whole.
    assert!(!changes.settled([1; 32]));
    assert!(!changes.settled([2; 32]));
    assert!(changes.settled([2; 32]));
    assert!(!changes.settled([2; 32]));
    // And back.
    assert!(!changes.settled([0; 32]));
    assert!(changes.settled([0; 32]));
}

#[tokio::test(start_paused = true)]
async fn a_broken_pair_keeps_the_one_before_and_a_good_one_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (own(), own());
    let files = files(dir.path(), &a.cert.pem(), &a.signing_key.serialize_pem());
    let config = TlsConfig {
        cert: Some(files.cert.clone()),
        key: Some(dir.path().join("key.pem")),
        client_ca: None,
    };
    let tls = Tls::start(&config).await.unwrap().unwrap();
    let now = || tls.shown.borrow().clone();
    let first = now();
    // The certificate alone does not fit the key.
    std::fs::write(&files.cert, b.cert.pem()).unwrap();
    tokio::time::sleep(10 * LOOK).await;
    assert!(Arc::ptr_eq(&first, &now()));
    std::fs::remove_file(&files.cert).unwrap();
    tokio::time::sleep(10 * LOOK).await;
    assert!(Arc::ptr_eq(&first, &now()));
    std::fs::write(&files.cert, b.cert.pem()).unwrap();
    std::fs::write(dir.path().join("key.pem"), b.signing_key.serialize_pem()).unwrap();
    tokio::time::sleep(10 * LOOK).await;
    assert!(!Arc::ptr_eq(&first, &now()));
}
