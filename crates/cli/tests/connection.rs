//! The way to a server with TLS and tenants, as every command takes it, and what is said where the two
//! sides do not fit.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

fn model() -> String {
    format!("{}/../../tests/fixtures/tiny_text", env!("CARGO_MANIFEST_DIR"))
}

fn offshoot(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    command.args(line.split_whitespace()).env("OMP_NUM_THREADS", "1").env_remove("OFFSHOOT_TOKEN");
    // Not the user's.
    command.env("OFFSHOOT_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/tokens"));
    command
}

/// An issuer of certificates for this machine.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes NAME.pem and NAME.key.
    fn issue(&self, dir: &Path, name: &str, for_whom: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(vec!["trunk.test".to_string()]).unwrap();
        params.extended_key_usages = vec![for_whom];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        fs::write(dir.join(format!("{name}.pem")), cert.pem()).unwrap();
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// A folder with texts, certificates and tokens, and a server that ends with the test.
struct Place {
    dir: TempDir,
    server: Option<Child>,
    port: u16,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..30).map(|i| format!("Branch {i} of the trunk has {} leaves.", i * 7)).collect();
        fs::write(dir.path().join("texts.txt"), texts.join("\n\n")).unwrap();
        Place { dir, server: None, port: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn serve(&mut self, more: &str) {
        let line = "serve --split-point-1 1 --split-point-2 3 --threads 1 --log error --port 0";
        let mut command = offshoot(&format!("{line} {more} --store-dir store"));
        command.args(["--model-name", &model()]).current_dir(self.dir.path());
        let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.server = Some(server);
        self.port = line.trim_end().rsplit(':').next().unwrap().parse().expect("it is ready");
    }

    /// What a command that must succeed says on stdout and stderr.
    fn fine(&self, line: &str, token: Option<&str>) -> String {
        let output = self.command(line, token).output().unwrap();
        let text = said(&output.stdout) + &said(&output.stderr);
        assert!(output.status.success(), "{line}: {text}");
        text
    }

    /// The error of one that must not.
    fn fails(&self, line: &str, token: Option<&str>) -> String {
        let output = self.command(line, token).output().unwrap();
        assert!(!output.status.success(), "{line}");
        let text = said(&output.stderr).trim_end().to_string();
        println!("{line}\n  {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    fn command(&self, line: &str, token: Option<&str>) -> Command {
        let line = line.replace("MODEL", &model()).replace("PORT", &self.port.to_string());
        let mut command = offshoot(&line);
        command.current_dir(self.dir.path()).envs(token.map(|token| ("OFFSHOOT_TOKEN", token)));
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // It may have ended by itself.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// All files below a folder, as bytes.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let each = entries.flat_map(|path| match path.is_dir() {
        true => files(&path),
        false => vec![(path.clone(), fs::read(&path).unwrap())],
    });
    each.collect()
}

const TRAIN: &str = "train --model-name MODEL --train-file texts.txt --output-dir run";

#[test]
fn every_command_reaches_a_server_with_mutual_tls_and_tenants_and_keeps_its_token_to_itself() {
    let mut place = Place::new();
    let ca = Ca::new();
    ca.issue(place.dir.path(), "server", ExtendedKeyUsagePurpose::ServerAuth);
    ca.issue(place.dir.path(), "client", ExtendedKeyUsagePurpose::ClientAuth);
    fs::write(place.path("ca.pem"), ca.0.pem()).unwrap();
    let output = place.command("tenant add blue --tenants tenants.toml", None).output().unwrap();
    let token = said(&output.stdout).trim().to_string();
    fs::write(place.path("token"), format!("{token}\n")).unwrap();
    place.serve(
        "--tenants tenants.toml --tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem",
    );

    let tls = "--tls-ca ca.pem --tls-name trunk.test --tls-cert client.pem --tls-key client.key";
    let way = format!("--server 127.0.0.1:PORT {tls}");
    let mut texts = place.fine(&format!("{TRAIN} {way} --token-file token --max-steps 3"), None);
    let with_file = format!("{way} --token-file token");
    for line in [
        "train --config run/config.toml --output-dir run --resume latest --max-steps 4".to_string(),
        format!("generate --adapter run --prompt trunk --max-tokens 3 {with_file}"),
        format!("eval --adapter run --eval-file texts.txt {with_file}"),
        format!("export run --output exported {with_file}"),
        format!("import exported --model-name MODEL --output-dir imported {with_file}"),
        format!("verify --model MODEL {with_file}"),
        format!("bench {with_file} --sessions 1 --steps 1 --warm-up 0 --tokens 4 --sequences 1"),
    ] {
        texts += &place.fine(&line, None);
    }
    // From the environment.
    let line = format!("{TRAIN} {way} --resume latest --max-steps 5");
    texts += &place.fine(&line, Some(&token));

    let secret = token.rsplit('_').next().unwrap();
    assert!(!texts.contains(secret), "{texts}");
    for (path, bytes) in files(&place.path("run")) {
        let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{}", path.display());
    }
    let config = fs::read_to_string(place.path("run/config.toml")).unwrap();
    assert!(config.contains("tls_ca = \"ca.pem\""), "{config}");

    // What does not fit is said at once, in one line.
    let says = |line: &str, token: Option<&str>, words: &[&str]| {
        let text = place.fails(line, token);
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let run = "train --model-name MODEL --train-file texts.txt --output-dir other";
    let server = format!("{run} --server 127.0.0.1:PORT");
    let token = Some(token.as_str());
    let mine = "--tls-cert client.pem --tls-key client.key";
    says(&server, token, &["it speaks TLS, and this client does not; use https://"]);
    says(
        &format!("{server} --tls-ca client.pem --tls-name trunk.test {mine}"),
        token,
        &["its certificate is not signed by the CA in client.pem", "--tls-ca"],
    );
    says(
        &format!("{run} --server https://127.0.0.1:PORT"),
        token,
        &["no secure connection", "certificate"],
    );
    says(
        &format!("{server} --tls-ca ca.pem {mine}"),
        token,
        &["not valid for name", "trunk.test", "--tls-name"],
    );
    says(
        &format!("{server} --tls-ca ca.pem --tls-name trunk.test"),
        token,
        &["it asks for a client certificate", "--tls-cert"],
    );
    Ca::new().issue(place.dir.path(), "stranger", ExtendedKeyUsagePurpose::ClientAuth);
    says(
        &format!(
            "{server} --tls-ca ca.pem --tls-name trunk.test --tls-cert stranger.pem --tls-key stranger.key"
        ),
        token,
        &["it refuses this client's certificate", "--tls-client-ca"],
    );
    says(
        &format!(
            "{server} --tls-ca ca.pem --tls-name trunk.test --tls-cert client.pem --tls-key stranger.key"
        ),
        token,
        &["no secure connection"],
    );
    says(&format!("{server} {tls}"), None, &["does not let this client in", "OFFSHOOT_TOKEN"]);
    let wrong = Some("ofs_aaaa_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
    says(
        &format!("{server} {tls}"),
        wrong,
        &["does not let this client in", "ask the server's operator"],
    );
}

#[test]
fn a_token_does_not_travel_in_clear_text() {
    let mut place = Place::new();
    let run = "train --model-name MODEL --train-file texts.txt --max-steps 1";
    let token = Some("ofs_1_secret");
    let text = place.fails(&format!("{run} --server trunk.invalid:1"), token);
    assert!(text.contains("would travel to trunk.invalid:1 in clear text"), "{text}");
    assert!(text.contains("--allow-insecure-token") && !text.contains("secret"), "{text}");
    let text =
        place.fails(&format!("{run} --server trunk.invalid:1 --allow-insecure-token"), token);
    assert!(text.contains("no answer from trunk.invalid:1"), "{text}");

    // A server without tenants takes anybody; TLS it does not speak.
    place.serve("");
    place.fine(&format!("{run} --output-dir a --server 127.0.0.1:PORT"), token);
    let text = place.fails(&format!("{run} --output-dir b --server https://127.0.0.1:PORT"), token);
    assert!(text.contains("it answers without TLS; use http://"), "{text}");
}
