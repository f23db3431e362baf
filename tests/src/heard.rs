//! Any call of any service as bytes, and everything that a caller hears of it: for comparing answers
//! that must not differ.

use bytes::{Buf, BufMut};
use offshoot_proto::v1::{self, server_frame};
use prost::Message;
use std::collections::BTreeMap;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_types::StatusExt;

/// All that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub messages: Vec<Vec<u8>>,
    pub code: tonic::Code,
    pub text: String,
    pub details: Vec<u8>,
    /// Headers and trailers, but for the date.
    pub metadata: BTreeMap<String, String>,
}

impl Heard {
    /// The same, with this text wherever that one stood.
    pub fn with(mut self, found: &str, put: &str) -> Heard {
        self.text = self.text.replace(found, put);
        for bytes in self.messages.iter_mut().chain([&mut self.details]) {
            // Ids have one length, so that nothing else changes.
            assert_eq!(found.len(), put.len());
            while let Some(at) = find(bytes, found.as_bytes()) {
                bytes[at..at + put.len()].copy_from_slice(put.as_bytes());
            }
        }
        for value in self.metadata.values_mut() {
            *value = value.replace(found, put);
        }
        self
    }
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// Calls `path`, such as "/package.Service/Method", with one encoded message, and waits for the end. The
/// ids of refusals, of which no two are the same, are struck out.
/// A stream is left open until the server ends it or has answered once.
pub async fn call(
    channel: &Channel,
    path: &str,
    message: Vec<u8>,
    headers: &[(&'static str, String)],
) -> Heard {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("the server is there");
    let mut request = Request::new(tokio_stream::iter([message]));
    for (key, value) in headers {
        request.metadata_mut().append(*key, value.parse().expect("it fits a header"));
    }
    let path = path.parse().expect("a path");
    let mut heard = Heard {
        messages: Vec::new(),
        code: tonic::Code::Ok,
        text: String::new(),
        details: Vec::new(),
        metadata: BTreeMap::new(),
    };
    match client.streaming(request, path, Raw).await {
        Ok(response) => {
            heard.note(response.metadata());
            let mut answers = response.into_inner();
            loop {
                match answers.message().await {
                    Ok(Some(message)) => heard.messages.push(message),
                    Ok(None) => break,
                    Err(status) => {
                        heard.end(&status);
                        break;
                    }
                }
            }
            if let Ok(Some(trailers)) = answers.trailers().await {
                heard.note(&trailers);
            }
        }
        Err(status) => heard.end(&status),
    }
    heard.forget_request();
    heard
}

/// In place of a refusal's id.
const STRUCK_OUT: &str = "########";

impl Heard {
    /// What differs from one refusal to the next and tells nothing.
    fn forget_request(&mut self) {
        let details = self.details.clone().into();
        let status = Status::with_details(self.code, self.text.clone(), details);
        if let Some(info) = status.get_details_request_info() {
            *self = self.clone().with(&info.request_id, STRUCK_OUT);
        }
        for message in &mut self.messages {
            // Answers of other calls are no such frames, or have no error where one has it.
            let Ok(mut frame) = v1::ServerFrame::decode(message.as_slice()) else { continue };
            if let Some(server_frame::Body::Error(error)) = &mut frame.body
                && error.request_id.len() == STRUCK_OUT.len()
            {
                error.request_id = STRUCK_OUT.into();
                *message = frame.encode_to_vec();
            }
        }
    }

    fn end(&mut self, status: &Status) {
        self.code = status.code();
        self.text = status.message().into();
        self.details = status.details().into();
        self.note(status.metadata());
    }

    fn note(&mut self, metadata: &tonic::metadata::MetadataMap) {
        for (key, value) in metadata.clone().into_headers() {
            let key = key.map_or_else(String::new, |key| key.to_string());
            if key != "date" {
                let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                self.metadata.insert(key, value);
            }
        }
    }
}

/// Messages as they are.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; from.remaining()];
        from.copy_to_slice(&mut message);
        Ok(Some(message))
    }
}
