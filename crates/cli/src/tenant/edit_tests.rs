use super::*;
use offshoot_server::access::parse_tenants;
use std::time::Duration;

const FILE: &str = r#"# Who trains here.
[[tenants]]
name = "blue"   # the support team
[[tenants.tokens]]
# Of their laptop.
id = "laptop"
sha256 = "00000000000000000000000000000000000000000000000000000000000000aa"
[[tenants.tokens]]
id = "ended"
sha256 = "00000000000000000000000000000000000000000000000000000000000000ab"
expires = 2020-01-01T00:00:00Z
[[tenants.tokens]]
id = "soon"
sha256 = "00000000000000000000000000000000000000000000000000000000000000ac"
expires = 2120-01-01T00:00:00+02:00
[tenants.quotas]
sessions = 3    # they have two machines

[[tenants]]
name = "red"
tokens = [
  { id = "r1", sha256 = "00000000000000000000000000000000000000000000000000000000000000ad" },
]
"#;

fn changed(change: impl FnOnce(&mut Tenants)) -> String {
    let mut tenants = Tenants::parse(FILE).unwrap();
    change(&mut tenants);
    tenants.into_text().unwrap()
}

fn ids(text: &str, name: &str) -> Vec<String> {
    let tenants = parse_tenants(text).unwrap();
    let tenant = tenants.iter().find(|tenant| tenant.name == name).unwrap();
    tenant.tokens().map(|(id, _)| id.to_string()).collect()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn no_numbers() -> Numbers {
    let quotas = ["sessions", "b", "c", "d", "e", "f", "rank"].map(|key| (key, None));
    Numbers { weight: None, is_operator: false, quotas }
}

#[test]
fn a_tenant_is_added_and_everything_else_stays() {
    let token = NewToken::generate();
    let mut numbers = Numbers { weight: Some(2), is_operator: true, ..no_numbers() };
    numbers.quotas[6].1 = Some(16);
    let text = changed(|tenants| {
        tenants.add("green", &numbers, Token::new(&token, Some(at(4_102_444_800)))).unwrap();
        let again = tenants.add("green", &no_numbers(), Token::new(&NewToken::generate(), None));
        assert!(again.unwrap_err().to_string().contains("is there already"));
    });
    assert!(text.starts_with(FILE), "{text}");
    let added = &text[FILE.len()..];
    let expected = format!(
        "\n[[tenants]]\nname = \"green\"\nweight = 2\noperator = true\n\n[[tenants.tokens]]\nid = {:?}\nsha256 = \"{}\"\n\
         expires = 2100-01-01T00:00:00Z\n\n[tenants.quotas]\nrank = 16\n",
        token.id,
        token.hash()
    );
    assert_eq!(added, expected);
    assert!(!text.contains(token.text()));
    // Into a file that is not there yet.
    let mut tenants = Tenants::parse("").unwrap();
    tenants.add("one", &no_numbers(), Token::new(&token, None)).unwrap();
    assert_eq!(ids(&tenants.into_text().unwrap(), "one"), [token.id]);
}

#[test]
fn rotating_ends_the_old_tokens_later_and_those_that_have_ended_go() {
    let (token, end) = (NewToken::generate(), at(4_000_000_000));
    let text = changed(|tenants| tenants.rotate("blue", Token::new(&token, None), end).unwrap());
    assert_eq!(ids(&text, "blue"), ["laptop", "soon", &token.id]);
    let blue = &parse_tenants(&text).unwrap()[0];
    let ends: Vec<_> = blue.tokens().map(|(_, end)| end).collect();
    assert_eq!(ends, [Some(end), Some(end), None]);
    for comment in ["# Who trains here.", "# the support team", "# Of their laptop.", "# they have"]
    {
        assert!(text.contains(comment), "{comment} is gone:\n{text}");
    }
    // One that ends before is left alone.
    let later = at(5_000_000_000);
    let text = changed(|tenants| tenants.rotate("blue", Token::new(&token, None), later).unwrap());
    let ends: Vec<_> = parse_tenants(&text).unwrap()[0].tokens().map(|(_, end)| end).collect();
    assert_eq!(ends, [Some(later), Some(at(4_733_503_200)), None]);
    // And in one line.
    let text = changed(|tenants| tenants.rotate("red", Token::new(&token, None), end).unwrap());
    assert_eq!(ids(&text, "red"), ["r1", &token.id]);
    let mut tenants = Tenants::parse(FILE).unwrap();
    let error = tenants.rotate("grey", Token::new(&token, None), end).unwrap_err().to_string();
    assert!(error.contains("no tenant \"grey\"; there is blue, red"), "{error}");
}

#[test]
fn one_token_or_all_are_revoked_and_a_tenant_removed() {
    let text = changed(|tenants| {
        assert_eq!(tenants.revoke("blue", Some("soon")).unwrap(), ["soon"]);
        let error = tenants.revoke("blue", Some("soon")).unwrap_err().to_string();
        assert!(error.contains("it has laptop, ended"), "{error}");
        assert_eq!(tenants.revoke("red", None).unwrap(), ["r1"]);
        assert!(tenants.revoke("red", None).unwrap_err().to_string().contains("has no token"));
    });
    assert_eq!((ids(&text, "blue").len(), ids(&text, "red").len()), (2, 0));
    let text = changed(|tenants| tenants.remove("blue").unwrap());
    assert!(!text.contains("blue") && !text.contains("laptop"), "{text}");
    assert_eq!(parse_tenants(&text).unwrap().len(), 1);
}

#[test]
fn the_file_in_the_documents_is_one() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/security.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut blocks = page.split("```toml\n").skip(1);
    let block = blocks.find(|block| block.starts_with("[[tenants]]")).unwrap();
    let block = block.split("```").next().unwrap();
    let tenants = parse_tenants(block).unwrap();
    let quotas = tenants[0].quotas;
    assert_eq!((tenants[0].name.as_str(), tenants[0].weight), ("blue", 2));
    assert!(quotas.sessions.is_some() && quotas.rank.is_some() && quotas.open_bytes.is_some());
    assert!(quotas.stored_sessions.is_some() && quotas.tokens_per_second.is_some());
    assert!(quotas.adapter_bytes.is_some() && quotas.tokens_per_microbatch.is_some());
}
