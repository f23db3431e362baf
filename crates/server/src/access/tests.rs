use super::*;
use http::HeaderValue;
use std::fmt::Write;

fn entry(tenant: &str, tokens: &[(&NewToken, &str)]) -> String {
    let mut text = format!("[[tenants]]\nname = {tenant:?}\n");
    for (token, more) in tokens {
        let (id, hash) = (&token.id, token.hash());
        write!(text, "[[tenants.tokens]]\nid = {id:?}\nsha256 = \"{hash}\"\n{more}\n").unwrap();
    }
    text
}

fn bearer(token: &str) -> HeaderMap {
    let value = HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
    HeaderMap::from_iter([("authorization".parse().unwrap(), value)])
}

fn start(path: Option<PathBuf>) -> Result<Arc<Access>, Error> {
    Access::start(path, Audit::default())
}

struct Files {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn files(text: &str) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tenants.toml");
    std::fs::write(&path, text).unwrap();
    Files { _dir: dir, path }
}

#[tokio::test]
async fn a_token_says_who_calls_and_everything_else_is_refused_alike() {
    let (blue, old, red) = (NewToken::generate(), NewToken::generate(), NewToken::generate());
    let text = entry("blue", &[(&blue, ""), (&old, "expires = 2020-01-01T00:00:00Z")])
        + &entry("red", &[(&red, "expires = 2120-01-01T00:00:00+01:00")]);
    let files = files(&text);
    let access = start(Some(files.path.clone())).unwrap();
    assert!(!access.is_open() && access.tenant("").is_none());
    for (token, tenant) in [(&blue, "blue"), (&red, "red")] {
        let caller = access.authenticate(&bearer(token.text()), None).unwrap();
        assert_eq!((caller.tenant.name.as_str(), &*caller.token_id), (tenant, token.id.as_str()));
    }
    let text = blue.text();
    let mut wrong = vec![
        HeaderMap::new(),
        bearer(old.text()),
        bearer(NewToken::generate().text()),
        bearer(""),
        bearer(&format!("{text} ")),
        bearer(&text[..text.len() - 1]),
        bearer(&blue.hash().to_string()),
    ];
    for value in [format!("Basic {text}"), text.to_string(), format!("Bearer  {text}")] {
        let value = HeaderValue::from_str(&value).unwrap();
        wrong.push(HeaderMap::from_iter([("authorization".parse().unwrap(), value)]));
    }
    let mut twice = bearer(text);
    twice.append("authorization", bearer(text)["authorization"].clone());
    wrong.push(twice);
    // The operator learns whose expired token somebody sends; what is made up stays a claim.
    let peer = Some("10.0.0.8:1".parse().unwrap());
    let stranger = access.stranger(&bearer(old.text()), peer);
    assert_eq!((stranger.tenant, stranger.token), (Some("blue".into()), Some(old.id.clone())));
    let made_up = NewToken::generate();
    let stranger = access.stranger(&bearer(made_up.text()), peer);
    assert_eq!((stranger.tenant, stranger.token), (None, Some(made_up.id.clone())));
    let stranger = access.stranger(&bearer("password"), peer);
    assert_eq!((stranger.tenant, stranger.token), (None, None));
    for headers in wrong {
        let refused = access.authenticate(&headers, None).unwrap_err();
        assert!(matches!(refused, Error::Unauthenticated), "{headers:?}");
    }
}

#[test]
fn a_change_is_told_by_names() {
    let (one, two) = (NewToken::generate(), NewToken::generate());
    let before =
        entry("blue", &[(&one, ""), (&two, "")]) + &entry("red", &[]) + &entry("grey", &[]);
    let after = entry("blue", &[(&one, "")]) + &entry("grey", &[]) + &entry("new", &[]);
    let [before, after] = [before, after].map(|text| State::parse(&text).unwrap());
    let expected = format!("blue changed, blue lost token {}, new added, red removed", two.id);
    assert_eq!(after.changes_since(&before), expected);
    assert_eq!(after.changes_since(&after), "");
}

#[tokio::test]
async fn an_open_server_knows_one_tenant_whatever_is_sent() {
    let access = start(None).unwrap();
    assert!(access.is_open() && access.reload().is_none());
    for headers in [HeaderMap::new(), bearer("anything")] {
        let caller = access.authenticate(&headers, None).unwrap();
        assert_eq!((caller.tenant.name.as_str(), &*caller.token_id), ("", ""));
    }
    assert!(access.tenant("").is_some() && access.tenant("blue").is_none());
}

#[tokio::test]
async fn a_file_that_changes_counts_and_a_broken_one_changes_nothing() {
    let (blue, red) = (NewToken::generate(), NewToken::generate());
    let files = files(&entry("blue", &[(&blue, "")]));
    let access = start(Some(files.path.clone())).unwrap();
    let is_in = |token: &NewToken| access.authenticate(&bearer(token.text()), None).is_ok();
    assert!(is_in(&blue) && !is_in(&red));

    std::fs::write(&files.path, "[[tenants]]\nname = 7\n").unwrap();
    let error = access.reload().unwrap().unwrap_err().to_string();
    assert!(error.contains("tenants.toml") && error.contains("line 2"), "{error}");
    assert!(access.reload().is_none(), "it is said once");
    assert!(is_in(&blue) && access.tenant("blue").is_some());
    std::fs::remove_file(&files.path).unwrap();
    assert!(access.reload().unwrap().is_err() && is_in(&blue));

    // As Kubernetes does it: another file behind the same name.
    let other = files.path.with_extension("new");
    std::fs::write(&other, entry("red", &[(&red, "")])).unwrap();
    std::os::unix::fs::symlink(&other, &files.path).unwrap();
    assert_eq!(access.reload().unwrap().unwrap(), 1);
    assert!(!is_in(&blue) && is_in(&red) && access.tenant("blue").is_none());
    // A token that was revoked is known still.
    let stranger = access.stranger(&bearer(blue.text()), None);
    assert_eq!((stranger.tenant, stranger.token), (Some("blue".into()), Some(blue.id)));
}

#[tokio::test]
async fn nobody_starts_with_a_broken_or_missing_file() {
    let files = files("[[tenants]]\nnam = \"a\"\n");
    let error = start(Some(files.path.clone())).err().unwrap().to_string();
    assert!(error.contains("nam") && error.contains("tenants.toml"), "{error}");
    let missing = files.path.with_extension("none");
    assert!(start(Some(missing)).is_err());
}

#[tokio::test]
async fn a_caller_ends_with_its_token() {
    let (gone, expiring) = (NewToken::generate(), NewToken::generate());
    let soon = OffsetSoon::after(Duration::from_millis(300));
    let files = files(&entry("blue", &[(&gone, ""), (&expiring, &soon.text)]));
    let access = start(Some(files.path.clone())).unwrap();
    let caller = |token: &NewToken| access.authenticate(&bearer(token.text()), None).unwrap();
    let (first, second) = (caller(&gone), caller(&expiring));
    access.ended(&second).await;
    assert!(SystemTime::now() >= soon.at);

    let ended = access.ended(&first);
    tokio::pin!(ended);
    assert!(
        std::future::poll_fn(|c| std::task::Poll::Ready(ended.as_mut().poll(c).is_pending())).await
    );
    std::fs::write(&files.path, entry("blue", &[])).unwrap();
    let reloaded = access.reload();
    // The loop may have been quicker.
    assert!(reloaded.is_none_or(|reloaded| reloaded.is_ok()));
    ended.await;
}

struct OffsetSoon {
    at: SystemTime,
    text: String,
}

impl OffsetSoon {
    fn after(wait: Duration) -> OffsetSoon {
        let at = time::OffsetDateTime::from(SystemTime::now() + wait);
        let text = at.format(&time::format_description::well_known::Rfc3339).unwrap();
        OffsetSoon { at: at.into(), text: format!("expires = {text}") }
    }
}
