//! HTTP/1.1 without a library: requests as a careless or hostile client might send them, too.

use std::collections::HashMap;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// An answer, read to its connection's end.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Asks once, by a connection of its own; `headers` as `name: value` lines.
pub async fn ask(address: SocketAddr, method: &str, path: &str, headers: &[&str]) -> Reply {
    let stream = TcpStream::connect(address).await.expect("the server listens");
    ask_by(stream, address, method, path, headers).await
}

/// The same by a connection that there is.
pub async fn ask_by(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    host: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
) -> Reply {
    let named = headers.iter().any(|line| line.to_ascii_lowercase().starts_with("host:"));
    let host = if named { String::new() } else { format!("host: {host}\r\n") };
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let request = format!("{method} {path} HTTP/1.1\r\n{host}connection: close\r\n{lines}\r\n");
    stream.write_all(request.as_bytes()).await.expect("the server reads");
    let mut answer = Vec::new();
    // An end without TLS's farewell, or a reset behind the answer, changes nothing of it.
    let _ = stream.read_to_end(&mut answer).await;
    parse(&answer)
}

/// What came over a connection until it ended.
pub fn parse(answer: &[u8]) -> Reply {
    let shown = || String::from_utf8_lossy(answer).into_owned();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer, only {:?}", shown()));
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status in {:?}", shown()));
    let pairs = lines.filter_map(|line| line.split_once(": "));
    let headers = pairs.map(|(name, value)| (name.to_lowercase(), value.into())).collect();
    Reply { status, headers, body: answer[end + 4..].to_vec() }
}
