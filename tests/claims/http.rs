//! The console's data, metrics and probes by HTTP: who gets what, and what nobody gets.

use crate::pki::{Ca, For, file, pair_files};
use crate::tenants::{Shared, entry, token};
use offshoot_client::Client;
use offshoot_server::{Fault, ServerConfig, TlsConfig};
use offshoot_tests::http::{Reply, ask, ask_by, parse};
use offshoot_tests::run::{input, open_request, train};
use offshoot_tests::{TestServer, server_config};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

const PATIENCE: Duration = Duration::from_secs(30);

fn with_http(config: &mut ServerConfig) {
    config.http.port = Some(0);
}

/// An open server.
async fn open_server() -> (TestServer, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = server_config(dir.path());
    with_http(&mut config);
    (TestServer::start_with(config).await, dir)
}

/// Two tenants and an operator.
async fn shared(change: impl FnOnce(&mut ServerConfig)) -> Shared {
    let operator =
        entry("ops", &[("ops", "")]).replace("name = \"ops\"", "name = \"ops\"\noperator = true");
    let text = entry("blue", &[("blue", "")]) + &entry("red", &[("red", "")]) + &operator;
    Shared::start_with_text(&text, |config| {
        with_http(config);
        change(config);
    })
    .await
}

fn bearer(tenant: &str) -> String {
    format!("authorization: Bearer {}", token(tenant))
}

async fn until(what: &str, mut fine: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !fine().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What stands behind whose token, in one table.
#[tokio::test(flavor = "multi_thread")]
async fn everybody_gets_what_is_theirs_and_strangers_the_page_only() {
    let shared = shared(|_| {}).await;
    let address = shared.server.http();
    let client = shared.client("blue").await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let id = session.id().as_str();
    let tokens =
        ["", &bearer("blue"), &bearer("red"), &bearer("ops"), "authorization: Bearer ofs_x_y"];
    let unknown = "0".repeat(32);
    // Method, path, and the status for: nobody, the owner, another tenant, an operator, a wrong token.
    let table = [
        ("GET", "/".into(), [200; 5]),
        ("GET", "/page/main.js".into(), [200; 5]),
        ("GET", "/page/../mod.rs".into(), [404; 5]),
        ("GET", "/page/none.js".into(), [404; 5]),
        ("GET", "/nothing".into(), [404; 5]),
        ("GET", "/healthz".into(), [200; 5]),
        ("GET", "/readyz".into(), [200; 5]),
        ("GET", "/metrics".into(), [401, 403, 403, 200, 401]),
        ("GET", "/api/overview".into(), [401, 200, 200, 200, 401]),
        ("GET", "/api/overview?since=7".into(), [401, 200, 200, 200, 401]),
        ("GET", "/api/overview?since=x".into(), [401, 400, 400, 400, 401]),
        ("GET", "/api/tenants".into(), [401, 200, 200, 200, 401]),
        ("GET", format!("/api/sessions/{id}/snapshots"), [401, 200, 404, 200, 401]),
        ("GET", format!("/api/sessions/{unknown}/snapshots"), [401, 404, 404, 404, 401]),
        ("POST", format!("/api/sessions/{id}/pin"), [401, 200, 404, 200, 401]),
        ("POST", format!("/api/sessions/{id}/unpin"), [401, 200, 404, 200, 401]),
        ("POST", format!("/api/sessions/{id}/evict"), [401, 200, 404, 200, 401]),
        ("GET", format!("/api/sessions/{id}/evict"), [401, 405, 405, 405, 401]),
        ("DELETE", format!("/api/sessions/{id}/snapshots/none"), [401, 404, 404, 404, 401]),
        ("DELETE", format!("/api/sessions/{unknown}"), [401, 404, 404, 404, 401]),
        ("DELETE", format!("/api/sessions/{id}"), [401, 200, 404, 404, 401]),
    ];
    for (method, path, expected) in &table {
        for (token, expected) in tokens.iter().zip(expected) {
            let headers: Vec<&str> = [*token].into_iter().filter(|line| !line.is_empty()).collect();
            let reply = ask(address, method, path, &headers).await;
            let who = token.chars().take(33).collect::<String>();
            assert_eq!(reply.status, *expected, "{method} {path} by \"{who}\": {}", reply.text());
            check_headers(&reply, path);
            if reply.status == 401 {
                assert_eq!(reply.headers["www-authenticate"], "Bearer");
                assert_eq!(reply.json()["label"], "unauthenticated");
                assert_eq!(reply.json()["request_id"].as_str().unwrap().len(), 8);
            }
        }
    }
    shared.server.drain().await;
}

/// What a browser is told with every answer, whatever it is.
fn check_headers(reply: &Reply, path: &str) {
    let policy = &reply.headers["content-security-policy"];
    for part in [
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "trusted-types 'none'",
    ] {
        assert!(policy.contains(part), "{path}: {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains("http"));
    assert_eq!(reply.headers["x-content-type-options"], "nosniff");
    assert_eq!(reply.headers["x-frame-options"], "DENY");
    let page = reply.status == 200 && (path == "/" || path.starts_with("/page/"));
    let expected = if page { "no-cache" } else { "no-store" };
    assert_eq!(reply.headers["cache-control"], expected, "{path}");
    let cors = reply.headers.keys().any(|name| name.starts_with("access-control"));
    assert!(!cors && !reply.headers.contains_key("set-cookie"), "{path}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_sees_its_own_sessions_and_an_operator_all() {
    let shared = shared(|_| {}).await;
    let address = shared.server.http();
    let mut ids = Vec::new();
    for tenant in ["blue", "red"] {
        let client = shared.client(tenant).await.unwrap();
        let h = client.describe().await.unwrap().hidden_size;
        let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
        train(&session, h, 0..2).await.unwrap();
        session.snapshot().await.unwrap();
        ids.push(session.id().to_string());
    }
    let overview = async |tenant| ask(address, "GET", "/api/overview", &[&bearer(tenant)]).await;
    for (tenant, own, other) in [("blue", &ids[0], &ids[1]), ("red", &ids[1], &ids[0])] {
        let reply = overview(tenant).await;
        let json = reply.json();
        let sessions = json["sessions"].as_array().unwrap();
        assert_eq!(sessions.len(), 1);
        assert_eq!(sessions[0]["info"]["session_id"], own.as_str());
        assert_eq!(sessions[0]["tenant"], tenant);
        assert_eq!(sessions[0]["info"]["step"], 2);
        assert_eq!(sessions[0]["durable_step"], 2);
        assert_eq!(json["is_operator"], false);
        assert!(!reply.text().contains(other.as_str()));
        // Nothing of the whole server's either.
        assert_eq!(json["server"]["queued_jobs"], 0);
    }
    let json = overview("ops").await.json();
    assert_eq!(json["is_operator"], true);
    assert_eq!(json["sessions"].as_array().unwrap().len(), 2);
    // The same as text that is compressed for who can read it.
    let reply =
        ask(address, "GET", "/api/overview", &[&bearer("ops"), "accept-encoding: gzip"]).await;
    assert_eq!(reply.headers["content-encoding"], "gzip");
    // An expired token of a page that is open ends there.
    shared.write(&entry("red", &[("red", "")]));
    shared.server.reload();
    assert_eq!(overview("blue").await.status, 401);
    shared.server.drain().await;
}

/// A browser adds no token by itself; without tokens it is the header and the name that count.
#[tokio::test(flavor = "multi_thread")]
async fn another_origins_page_can_neither_act_nor_read_on_an_open_server() {
    let (server, _dir) = open_server().await;
    let address = server.http();
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    let path = format!("/api/sessions/{}", session.id());
    // What a form or a fetch without CORS can send.
    for foreign in ["origin: http://other.example", "content-type: text/plain"] {
        let reply = ask(address, "DELETE", &path, &[foreign]).await;
        assert_eq!((reply.status, reply.json()["label"].as_str()), (403, Some("no_header")));
    }
    // The question whether it may send more is not answered.
    let asks = ["origin: http://other.example", "access-control-request-headers: x-offshoot"];
    let reply = ask(address, "OPTIONS", &path, &asks).await;
    assert!(reply.status >= 400 && !reply.headers.keys().any(|k| k.starts_with("access-control")));
    // A name that was pointed here after the other page was loaded.
    for path in ["/", "/api/overview", "/metrics"] {
        let reply = ask(address, "GET", path, &["host: other.example:9464"]).await;
        assert_eq!(reply.status, 421, "{path}");
        assert!(reply.json()["message"].as_str().unwrap().contains("127.0.0.1"));
    }
    for own in ["host: localhost:9464", "host: [::1]:9464"] {
        assert_eq!(ask(address, "GET", "/api/overview", &[own]).await.status, 200);
    }
    // Probes come by any name.
    assert_eq!(ask(address, "GET", "/readyz", &["host: pod.example"]).await.status, 200);
    assert_eq!(ask(address, "GET", "/metrics", &[]).await.status, 200);
    assert_eq!(ask(address, "DELETE", &path, &["x-offshoot: 1"]).await.status, 200);
    server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readyz_says_first_that_the_server_drains_and_healthz_that_it_lives() {
    let (server, _dir) = open_server().await;
    let address = server.http();
    let ready = ask(address, "GET", "/readyz", &[]).await;
    assert_eq!((ready.status, ready.json()["ready"].as_bool()), (200, Some(true)));
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    // An open microbatch, which the drain waits for.
    let forward = session.send_forward(input(1, &[5], h)).await.unwrap();
    let (output, microbatch, _) = forward.await.unwrap();
    let draining = tokio::spawn(server.drain());
    until("readyz tells of the drain", async || {
        let reply = ask(address, "GET", "/readyz", &[]).await;
        let json = reply.json();
        assert_eq!(reply.status == 503, json["ready"] == false);
        assert!(reply.status != 503 || json["reason"].as_str().unwrap().contains("saved"));
        reply.status == 503 && json["health"] == "draining"
    })
    .await;
    assert_eq!(ask(address, "GET", "/healthz", &[]).await.status, 200);
    assert_eq!(
        ask(address, "GET", "/api/overview", &[]).await.json()["server"]["health"],
        "draining"
    );
    assert!(!draining.is_finished());
    let _ = microbatch.send_backward(output).await.unwrap().await;
    draining.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "it still listens");
}

#[tokio::test(flavor = "multi_thread")]
async fn readyz_is_503_while_the_engine_starts_again() {
    let (server, _dir) = open_server().await;
    let address = server.http();
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let h = client.describe().await.unwrap().hidden_size;
    let session = client.open(open_request(&client).await.unwrap()).await.unwrap();
    // The first start again fails, too, and the next one waits for half a second.
    server.faults().plan(Fault::Load, 1);
    server.faults().plan(Fault::Engine, 1);
    // Its client waits and comes back; whatever comes of it.
    let training = tokio::spawn(async move { drop(train(&session, h, 0..1).await) });
    until("readyz tells of the engine", async || {
        let reply = ask(address, "GET", "/readyz", &[]).await;
        reply.status == 503 && reply.json()["health"] == "starting again"
    })
    .await;
    assert_eq!(ask(address, "GET", "/healthz", &[]).await.status, 200);
    until("it is ready again", async || ask(address, "GET", "/readyz", &[]).await.status == 200)
        .await;
    training.abort();
    server.drain().await;
}

/// Sends this, and reads what comes until the server ends the connection.
async fn send(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be refused while it is still sent.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(PATIENCE, read).await.expect("the server ends the connection");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_bounded_and_slow_ones_are_ended() {
    let (server, _dir) = open_server().await;
    let address = server.http();
    let long = "x".repeat(20 << 10);
    let reply = parse(
        &send(
            address,
            format!("GET / HTTP/1.1\r\nhost: {address}\r\na: {long}\r\n\r\n").as_bytes(),
        )
        .await,
    );
    assert_eq!(reply.status, 431);
    let many: String = (0..200).map(|i| format!("a{i}: b\r\n")).collect();
    let reply = parse(
        &send(address, format!("GET / HTTP/1.1\r\nhost: {address}\r\n{many}\r\n").as_bytes()).await,
    );
    assert_eq!(reply.status, 431);
    // gRPC's clients, and who speaks nothing at all.
    for nonsense in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00",
        b"\r\n\r\nhello\r\n\r\n",
    ] {
        let answer = send(address, nonsense).await;
        assert!(answer.is_empty() || parse(&answer).status >= 400);
    }
    // A body that nobody wants is not read; its connection ends with the answer.
    let begun = format!(
        "POST /api/sessions/a/evict HTTP/1.1\r\nhost: {address}\r\nx-offshoot: 1\r\ncontent-length: 1000000000\r\n\r\n"
    );
    assert_eq!(parse(&send(address, begun.as_bytes()).await).status, 404);
    // Headers that never end: the connection does, in time (some ten seconds).
    assert!(send(address, b"GET / HTTP/1.1\r\nhost: x\r\n").await.len() < 1000);
    // Nobody is kept out by all these.
    let idle: Vec<_> = futures(300, || TcpStream::connect(address)).await;
    assert_eq!(ask(address, "GET", "/healthz", &[]).await.status, 200);
    drop(idle);
    server.drain().await;
}

async fn futures<T, F: Future<Output = std::io::Result<T>>>(
    n: usize,
    make: impl Fn() -> F,
) -> Vec<T> {
    let mut made = Vec::new();
    for _ in 0..n {
        made.push(make().await.unwrap());
    }
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_the_servers_own_without_client_certificates() {
    let (ca, clients, dir) = (Ca::new(), Ca::new(), tempfile::tempdir().unwrap());
    let (cert, key) = pair_files(dir.path(), "server", &ca.make(For::Server));
    let client_ca = Some(file(dir.path(), "clients.pem", &clients.pem()));
    let mut config = server_config(&dir.path().join("store"));
    config.tls = TlsConfig { cert: Some(cert.clone()), key: Some(key), client_ca };
    with_http(&mut config);
    let server = TestServer::start_with(config).await;
    let address = server.http();
    let (reply, first) = ask_tls(address, &ca, "/readyz").await;
    assert_eq!(reply.status, 200);
    // Somebody who does not encrypt gets nothing.
    let answer =
        send(address, format!("GET / HTTP/1.1\r\nhost: {address}\r\n\r\n").as_bytes()).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    // Another certificate, without a restart.
    let fresh = ca.make(For::Server);
    pair_files(dir.path(), "server", &fresh);
    until("the new certificate is shown", async || {
        ask_tls(address, &ca, "/healthz").await.1 == fresh.der
    })
    .await;
    assert_ne!(first, fresh.der);
    server.drain().await;
}

/// The answer, and the certificate that was shown.
async fn ask_tls(address: SocketAddr, ca: &Ca, path: &str) -> (Reply, Vec<u8>) {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    (ask_by(stream, address, "GET", path, &[]).await, shown)
}
