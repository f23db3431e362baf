//! Whatever a client sends: a frame of a stream, its first frame, or a request for a session. It is
//! refused in a few words, or what is taken keeps all that the engine counts on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_proto::v1;
use offshoot_server::fuzzing;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    if kind % 8 == 7 {
        if let Ok(request) = v1::OpenSessionRequest::decode(bytes) {
            fuzzing::opening(request);
        }
    } else if let Ok(frame) = v1::ClientFrame::decode(bytes) {
        fuzzing::client_frame(&frame, kind.into());
    }
});
