//! The tenants file: what it says, checked.

use super::tenant::{Quotas, Tenant, TokenEntry};
use super::token::{TokenHash, is_token_id};
use bytesize::ByteSize;
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use toml::Spanned;
use toml::value::Datetime;

const MAX_WEIGHT: i64 = 1000;
const MAX_NAME_CHARS: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    #[serde(default)]
    tenants: Vec<TenantText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantText {
    name: Spanned<String>,
    weight: Option<Spanned<i64>>,
    #[serde(default)]
    operator: bool,
    #[serde(default)]
    tokens: Vec<TokenText>,
    #[serde(default)]
    quotas: QuotasText,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenText {
    id: Spanned<String>,
    sha256: Spanned<String>,
    expires: Option<Spanned<Datetime>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct QuotasText {
    sessions: Option<Spanned<i64>>,
    stored_sessions: Option<Spanned<i64>>,
    adapter_bytes: Option<Spanned<ByteSize>>,
    open_bytes: Option<Spanned<ByteSize>>,
    tokens_per_second: Option<Spanned<i64>>,
    tokens_per_microbatch: Option<Spanned<i64>>,
    rank: Option<Spanned<i64>>,
}

/// Reads a tenants file's text. An error is all mistakes, each with its line.
pub fn parse_tenants(text: &str) -> Result<Vec<Tenant>, String> {
    let (file, mut mistakes) = read(text);
    let mut tenants = Vec::new();
    if let Some(file) = file {
        let mut check = Check { text, mistakes };
        tenants = file.tenants.into_iter().map(|tenant| check.tenant(tenant)).collect();
        check.once(&tenants);
        mistakes = check.mistakes;
    }
    if mistakes.is_empty() {
        return Ok(tenants.into_iter().map(|(tenant, _)| tenant).collect());
    }
    mistakes.sort_by_key(|(line, _)| *line);
    let lines = mistakes.iter().map(|(line, mistake)| format!("line {line}: {mistake}"));
    Err(lines.collect::<Vec<_>>().join("; "))
}

/// What a file says, and what in it is unknown or of another type, each with its line. The reader ends
/// at the first of these: the entry is blanked, and the rest read again. None where what is missing
/// then, or the way the file is written, says nothing of the rest.
fn read(text: &str) -> (Option<FileText>, Vec<(usize, String)>) {
    let (mut left, mut mistakes) = (text.to_string(), Vec::new());
    loop {
        let error = match toml::from_str(&left) {
            Ok(file) => return (Some(file), mistakes),
            Err(error) => error,
        };
        let at = error.span().map_or(0, |span| span.start);
        // One line, whatever the reader shows of the text.
        let mistake = error.message().trim().replace('\n', " ");
        // It may be what was blanked.
        let is_ours = mistake.starts_with("missing field") && !mistakes.is_empty();
        if !is_ours {
            mistakes.push((line_of(text, at), mistake));
        }
        match blanked(&left, at).filter(|_| !is_ours) {
            Some(rest) => left = rest,
            None => return (None, mistakes),
        }
    }
}

/// The text without the entry that stands alone in the line of `at`, every place in it as it was.
fn blanked(text: &str, at: usize) -> Option<String> {
    let begin = text.get(..at)?.rfind('\n').map_or(0, |newline| newline + 1);
    let end = text[at..].find('\n').map_or(text.len(), |newline| at + newline);
    let line = &text[begin..end];
    if line.trim_start().starts_with('[') || !line.contains('=') {
        return None;
    }
    let rest = format!("{}{}{}", &text[..begin], " ".repeat(end - begin), &text[end..]);
    rest.parse::<toml::Table>().is_ok().then_some(rest)
}

/// Whether a tenant can have this name: 1 to 64 of a to z, 0 to 9 and "-".
pub fn is_tenant_name(name: &str) -> bool {
    let is_fine = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=MAX_NAME_CHARS).contains(&name.len()) && name.bytes().all(is_fine)
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|&&byte| byte == b'\n').count() + 1
}

/// Where names, ids and hashes stand, for mistakes that take two.
struct Places {
    name: usize,
    tokens: Vec<usize>,
}

struct Check<'a> {
    text: &'a str,
    mistakes: Vec<(usize, String)>,
}

impl Check<'_> {
    fn line<T>(&self, at: &Spanned<T>) -> usize {
        line_of(self.text, at.span().start)
    }

    fn mistake(&mut self, line: usize, text: String) {
        self.mistakes.push((line, text));
    }

    fn tenant(&mut self, text: TenantText) -> (Tenant, Places) {
        let name = self.line(&text.name);
        if !is_tenant_name(text.name.get_ref()) {
            let expected = "expected 1 to 64 of a to z, 0 to 9 and \"-\"";
            self.mistake(name, format!("name is {:?}: {expected}", text.name.get_ref()));
        }
        let weight = text.weight.map(|weight| self.number("weight", weight, 1..=MAX_WEIGHT));
        let quotas = self.quotas(text.quotas);
        let tokens = text.tokens.into_iter().map(|token| self.token(token));
        let (tokens, lines) = tokens.collect::<Vec<_>>().into_iter().unzip();
        let places = Places { name, tokens: lines };
        let weight = weight.map_or(1, |weight| weight as u32);
        let (name, is_operator) = (text.name.into_inner(), text.operator);
        (Tenant { name, weight, is_operator, quotas, tokens }, places)
    }

    fn token(&mut self, text: TokenText) -> (TokenEntry, usize) {
        let line = self.line(&text.id);
        if !is_token_id(text.id.get_ref()) {
            let expected = "expected 1 to 16 of a to z and 0 to 9";
            self.mistake(line, format!("a token's id is {:?}: {expected}", text.id.get_ref()));
        }
        let hash = TokenHash::parse(text.sha256.get_ref()).unwrap_or_else(|| {
            // Not what was found: it may be the token itself.
            let expected = "expected 64 hex digits, the SHA-256 of the whole token; \
                            `offshoot tenant rotate` writes them";
            self.mistake(self.line(&text.sha256), format!("sha256 is no hash: {expected}"));
            TokenHash([0; 32])
        });
        let expires = text.expires.and_then(|expires| self.time(&expires));
        (TokenEntry { id: text.id.into_inner(), hash, expires }, line)
    }

    fn time(&mut self, expires: &Spanned<Datetime>) -> Option<SystemTime> {
        let found = expires.get_ref().to_string();
        match OffsetDateTime::parse(&found, &Rfc3339) {
            Ok(time) => Some(time.into()),
            Err(_) => {
                let expected = "expected a time with its zone, such as 2026-12-31T00:00:00Z";
                self.mistake(self.line(expires), format!("expires is {found}: {expected}"));
                None
            }
        }
    }

    fn quotas(&mut self, text: QuotasText) -> Quotas {
        const ANY: RangeInclusive<i64> = 0..=i64::MAX;
        const SOME: RangeInclusive<i64> = 1..=i64::MAX;
        let mut number = |key, value: Option<Spanned<i64>>, fine| {
            value.map(|value| self.number(key, value, fine))
        };
        let bytes = |size: Option<Spanned<ByteSize>>| size.map(|size| size.into_inner().as_u64());
        Quotas {
            // None of them: a tenant that may only fetch what it has.
            sessions: number("sessions", text.sessions, ANY),
            stored_sessions: number("stored_sessions", text.stored_sessions, ANY),
            adapter_bytes: bytes(text.adapter_bytes),
            open_bytes: bytes(text.open_bytes),
            tokens_per_second: number("tokens_per_second", text.tokens_per_second, SOME),
            tokens_per_microbatch: number(
                "tokens_per_microbatch",
                text.tokens_per_microbatch,
                SOME,
            ),
            rank: number("rank", text.rank, SOME),
        }
    }

    fn number(&mut self, key: &str, value: Spanned<i64>, fine: RangeInclusive<i64>) -> u64 {
        let (line, value) = (self.line(&value), value.into_inner());
        if !fine.contains(&value) {
            let expected = match (*fine.start(), *fine.end()) {
                (least, i64::MAX) => format!("at least {least}"),
                (least, most) => format!("{least} to {most}"),
            };
            self.mistake(line, format!("{key} is {value}: expected {expected}"));
        }
        value.max(0) as u64
    }

    /// Names, token ids and hashes are there once: a log names a tenant and a token by them.
    fn once(&mut self, tenants: &Vec<(Tenant, Places)>) {
        let (mut names, mut ids, mut hashes) = (HashSet::new(), HashSet::new(), HashSet::new());
        for (tenant, places) in tenants {
            if !names.insert(&tenant.name) {
                self.mistake(places.name, format!("tenant {:?} is there twice", tenant.name));
            }
            for (token, &line) in tenant.tokens.iter().zip(&places.tokens) {
                if !ids.insert(&token.id) {
                    self.mistake(line, format!("token id {:?} is there twice", token.id));
                }
                if token.hash.0 != [0; 32] && !hashes.insert(token.hash) {
                    let twice = "has the hash of another token; make a new one with";
                    let text = format!("token {:?} {twice} `offshoot tenant rotate`", token.id);
                    self.mistake(line, text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "00000000000000000000000000000000000000000000000000000000000000ff";

    #[test]
    fn a_file_says_who_may_what() {
        let text = format!(
            r#"
# Two teams.
[[tenants]]
name = "blue"
weight = 2
[[tenants.tokens]]
id = "t3f9"
sha256 = "{HASH}"
expires = 2026-12-31T00:00:00Z
[[tenants.tokens]]
id = "t4"
sha256 = "{}"
[tenants.quotas]
sessions = 8
adapter_bytes = "2GiB"
open_bytes = 1000

[[tenants]]
name = "red-2"
operator = true
"#,
            HASH.replace("ff", "FE")
        );
        let tenants = parse_tenants(&text).unwrap();
        let [blue, red] = &tenants[..] else { panic!("{tenants:?}") };
        assert_eq!((blue.name.as_str(), blue.weight, blue.tokens.len()), ("blue", 2, 2));
        let quotas = Quotas {
            sessions: Some(8),
            adapter_bytes: Some(2 << 30),
            open_bytes: Some(1000),
            ..Default::default()
        };
        assert_eq!(blue.quotas, quotas);
        let expires = blue.tokens[0].expires.unwrap();
        let seconds = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!((seconds, blue.tokens[1].expires), (1_798_675_200, None));
        assert_eq!((red.weight, red.quotas), (1, Quotas::default()));
        assert_eq!((blue.is_operator, red.is_operator), (false, true));
        assert_eq!(parse_tenants("").unwrap(), vec![]);
    }

    #[test]
    fn all_mistakes_come_at_once_with_their_lines() {
        let text = format!(
            r#"
[[tenants]]
name = "Blue"
weight = 0
[[tenants.tokens]]
id = "t-1"
sha256 = "ofs_secret"
expires = 2026-12-31
[tenants.quotas]
rank = 0
sessions = -1

[[tenants]]
name = "red"
tokens = [{{ id = "a", sha256 = "{HASH}" }}, {{ id = "a", sha256 = "{HASH}" }}]
[[tenants]]
name = "red"
weight = 1001
"#
        );
        let error = parse_tenants(&text).unwrap_err();
        let expected = [
            (3, "name is \"Blue\": expected 1 to 64 of a to z"),
            (4, "weight is 0: expected 1 to 1000"),
            (6, "a token's id is \"t-1\": expected 1 to 16"),
            (7, "sha256 is no hash: expected 64 hex digits"),
            (8, "expires is 2026-12-31: expected a time with its zone"),
            (10, "rank is 0: expected at least 1"),
            (11, "sessions is -1: expected at least 0"),
            (15, "token id \"a\" is there twice"),
            (15, "token \"a\" has the hash of another token"),
            (17, "tenant \"red\" is there twice"),
            (18, "weight is 1001: expected 1 to 1000"),
        ];
        let found: Vec<&str> = error.split("; line ").collect();
        for ((line, text), found) in expected.iter().zip(&found) {
            let found = found.trim_start_matches("line ");
            assert!(found.starts_with(&format!("{line}: {text}")), "{found}\nin {error}");
        }
        assert_eq!(found.len(), expected.len(), "{error}");
        assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn what_is_unknown_or_of_another_type_is_named_with_its_line() {
        for (text, line, names) in [
            ("[[tenants]]\nname = \"a\"\nwieght = 1", 3, "wieght"),
            ("[[tenants]]\nname = \"a\"\n[tenants.quotas]\nadapter_bytes = \"much\"", 4, "much"),
            ("[[tenants]]\nname = 1", 2, "string"),
            ("[[tenants]]\nname = \"a\"\noperator = \"yes\"", 3, "boolean"),
            ("[[tenants]]\nweight = 1", 1, "name"),
            ("[[tenants]", 1, "tenants"),
        ] {
            let error = parse_tenants(text).unwrap_err();
            assert!(error.starts_with(&format!("line {line}: ")), "{text}: {error}");
            assert!(!error.contains('\n') && error.contains(names) || line == 1, "{error}");
        }
        let text = format!(
            "[[tenants]]\nname = \"a\"\nwieght = -2\nweight = -2\n[[tenants.tokens]]\nid = \"t\"\n\
             sha256 = \"{HASH}\"\nexpires = \"soon\"\n[tenants.quotas]\nrank = 0\nsesions = 1"
        );
        let error = parse_tenants(&text).unwrap_err();
        let lines: Vec<_> = error.split("; ").filter_map(|one| one.split(':').next()).collect();
        assert_eq!(lines, ["line 3", "line 4", "line 8", "line 10", "line 11"], "{error}");
        // What is missing because it was blanked is not told, and nothing is told twice.
        let error = parse_tenants("[[tenants]]\nname = 1\nwieght = 2\n").unwrap_err();
        assert!(error.contains("line 2: ") && !error.contains("missing"), "{error}");
        let error = parse_tenants("[[tenants]]\nname = \"a\"\ntokens = [\n  { di = 1 },\n]\n");
        assert!(error.unwrap_err().starts_with("line 4: "));
    }
}
