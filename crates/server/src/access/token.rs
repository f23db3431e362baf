use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::Rng;
use sha2::{Digest, Sha256};
use std::fmt;

const PREFIX: &str = "ofs_";
/// URL-safe base64 of 32 bytes.
const SECRET_CHARS: usize = 43;
/// Of those that we make; any of up to [`MAX_ID_CHARS`] is read.
const NEW_ID_CHARS: usize = 8;
const MAX_ID_CHARS: usize = 16;

/// SHA-256 of a token's text. A token is 256 random bits, so nobody can try them all: a plain hash is
/// enough, and the slow ones that passwords need would only make every call slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash(pub(super) [u8; 32]);

/// A new token, `ofs_<id>_<secret>`. Its text is for its owner only: it has no `Debug`.
pub struct NewToken {
    /// Also in the text, so that a token in a leak can be found.
    pub id: String,
    text: String,
}

impl NewToken {
    /// From the system's randomness.
    pub fn generate() -> NewToken {
        let mut random = rand::rng();
        let letters = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let mut letter = || char::from(letters[random.random_range(0..letters.len())]);
        let id: String = (0..NEW_ID_CHARS).map(|_| letter()).collect();
        let secret: [u8; 32] = random.random();
        let text = format!("{PREFIX}{id}_{}", URL_SAFE_NO_PAD.encode(secret));
        NewToken { id, text }
    }

    /// What the client sends. Never to be logged.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the tenants file holds.
    pub fn hash(&self) -> TokenHash {
        TokenHash::of(&self.text)
    }
}

impl TokenHash {
    fn of(text: &str) -> TokenHash {
        TokenHash(Sha256::digest(text.as_bytes()).into())
    }

    /// Of what a client sent, if it has a token's form. What was not made by us may be a word that
    /// can be guessed.
    pub(super) fn of_sent(text: &str) -> Option<TokenHash> {
        id_of_sent(text).map(|_| TokenHash::of(text))
    }

    /// 64 hex digits.
    pub(super) fn parse(hex: &str) -> Option<TokenHash> {
        let mut hash = [0; 32];
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        for (i, byte) in hash.iter_mut().enumerate() {
            // `from_str_radix` would take a sign.
            let digits = hex[2 * i..2 * i + 2].bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok().filter(|_| digits)?;
        }
        Some(TokenHash(hash))
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The id in what a client sent, if that has a token's form.
pub(super) fn id_of_sent(text: &str) -> Option<&str> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let is_secret = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    let fine = is_token_id(id) && secret.len() == SECRET_CHARS && secret.bytes().all(is_secret);
    fine.then_some(id)
}

/// Letters and digits, few enough for a log.
pub(super) fn is_token_id(id: &str) -> bool {
    let is_fine = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    (1..=MAX_ID_CHARS).contains(&id.len()) && id.bytes().all(is_fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_token_is_known_by_its_hash_and_no_other_text_is() {
        let token = NewToken::generate();
        assert_eq!(TokenHash::of_sent(token.text()), Some(token.hash()));
        assert!(token.text().starts_with(&format!("ofs_{}_", token.id)));
        assert_eq!(TokenHash::parse(&token.hash().to_string()), Some(token.hash()));
        assert_ne!(NewToken::generate().hash(), token.hash());
        let text = token.text();
        for other in ["", "ofs_", "password", &text[1..], &text[..text.len() - 1]] {
            assert_eq!(TokenHash::of_sent(other), None, "{other:?}");
        }
        assert_eq!(TokenHash::of_sent(&format!("{text}x")), None);
        assert_eq!(TokenHash::of_sent(&text.replace("ofs_", "ofs_É")), None);
    }

    #[test]
    fn only_64_hex_digits_are_a_hash() {
        let hex = "0123456789abcdefABCDEF00000000000000000000000000000000000000ffff";
        assert!(TokenHash::parse(hex).is_some());
        for bad in [&hex[1..], &format!("+{}", &hex[1..]), &format!("{}é", &hex[2..]), ""] {
            assert_eq!(TokenHash::parse(bad), None, "{bad:?}");
        }
    }
}
