use crate::pki::{Ca, For, Pair, file, pair_files};
use offshoot_client::{Client, ClientError, ClientOptions, TlsOptions};
use offshoot_proto::v1::DescribeRequest;
use offshoot_server::{Error, Server, ServerConfig, TlsConfig};
use offshoot_tests::raw;
use offshoot_tests::run::{assert_same_adapter, open_request, train};
use offshoot_tests::{TestServer, server_config};
use rcgen::{BasicConstraints, IsCa};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

/// A server with TLS on.
struct Encrypted {
    server: TestServer,
    /// Its files, and whatever a test adds.
    dir: tempfile::TempDir,
}

impl Encrypted {
    /// With this certificate, and mutual TLS if the clients' issuer is named.
    async fn start(pair: &Pair, clients: Option<&Ca>) -> Encrypted {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = pair_files(dir.path(), "server", pair);
        let client_ca = clients.map(|ca| file(dir.path(), "clients.pem", &ca.pem()));
        let tls = TlsConfig { cert: Some(cert), key: Some(key), client_ca };
        Encrypted { server: start(dir.path(), tls, |_| {}).await, dir }
    }

    /// Of a client that trusts `ca`.
    fn trusting(&self, ca: &Ca) -> TlsOptions {
        TlsOptions { ca: Some(file(self.dir.path(), "ca.pem", &ca.pem())), ..Default::default() }
    }

    async fn describe(&self, tls: TlsOptions) -> Result<(), ClientError> {
        connect(self.server.address(), tls).await?.describe().await.map(drop)
    }
}

async fn start(dir: &Path, tls: TlsConfig, change: impl FnOnce(&mut ServerConfig)) -> TestServer {
    let mut config = server_config(&dir.join("store"));
    config.tls = tls;
    change(&mut config);
    TestServer::start_with(config).await
}

async fn connect(address: SocketAddr, tls: TlsOptions) -> Result<Client, ClientError> {
    let patience = Duration::from_millis(200);
    let options = ClientOptions { tls, connect_patience: patience, ..Default::default() };
    Client::connect_with(&format!("https://{address}"), options).await
}

/// With a certificate of its own.
fn showing(dir: &Path, pair: &Pair, tls: TlsOptions) -> TlsOptions {
    let (cert, key) = pair_files(dir, "client", pair);
    TlsOptions { cert: Some(cert), key: Some(key), ..tls }
}

/// The certificate that a new connection gets.
async fn shown(address: SocketAddr, ca: &Ca) -> Vec<u8> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("localhost").unwrap();
    let tcp = TcpStream::connect(address).await.unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
    session.peer_certificates().unwrap()[0].to_vec()
}

async fn until_shown(address: SocketAddr, ca: &Ca, expected: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while shown(address, ca).await != expected {
        assert!(Instant::now() < deadline, "the new certificate is not shown");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_trust_the_server_does_not_speak_to_it() {
    let (ca, other) = (Ca::new(), Ca::new());
    let encrypted = Encrypted::start(&ca.make(For::Server), None).await;
    encrypted.describe(encrypted.trusting(&ca)).await.unwrap();
    let named = |name: &str| TlsOptions { name: Some(name.into()), ..encrypted.trusting(&ca) };
    encrypted.describe(named("localhost")).await.unwrap();
    let error = encrypted.describe(named("elsewhere.example")).await.unwrap_err();
    println!("another name: {error}");
    let error = encrypted.describe(encrypted.trusting(&other)).await.unwrap_err();
    println!("another issuer: {error}");
    // And nobody answers a client that does not encrypt.
    let plain =
        ClientOptions { connect_patience: Duration::from_millis(200), ..Default::default() };
    let error = Client::connect_with(&encrypted.server.endpoint(), plain).await.unwrap_err();
    println!("not encrypted: {error}");
    let ended = SystemTime::now() - Duration::from_secs(3600);
    let expired = Encrypted::start(&ca.make_until(For::Server, ended), None).await;
    let error = expired.describe(expired.trusting(&ca)).await.unwrap_err();
    println!("expired: {error}");
}

/// Each in words, without the names that programs have for it.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_were_made_wrong_are_told_with_what_mends_them() {
    let ca = Ca::new();
    let said = |server: Pair, change: fn(&Path, &Ca, &mut TlsOptions)| {
        let ca = &ca;
        async move {
            let encrypted = Encrypted::start(&server, None).await;
            let mut tls = TlsOptions { name: Some("localhost".into()), ..encrypted.trusting(ca) };
            change(encrypted.dir.path(), ca, &mut tls);
            let text = encrypted.describe(tls).await.unwrap_err().to_string();
            assert!(text.starts_with("no secure connection to "), "{text}");
            assert!(!text.contains("Other"), "{text}");
            text
        }
    };
    let of_a_ca = ca.make_with(For::Server, &["localhost"], |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let text = said(of_a_ca, |_, _, _| {}).await;
    assert!(text.contains("made with basicConstraints=critical,CA:FALSE"), "{text}");
    let nameless = ca.make_with(For::Server, &[], |_| {});
    let text = said(nameless, |_, _, _| {}).await;
    assert!(text.contains("made with subjectAltName=DNS:localhost"), "{text}");
    let text = said(ca.make(For::Client), |_, _, _| {}).await;
    assert!(text.contains("is not one for servers"), "{text}");
    // The client's own.
    let text = said(ca.make(For::Server), |dir, ca, tls| {
        (tls.cert, _) = optional(pair_files(dir, "a", &ca.make(For::Client)));
        (_, tls.key) = optional(pair_files(dir, "b", &ca.make(For::Client)));
    });
    let text = text.await;
    assert!(
        text.contains("b.key (--tls-key) does not belong to") && text.contains("a.pem"),
        "{text}"
    );
}

fn optional((cert, key): (PathBuf, PathBuf)) -> (Option<PathBuf>, Option<PathBuf>) {
    (Some(cert), Some(key))
}

/// Runs a line of shell in this folder.
fn shell(dir: &Path, line: &str) -> std::process::Output {
    std::process::Command::new("sh").current_dir(dir).args(["-c", line]).output().unwrap()
}

/// Where there is an OpenSSL 3.
#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_page_make_certificates_that_work() {
    let dir = tempfile::tempdir().unwrap();
    let version = shell(dir.path(), "openssl version").stdout;
    if !version.starts_with(b"OpenSSL 3") {
        println!("no OpenSSL 3 here: {}", String::from_utf8_lossy(&version));
        return;
    }
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md");
    let page = std::fs::read_to_string(page).unwrap().replace("\\\n", " ");
    let commands: Vec<&str> = page.lines().filter(|line| line.starts_with("openssl ")).collect();
    assert_eq!(commands.len(), 3);
    for command in commands {
        let made = shell(dir.path(), command);
        assert!(made.status.success(), "{command}: {}", String::from_utf8_lossy(&made.stderr));
    }
    let path = |name: &str| Some(dir.path().join(name));
    let tls = TlsConfig {
        cert: path("server.pem"),
        key: path("server.key"),
        client_ca: path("clients.pem"),
    };
    let server = start(dir.path(), tls, |_| {}).await;
    let mut options = TlsOptions {
        ca: path("server.pem"),
        cert: path("blue.pem"),
        key: path("blue.key"),
        name: Some("trunk.example.com".into()),
    };
    let describe = async |options: &TlsOptions| {
        connect(server.address(), options.clone()).await?.describe().await.map(drop)
    };
    describe(&options).await.unwrap();
    // What others would make of it: a certificate without extensions.
    let old = "openssl req -new -key blue.key -subj /CN=blue -out blue.csr && \
               openssl x509 -req -in blue.csr -CA clients.pem -CAkey clients.key -out old.pem";
    assert!(shell(dir.path(), old).status.success());
    options.cert = path("old.pem");
    let text = describe(&options).await.unwrap_err().to_string();
    assert!(text.contains("old.pem (--tls-cert) is of X.509 version 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_mutual_tls_only_certificates_of_the_named_issuer_get_in() {
    let (ca, clients, other) = (Ca::new(), Ca::new(), Ca::new());
    let encrypted = Encrypted::start(&ca.make(For::Server), Some(&clients)).await;
    let (dir, trusting) = (encrypted.dir.path(), || encrypted.trusting(&ca));
    let good = clients.make(For::Client);
    encrypted.describe(showing(dir, &good, trusting())).await.unwrap();
    let error = encrypted.describe(trusting()).await.unwrap_err();
    println!("no certificate: {error}");
    let ended = SystemTime::now() - Duration::from_secs(3600);
    for (what, pair) in [
        ("another issuer", other.make(For::Client)),
        ("the server's issuer", ca.make(For::Client)),
        ("not for clients", clients.make(For::Server)),
        ("expired", clients.make_until(For::Client, ended)),
    ] {
        match encrypted.describe(showing(dir, &pair, trusting())).await {
            Ok(()) => panic!("{what}: got in"),
            Err(error) => println!("{what}: {error}"),
        }
    }
    encrypted.describe(showing(dir, &good, trusting())).await.unwrap();
}

/// A folder as Kubernetes mounts a secret: the files are links through one link that is swapped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: &Path, pair: &Pair) -> (Mounted, TlsConfig) {
        let mounted = Mounted(dir.to_path_buf());
        mounted.swap(0, &pair.cert, &pair.key);
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), dir.join(name)).unwrap();
        }
        let path = |name: &str| Some(dir.join(name));
        (mounted, TlsConfig { cert: path("tls.crt"), key: path("tls.key"), client_ca: None })
    }

    fn swap(&self, version: u32, cert: &str, key: &str) {
        let target = format!("..version{version}");
        let folder = self.0.join(&target);
        std::fs::create_dir(&folder).unwrap();
        file(&folder, "tls.crt", cert);
        file(&folder, "tls.key", key);
        let link = self.0.join("..data_tmp");
        symlink(&target, &link).unwrap();
        std::fs::rename(link, self.0.join("..data")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_needs_no_restart_and_a_run_goes_on_meanwhile() {
    let ca = Ca::new();
    let (first, second, third) = (ca.make(For::Server), ca.make(For::Server), ca.make(For::Server));
    let dir = tempfile::tempdir().unwrap();
    let (mounted, tls) = Mounted::new(dir.path(), &first);
    let server = start(dir.path(), tls, |_| {}).await;
    let address = server.address();
    assert_eq!(shown(address, &ca).await, first.der);
    let trust =
        TlsOptions { ca: Some(file(dir.path(), "ca.pem", &ca.pem())), ..Default::default() };
    let client = connect(address, trust.clone()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..2).await.unwrap();
    let epoch = session.id().to_string();
    mounted.swap(1, &second.cert, &second.key);
    until_shown(address, &ca, &second.der).await;
    // One that cannot be used changes nothing; the next good one does. That a broken one is looked at
    // and left is `tls::tests` of the server.
    mounted.swap(2, &third.cert, &second.key);
    train(&session, h, 2..3).await.unwrap();
    assert_eq!(shown(address, &ca).await, second.der);
    mounted.swap(3, &third.cert, &third.key);
    until_shown(address, &ca, &third.der).await;
    train(&session, h, 3..4).await.unwrap();
    assert_eq!(session.id().to_string(), epoch);
    let found = session.export().await.unwrap();

    let plain = TestServer::start().await;
    let client = Client::connect(&plain.endpoint()).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..4).await.unwrap();
    assert_same_adapter(&found, &session.export().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_do_not_fit_are_named_at_the_start() {
    let ca = Ca::new();
    let (a, b) = (ca.make(For::Server), ca.make(For::Server));
    let dir = tempfile::tempdir().unwrap();
    let (cert, _) = pair_files(dir.path(), "a", &a);
    let (_, key) = pair_files(dir.path(), "b", &b);
    let refusal = |cert: Option<PathBuf>, key: Option<PathBuf>| {
        let mut config = server_config(&dir.path().join("store"));
        config.tls = TlsConfig { cert, key, client_ca: None };
        async move {
            match Server::start(config).await {
                Ok(_) => panic!("it starts"),
                Err(error @ (Error::Tls(_) | Error::Config(_))) => error.to_string(),
                Err(other) => panic!("{other}"),
            }
        }
    };
    let text = refusal(Some(cert.clone()), Some(key.clone())).await;
    assert!(text.contains("does not belong to the first certificate"), "{text}");
    let text = refusal(Some(dir.path().join("none")), Some(key.clone())).await;
    assert!(text.contains("none") && text.contains("tls.cert"), "{text}");
    let text = refusal(Some(cert), None).await;
    assert!(text.contains("tls.key") && text.contains("the key of tls.cert"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_and_mistaken_peers_hold_nobody_up() {
    let ca = Ca::new();
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = pair_files(dir.path(), "server", &ca.make(For::Server));
    let tls = TlsConfig { cert: Some(cert), key: Some(key), client_ca: None };
    let server = start(dir.path(), tls, |config| config.limits.max_connections = 50).await;
    let trust =
        TlsOptions { ca: Some(file(dir.path(), "ca.pem", &ca.pem())), ..Default::default() };
    let client = connect(server.address(), trust.clone()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    train(&session, h, 0..1).await.unwrap();
    // More than may be there: nobody of them says anything.
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(TcpStream::connect(server.address()).await.unwrap());
    }
    if let Ok(mut plain) = raw::Rpc::connect(format!("http://{}", server.address())).await {
        plain.describe(DescribeRequest {}).await.unwrap_err();
    }
    train(&session, h, 1..2).await.unwrap();
    let another = connect(server.address(), trust).await.unwrap();
    another.describe().await.unwrap();
    drop(silent);
}
