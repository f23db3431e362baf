//! How any command that speaks to a server reaches it, and who it says it is.

use anyhow::Context;
use clap::Args;
use offshoot_client::{ClientOptions, Retry, TlsOptions, Token};
use std::path::PathBuf;
use std::time::Duration;

/// Has the token itself. No option: others on this machine see the options of a program.
const TOKEN: &str = "OFFSHOOT_TOKEN";

#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Connection")]
pub struct ConnectionArgs {
    /// File with the token that the server's operator gave you; read again when the server no longer
    /// takes it [default: what the environment has as OFFSHOOT_TOKEN].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send the token without TLS to another machine too, as where a tunnel protects the way.
    #[arg(long)]
    allow_insecure_token: bool,
    /// PEM file of the CA that signed the server's certificate [default: those that the system
    /// trusts]. Each --tls option turns TLS on, as does an address that begins with https://.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file with this client's certificate, for a server that asks for one.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the key of --tls-cert.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the address's.
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
    /// How long to keep trying while the server is away or too full, such as 90s, 10m or 2h
    /// [default: 10m in training, 60s in other commands; 3s for the first connection, where a wrong
    /// address is likelier].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    max_offline: Option<Duration>,
}

impl ConnectionArgs {
    /// Reads the token. What is not said is as in `usual`.
    pub fn options(&self, usual: ClientOptions) -> anyhow::Result<ClientOptions> {
        Ok(ClientOptions { token: self.token()?, ..self.without_token(usual) })
    }

    /// The same without a token, for what needs none.
    pub fn without_token(&self, usual: ClientOptions) -> ClientOptions {
        let max_elapsed = self.max_offline.unwrap_or(usual.retry.max_elapsed);
        let connect_patience = self.max_offline.unwrap_or(usual.connect_patience);
        ClientOptions {
            allow_insecure_token: self.allow_insecure_token,
            tls: self.tls(),
            connect_patience,
            retry: Retry { max_elapsed, ..usual.retry },
            ..usual
        }
    }

    /// Whether TLS is asked for beside the address.
    pub fn has_tls(&self) -> bool {
        self.tls().is_given()
    }

    fn tls(&self) -> TlsOptions {
        TlsOptions {
            ca: self.tls_ca.clone(),
            cert: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            name: self.tls_name.clone(),
        }
    }

    fn token(&self) -> anyhow::Result<Option<Token>> {
        if let Some(path) = &self.token_file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("--token-file {}", path.display()))?;
            return Ok(Some(Token::new(&text)?.of_file(path.clone())));
        }
        match std::env::var(TOKEN) {
            Ok(text) if !text.is_empty() => Ok(Some(Token::new(&text)?)),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        connection: ConnectionArgs,
    }

    fn parse(line: &str) -> Result<ConnectionArgs, String> {
        let words = format!("x {line}");
        Line::try_parse_from(words.split_whitespace())
            .map(|line| line.connection)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_has_the_token_and_the_options_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "ofs_1_abc\n").unwrap();
        let line = format!(
            "--token-file {} --tls-ca ca.pem --tls-cert c.pem --tls-key k.pem --tls-name trunk --max-offline 2h",
            file.display()
        );
        let options = parse(&line).unwrap().options(ClientOptions::default()).unwrap();
        assert_eq!(options.token, Some(Token::new("ofs_1_abc").unwrap().of_file(file.clone())));
        let path = |name: &str| Some(PathBuf::from(name));
        let name = Some("trunk".into());
        let tls = TlsOptions { ca: path("ca.pem"), cert: path("c.pem"), key: path("k.pem"), name };
        assert_eq!(options.tls, tls);
        assert_eq!(options.retry.max_elapsed, Duration::from_secs(7200));

        std::fs::write(&file, "two words").unwrap();
        let error = parse(&line).unwrap().options(ClientOptions::default()).unwrap_err();
        assert!(!error.to_string().contains("two words"), "{error}");
        let missing = parse("--token-file /nowhere").unwrap();
        let error = format!("{:#}", missing.options(ClientOptions::default()).unwrap_err());
        assert!(error.starts_with("--token-file /nowhere: No such file"), "{error}");
    }

    #[test]
    fn half_an_identity_and_odd_durations_are_refused() {
        assert!(parse("--tls-cert c.pem").unwrap_err().contains("--tls-key"));
        assert!(parse("--tls-key k.pem").unwrap_err().contains("--tls-cert"));
        for (text, seconds) in [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0s", 0)] {
            let found = parse(&format!("--max-offline {text}")).unwrap().max_offline;
            assert_eq!(found, Some(Duration::from_secs(seconds)), "{text}");
        }
        assert!(parse("--max-offline soon").unwrap_err().contains("--max-offline"));
    }
}
