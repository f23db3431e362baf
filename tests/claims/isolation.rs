//! Nobody gets in without a token, and a tenant finds nothing of another's: what is not his is not
//! there, in every call that there is.

use crate::tenants::{Shared, entry, token};
use offshoot_client::{Client, ClientError, Session, SessionState, Token};
use offshoot_proto::v1::{self, client_frame};
use offshoot_tests::heard::{Heard, call};
use offshoot_tests::raw::{self, RawStream, frame};
use offshoot_tests::run::{assert_same_adapter, open_request, train};
use offshoot_tests::together::{Player, round, server_for};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;

const SERVICE: &str = "offshoot.v1.TrunkService";
const OPERATIONS: &str = "offshoot.v1.OperationsService";
const FORGED: &str = "0b8c8d274a9c4f5e9d0e2f6f7f0f8a11";

/// What a call that names a session is made of, by its method; none: it names no session.
type Row = Option<fn(&str) -> Vec<u8>>;

/// It names a session.
fn row(message: fn(&str) -> Vec<u8>) -> Row {
    Some(message)
}

/// One row for each method. A method without one fails the test: whoever adds it says here how it
/// names a session.
fn table() -> BTreeMap<(&'static str, &'static str), Vec<Row>> {
    fn hello(id: &str) -> Vec<u8> {
        let hello = v1::Hello { session_id: id.into(), ..Default::default() };
        frame(0, client_frame::Body::Hello(hello)).encode_to_vec()
    }
    fn snapshot(id: &str) -> Vec<u8> {
        v1::SnapshotRequest { session_id: id.into(), ..Default::default() }.encode_to_vec()
    }
    fn restore(id: &str) -> Vec<u8> {
        v1::RestoreRequest { session_id: id.into(), snapshot_id: String::new() }.encode_to_vec()
    }
    fn restore_to(id: &str) -> Vec<u8> {
        let snapshot_id = "1-step0".into();
        v1::RestoreRequest { session_id: id.into(), snapshot_id }.encode_to_vec()
    }
    fn export(id: &str) -> Vec<u8> {
        let session_id = id.into();
        v1::ExportAdapterRequest { session_id, include_gradients: true }.encode_to_vec()
    }
    fn close(id: &str) -> Vec<u8> {
        v1::CloseSessionRequest { session_id: id.into(), forget: false }.encode_to_vec()
    }
    fn forget(id: &str) -> Vec<u8> {
        v1::CloseSessionRequest { session_id: id.into(), forget: true }.encode_to_vec()
    }
    let trunk: [(&str, Vec<Row>); 8] = [
        ("Describe", vec![None]),
        ("OpenSession", vec![None]),
        ("ListSessions", vec![None]),
        ("Train", vec![row(hello)]),
        ("Snapshot", vec![row(snapshot)]),
        ("Restore", vec![row(restore), row(restore_to)]),
        ("ExportAdapter", vec![row(export)]),
        ("CloseSession", vec![row(close), row(forget)]),
    ];
    let operations = operations_table().map(|(method, rows)| ((OPERATIONS, method), rows));
    trunk.into_iter().map(|(method, rows)| ((SERVICE, method), rows)).chain(operations).collect()
}

fn operations_table() -> [(&'static str, Vec<Row>); 7] {
    fn list(id: &str) -> Vec<u8> {
        v1::ListSnapshotsRequest { session_id: id.into() }.encode_to_vec()
    }
    fn evict(id: &str) -> Vec<u8> {
        v1::EvictSessionRequest { session_id: id.into() }.encode_to_vec()
    }
    fn pin(id: &str) -> Vec<u8> {
        v1::PinSessionRequest { session_id: id.into(), pinned: true }.encode_to_vec()
    }
    fn unpin(id: &str) -> Vec<u8> {
        v1::PinSessionRequest { session_id: id.into(), pinned: false }.encode_to_vec()
    }
    fn delete(id: &str) -> Vec<u8> {
        v1::DeleteSessionRequest { session_id: id.into() }.encode_to_vec()
    }
    fn delete_snapshot(id: &str) -> Vec<u8> {
        let snapshot_id = "1-step0".into();
        v1::DeleteSnapshotRequest { session_id: id.into(), snapshot_id }.encode_to_vec()
    }
    [
        ("Overview", vec![None]),
        ("ListTenants", vec![None]),
        ("ListSnapshots", vec![row(list)]),
        ("EvictSession", vec![row(evict)]),
        ("PinSession", vec![row(pin), row(unpin)]),
        ("DeleteSession", vec![row(delete)]),
        ("DeleteSnapshot", vec![row(delete_snapshot)]),
    ]
}

/// The methods as the server's own description names them.
fn methods() -> BTreeSet<(String, String)> {
    let set = prost_types::FileDescriptorSet::decode(offshoot_proto::FILE_DESCRIPTOR_SET).unwrap();
    let services = set.file.iter().flat_map(|file| {
        let named = |service| (format!("{}.{}", file.package(), name_of(service)), service);
        file.service.iter().map(named)
    });
    let methods = |(name, service): (String, &prost_types::ServiceDescriptorProto)| {
        let names = service.method.iter().map(|method| method.name().to_string());
        names.map(|method| (name.clone(), method)).collect::<Vec<_>>()
    };
    services.flat_map(methods).collect()
}

fn name_of(service: &prost_types::ServiceDescriptorProto) -> &str {
    service.name()
}

/// Blue has a valid token, an expired and a revoked one; red has a valid one.
async fn blue_and_red() -> Shared {
    let expired = ("old", "expires = 2020-01-01T00:00:00Z");
    let rest = entry("red", &[("red", "")]);
    let with_gone = entry("blue", &[("blue", ""), expired, ("gone", "")]) + &rest;
    let shared = Shared::start_with_text(&with_gone, |_| {}).await;
    shared.write(&(entry("blue", &[("blue", ""), expired]) + &rest));
    shared.server.reload();
    shared
}

async fn channel(shared: &Shared) -> Channel {
    let address = format!("http://{}", shared.server.endpoint());
    Channel::from_shared(address).unwrap().connect().await.unwrap()
}

/// Everything but a valid token.
fn wrong_headers() -> Vec<(&'static str, Vec<(&'static str, String)>)> {
    let bearer = |text: &str| vec![("authorization", format!("Bearer {text}"))];
    let valid = token("blue");
    vec![
        ("no token", vec![]),
        ("unknown token", bearer(&token("nobody"))),
        ("expired token", bearer(&token("old"))),
        ("revoked token", bearer(&token("gone"))),
        ("empty token", bearer("")),
        ("half a token", bearer(&valid[..20])),
        ("too much of a token", bearer(&format!("{valid}A"))),
        ("something else", bearer(&"x".repeat(5000))),
        ("wrong scheme", vec![("authorization", format!("Basic {valid}"))]),
        ("no scheme", vec![("authorization", valid.clone())]),
        ("two tokens", [bearer(&valid), bearer(&valid)].concat()),
        ("wrong header", vec![("x-authorization", format!("Bearer {valid}"))]),
    ]
}

fn red_headers() -> Vec<(&'static str, String)> {
    vec![("authorization", format!("Bearer {}", token("red")))]
}

async fn open(client: &Client) -> Session {
    client.open(open_request(client).await.unwrap()).await.unwrap()
}

/// The sessions of a client, by id.
async fn states(client: &Client) -> BTreeMap<String, (SessionState, u64)> {
    let sessions = client.list_sessions().await.unwrap();
    sessions.into_iter().map(|s| (s.id.to_string(), (s.state, s.last_applied))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_refuses_what_is_not_the_callers_as_what_does_not_exist() {
    let shared = blue_and_red().await;
    let blue = shared.client("blue").await.unwrap();
    let h = blue.describe().await.unwrap().hidden_size;
    let (live, parked) = (open(&blue).await, open(&blue).await);
    train(&live, h, 0..1).await.unwrap();
    let (live_id, parked_id) = (live.id().to_string(), parked.id().to_string());
    parked.close(false).await.unwrap();
    let before = states(&blue).await;
    assert_eq!(before[&parked_id].0, SessionState::Parked);

    let channel = channel(&shared).await;
    let (table, methods) = (table(), methods());
    let rows: BTreeSet<(String, String)> =
        table.keys().map(|(service, method)| (service.to_string(), method.to_string())).collect();
    assert_eq!(rows, methods, "each method has a row");
    let mut refusal: Option<Heard> = None;
    for ((service, method), rows) in &table {
        let path = format!("/{service}/{method}");
        for row in rows {
            let ids: Vec<&str> = match row {
                Some(_) => vec![&live_id, &parked_id, FORGED, "no id"],
                None => vec![""],
            };
            let message = |id: &str| row.map_or_else(Vec::new, |message| message(id));
            for &id in &ids {
                for (what, headers) in wrong_headers() {
                    let heard = call(&channel, &path, message(id), &headers).await;
                    assert_eq!(heard.code, Code::Unauthenticated, "{method}, {what}: {heard:?}");
                    let refusal = refusal.get_or_insert_with(|| heard.clone());
                    assert_eq!(*refusal, heard, "{method}, {what}");
                }
            }
            if row.is_none() {
                continue;
            }
            let forged = call(&channel, &path, message(FORGED), &red_headers()).await;
            for id in [&live_id, &parked_id] {
                let heard = call(&channel, &path, message(id), &red_headers()).await;
                assert_eq!(heard.with(id, FORGED), forged, "{method}");
            }
            check_not_found(method, &forged);
            let malformed = call(&channel, &path, message("no id"), &red_headers()).await;
            check_not_found(method, &malformed);
        }
    }
    let refusal = refusal.unwrap();
    println!("{}", refusal.text);
    assert!(refusal.text.contains("authorization: Bearer"));
    // All that it says besides is the refusal's own id.
    let details = String::from_utf8_lossy(&refusal.details);
    assert_eq!(details.matches("type.googleapis.com").count(), 1, "{details}");
    assert!(details.contains("google.rpc.RequestInfo"), "{details}");

    // Nobody has noticed: nothing was revived, taken over, closed or deleted.
    assert_eq!(states(&blue).await, before);
    train(&live, h, 1..2).await.unwrap();
    let red = shared.client("red").await.unwrap();
    assert_eq!(states(&red).await, BTreeMap::new());
    live.close(true).await.unwrap();
    shared.server.drain().await;
}

/// In a status, or in the answer to Hello.
fn check_not_found(method: &str, heard: &Heard) {
    if method != "Train" {
        assert_eq!(heard.code, Code::NotFound, "{heard:?}");
        assert!(heard.text.contains("is not known here"), "{heard:?}");
        return;
    }
    let answer = v1::ServerFrame::decode(&heard.messages[0][..]).unwrap();
    let Some(v1::server_frame::Body::Error(error)) = answer.body else { panic!("{answer:?}") };
    assert_eq!(error.code(), v1::ErrorCode::NotFound);
    assert!(error.message.contains("is not known here"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_wants_a_token_and_health_does_not() {
    let shared = blue_and_red().await;
    let channel = channel(&shared).await;
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let heard = call(&channel, &path, vec![], &[]).await;
        assert_eq!(heard.code, Code::Unauthenticated, "{heard:?}");
        let heard = call(&channel, &path, vec![], &red_headers()).await;
        assert_ne!(heard.code, Code::Unauthenticated, "{heard:?}");
    }
    let heard = call(&channel, "/grpc.health.v1.Health/Check", vec![], &[]).await;
    assert_eq!((heard.code, heard.messages.len()), (Code::Ok, 1), "{heard:?}");
    // A method that is not there tells strangers nothing either.
    let path = format!("/{SERVICE}/Nothing");
    assert_eq!(call(&channel, &path, vec![], &[]).await.code, Code::Unauthenticated);
    assert_eq!(call(&channel, &path, vec![], &red_headers()).await.code, Code::Unimplemented);
    shared.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_with_the_same_names_keep_to_themselves() {
    let shared = blue_and_red().await;
    let (blue, red) = (shared.client("blue").await.unwrap(), shared.client("red").await.unwrap());
    let h = blue.describe().await.unwrap().hidden_size;
    // The same name, seed and settings.
    let (of_blue, of_red) = (open(&blue).await, open(&red).await);
    train(&of_blue, h, 0..2).await.unwrap();
    let taken = of_blue.snapshot().await.unwrap();
    let untouched = of_red.export().await.unwrap();
    train(&of_blue, h, 2..3).await.unwrap();
    assert_same_adapter(&of_red.export().await.unwrap(), &untouched);

    for (client, session) in [(&blue, &of_blue), (&red, &of_red)] {
        let listed = client.list_sessions().await.unwrap();
        let listed: Vec<_> = listed.iter().map(|s| (s.id.clone(), s.name.clone())).collect();
        assert_eq!(listed, [(session.id().clone(), "claim".to_string())]);
    }
    // A snapshot of another's is no snapshot of one's own.
    let error = red.restore(of_red.id(), Some(&taken.snapshot_id)).await.err().unwrap().to_string();
    assert!(error.contains("has no snapshot"), "{error}");
    assert!(red.restore(of_blue.id(), Some(&taken.snapshot_id)).await.is_err());

    // What each is told of the server is of its own.
    train(&of_red, h, 0..1).await.unwrap();
    let (about_blue, about_red) = (blue.describe().await.unwrap(), red.describe().await.unwrap());
    let (memory, other) = (about_blue.memory, about_red.memory);
    assert_eq!((memory.live_sessions, other.live_sessions), (1, 1));
    assert_eq!(
        (memory.adapter_bytes, other.adapter_bytes),
        (other.adapter_bytes, memory.adapter_bytes)
    );
    assert_eq!((memory.resident_bytes, memory.workspace_bytes, memory.waiting_for_room), (0, 0, 0));
    assert!(memory.peak.is_none_or(|peak| peak.total_bytes == 0), "{memory:?}");
    of_red.close(true).await.unwrap();
    let memory = blue.describe().await.unwrap().memory;
    assert_eq!((memory.live_sessions, red.describe().await.unwrap().memory.live_sessions), (1, 0));

    // And a session that was made when the server was open is nobody's, as is a blue one then.
    of_blue.close(false).await.unwrap();
    shared.server.drain().await;
}

/// Until the stream has ended: its last frame's code.
async fn ends(stream: RawStream) -> v1::ErrorCode {
    let end = tokio::time::timeout(Duration::from_secs(30), stream.end());
    let (frames, status) = end.await.expect("the stream ends");
    assert!(status.is_none_or(|status| status.code() == Code::Ok));
    match frames.last().and_then(|frame| frame.body.clone()) {
        Some(v1::server_frame::Body::Error(error)) => error.code(),
        other => panic!("a last word, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_ends_its_streams_and_another_one_goes_on() {
    let both = entry("blue", &[("blue", ""), ("next", "")]);
    let shared = Shared::start_with_text(&both, |_| {}).await;
    let blue = shared.client("blue").await.unwrap();
    let session = open(&blue).await;
    let id = session.id().to_string();
    drop(session);
    let mut rpc = raw::rpc(&shared.server.endpoint()).await;
    let stream = RawStream::attach_with(&mut rpc, &id, 0, &token("blue")).await.unwrap();
    // The file alone is enough: the server looks by itself.
    shared.write(&entry("blue", &[("next", "")]));
    assert_eq!(ends(stream).await, v1::ErrorCode::Unauthenticated);
    let refused = blue.list_sessions().await.unwrap_err();
    assert!(matches!(refused, ClientError::Unauthenticated { .. }), "{refused}");
    // The session is there as it was, for the tenant's other token.
    let stream = RawStream::attach_with(&mut rpc, &id, 0, &token("next")).await.unwrap();
    assert_eq!(stream.attached.last_applied, 0);

    // A token that expires does the same.
    let soon = std::time::SystemTime::now() + Duration::from_secs(2);
    let expires = format!("expires = {}", rfc3339(soon));
    shared.write(&entry("blue", &[("next", &expires), ("blue", "")]));
    assert_eq!(ends(stream).await, v1::ErrorCode::Unauthenticated);
    let stream = RawStream::attach_with(&mut rpc, &id, 0, &token("blue")).await.unwrap();

    // A broken file changes nothing.
    shared.write("[[tenants]]\nname = 3\n");
    shared.server.reload();
    assert!(blue.list_sessions().await.is_ok());

    // A tenant that is taken out: its streams end, and its sessions are parked.
    shared.write(&entry("red", &[("red", "")]));
    assert_eq!(ends(stream).await, v1::ErrorCode::Unauthenticated);
    shared.write(&(both + &entry("red", &[("red", "")])));
    shared.server.reload();
    let deadline = Instant::now() + Duration::from_secs(30);
    while states(&blue).await[&id].0 != SessionState::Parked {
        assert!(Instant::now() < deadline, "it is parked");
    }
    let red = shared.client("red").await.unwrap();
    assert!(red.list_sessions().await.unwrap().is_empty());
    shared.server.drain().await;
}

fn rfc3339(time: std::time::SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    time.format(&time::format_description::well_known::Rfc3339).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_an_open_server_are_nobodys_and_tenants_are_theirs_on_an_open_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let server =
        offshoot_tests::TestServer::start_with(offshoot_tests::server_config(&store)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let unowned = open(&client).await.id().to_string();
    server.drain().await;

    let text = entry("blue", &[("blue", "")]);
    let shared = Shared::start_with_text(&text, |config| config.store.dir = store.clone()).await;
    let blue = shared.client("blue").await.unwrap();
    assert!(blue.list_sessions().await.unwrap().is_empty());
    assert!(blue.restore(&unowned.as_str().into(), None).await.is_err());
    let own = open(&blue).await.id().to_string();
    shared.server.drain().await;

    // After a restart a session is still its tenant's, and not an open server's.
    let server =
        offshoot_tests::TestServer::start_with(offshoot_tests::server_config(&store)).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let listed: Vec<String> = states(&client).await.into_keys().collect();
    assert_eq!(listed, [unowned]);
    assert!(client.restore(&own.as_str().into(), None).await.is_err());
    server.drain().await;
    let shared = Shared::start_with_text(&text, |config| config.store.dir = store.clone()).await;
    let blue = shared.client("blue").await.unwrap();
    assert_eq!(states(&blue).await.into_keys().collect::<Vec<_>>(), [own]);
    // The client's own words for a token that is none.
    let wrong = shared.client("nobody").await;
    let error = match wrong {
        Err(error) => error,
        Ok(client) => client.describe().await.unwrap_err(),
    };
    assert!(matches!(error, ClientError::Unauthenticated { .. }), "{error}");
    assert!(!error.to_string().contains(&token("nobody")));
    assert!(!format!("{:?}", Token::new(&token("nobody")).unwrap()).contains("AAAA"));
    shared.server.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_hears_of_its_own_jobs_in_a_batch_only() {
    let text = entry("blue", &[("blue", "")]) + &entry("red", &[("red", "")]);
    let shared = Shared::start_with_text(&text, |config| {
        let (tenants, store) = (config.access.tenants.take(), config.store.dir.clone());
        *config = server_for(3, &store);
        config.access.tenants = tenants;
    })
    .await;
    let (blue, red) = (shared.client("blue").await.unwrap(), shared.client("red").await.unwrap());
    let h = blue.describe().await.unwrap().hidden_size;
    let mut players = Vec::new();
    for (seed, client) in [&blue, &blue, &red].into_iter().enumerate() {
        players.push(Player::new(open(client).await, h, seed as u64));
    }
    let mut players: Vec<&mut Player> = players.iter_mut().collect();
    // All three run in each batch: it waits for them.
    round(&mut players).await;
    for (player, own) in players.iter().zip([2, 2, 1]) {
        assert!(player.batch_jobs.iter().all(|&n| n == own), "{own}: {:?}", player.batch_jobs);
        assert_eq!(player.batch_jobs.len(), 3);
    }
    shared.server.drain().await;
}
