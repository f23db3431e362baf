//! How it is said: a stream of frames without the SDK, and links that harm what goes over them.

use super::Rpc;
use super::messages::frame;
use anyhow::Context;
use offshoot_proto::v1::{self, client_frame::Body, server_frame};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;

/// A stream of frames without the SDK.
pub(super) struct Stream {
    pub next: u64,
    out: mpsc::Sender<v1::ClientFrame>,
    answers: tonic::Streaming<v1::ServerFrame>,
}

impl Stream {
    pub async fn attach(rpc: &mut Rpc, id: &str) -> anyhow::Result<Stream> {
        let (out, frames) = mpsc::channel(4);
        let hello = v1::Hello { session_id: id.into(), ..Default::default() };
        out.send(frame(0, Body::Hello(hello))).await?;
        let mut answers = rpc.train(ReceiverStream::new(frames)).await?.into_inner();
        match answers.message().await?.context("an answer to Hello")?.body {
            Some(server_frame::Body::Attached(attached)) => {
                Ok(Stream { next: attached.last_applied + 1, out, answers })
            }
            other => anyhow::bail!("Hello was answered with {other:?}"),
        }
    }

    pub async fn send(&self, sequence: u64, body: Body) -> anyhow::Result<()> {
        Ok(self.out.send(frame(sequence, body)).await?)
    }

    pub async fn answer(&mut self) -> anyhow::Result<Option<server_frame::Body>> {
        Ok(self.answers.message().await?.and_then(|frame| frame.body))
    }
}

#[derive(Clone, Copy)]
pub(super) enum Link {
    /// Ends after so many bytes of the client.
    Cut { after: usize },
    /// Passes 512 bytes on ten times a second.
    Slow,
}

impl Link {
    pub async fn carry(self, client: TcpStream, server: TcpStream) -> std::io::Result<()> {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let up = async move {
            let mut buffer = [0; 512];
            let mut n_bytes = 0;
            loop {
                let read = from_client.read(&mut buffer).await?;
                n_bytes += read;
                let over = matches!(self, Link::Cut { after } if n_bytes >= after);
                if read == 0 || over {
                    return std::io::Result::Ok(());
                }
                if matches!(self, Link::Slow) {
                    sleep(Duration::from_millis(100)).await;
                }
                to_server.write_all(&buffer[..read]).await?;
            }
        };
        tokio::select! {
            ended = up => ended,
            ended = tokio::io::copy(&mut from_server, &mut to_client) => ended.map(drop),
        }
    }
}
