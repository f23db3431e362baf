use super::*;

const TENANTS: &str = r#"
[[tenants]]
name = "blue"
weight = 3
[tenants.quotas]
sessions = 2
stored_sessions = 3
open_bytes = 1000
rank = 8
tokens_per_microbatch = 64
tokens_per_second = 100
[[tenants]]
name = "red"
"#;

/// Accounts under this file, and the file.
fn accounts(dir: &std::path::Path) -> (Accounts, Arc<Access>) {
    let path = dir.join("tenants.toml");
    std::fs::write(&path, TENANTS).unwrap();
    let access = Access::start(Some(path), Default::default()).unwrap();
    let accounts = Accounts::default();
    accounts.follow(access.clone());
    (accounts, access)
}

#[tokio::test]
async fn what_is_taken_is_counted_for_one_tenant_and_given_back_by_drop() {
    let dir = tempfile::tempdir().unwrap();
    let (accounts, _access) = accounts(dir.path());
    let (blue, red) = (accounts.of("blue"), accounts.of("red"));
    let held: Vec<Held> = (0..2).map(|_| blue.take(Amount::Sessions, 1).unwrap()).collect();
    let excess = blue.take(Amount::Sessions, 1).unwrap_err();
    assert_eq!((excess.quota, excess.limit, excess.value), (Quota::Sessions, 2, 3));
    assert_eq!(excess.retry_after, Some(SESSION_RETRY));
    let text = excess.to_string();
    assert!(
        text.contains("quota sessions of tenant \"blue\" is 2, this would make it 3"),
        "{text}"
    );
    let _others: Vec<Held> = (0..9).map(|_| red.take(Amount::Sessions, 1).unwrap()).collect();
    let freed = blue.freed();
    drop(held);
    freed.await;
    drop(blue.take(Amount::Sessions, 1).unwrap());
    // The same account, whoever asks for it.
    assert!(Arc::ptr_eq(&blue, &accounts.of("blue")));
    assert_ne!(blue.owner(), red.owner());
    assert_eq!((blue.weight(), red.weight()), (3, 1));
}

#[tokio::test]
async fn bytes_grow_and_shrink_and_what_never_fits_has_no_retry() {
    let dir = tempfile::tempdir().unwrap();
    let (accounts, _access) = accounts(dir.path());
    let blue = accounts.of("blue");
    let held = blue.take(Amount::OpenBytes, 600).unwrap();
    assert_eq!(blue.left(Amount::OpenBytes), Some(400));
    assert_eq!(blue.take(Amount::OpenBytes, 401).unwrap_err().value, 1001);
    held.shrink_to(900);
    assert_eq!(held.n(), 600);
    held.shrink_to(100);
    assert!(blue.refusal(Amount::OpenBytes, 900).is_none());
    let passing = blue.refusal(Amount::OpenBytes, 950).unwrap();
    assert_eq!((passing.value, passing.retry_after), (1050, Some(OPEN_RETRY)));
    assert_eq!(blue.refusal(Amount::OpenBytes, 1001).unwrap().retry_after, None);
    drop(held);
    assert_eq!(blue.left(Amount::OpenBytes), Some(1000));
    assert_eq!(accounts.of("red").left(Amount::OpenBytes), None);
}

#[tokio::test]
async fn opens_under_way_count_beside_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (accounts, _access) = accounts(dir.path());
    let blue = accounts.of("blue");
    let first = blue.take_stored(1).unwrap();
    let _second = blue.take_stored(1).unwrap();
    let excess = blue.take_stored(1).unwrap_err();
    assert_eq!((excess.quota, excess.value), (Quota::StoredSessions, 4));
    drop(first);
    drop(blue.take_stored(1).unwrap());
}

#[tokio::test]
async fn what_a_request_asks_for_is_checked_and_an_open_server_asks_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (accounts, _access) = accounts(dir.path());
    let blue = accounts.of("blue");
    assert_eq!(blue.check_rank(9).unwrap_err().quota, Quota::Rank);
    assert!(blue.check_rank(8).is_ok() && blue.check_tokens(64).is_ok());
    assert_eq!(blue.check_tokens(65).unwrap_err().retry_after, None);
    let now = Instant::now();
    blue.take_tokens(400, now).unwrap();
    let early = blue.take_tokens(50, now).unwrap_err();
    assert_eq!((early.quota, early.limit), (Quota::TokensPerSecond, 100));
    assert!(early.value > 100 && early.retry_after >= Some(Duration::from_millis(500)));
    let open = Accounts::default().of("");
    assert_eq!(open.owner(), None);
    open.take_tokens(1 << 40, now).unwrap();
}
