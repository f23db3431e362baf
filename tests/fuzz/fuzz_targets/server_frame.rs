//! Whatever a server sends: the client reads it or refuses it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_client::fuzzing;
use offshoot_proto::v1;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    if kind % 4 != 0 {
        if let Ok(frame) = v1::ServerFrame::decode(bytes) {
            fuzzing::server_frame(frame);
        }
        return;
    }
    fuzzing::answers(
        v1::DescribeResponse::decode(bytes).unwrap_or_default(),
        v1::SessionInfo::decode(bytes).unwrap_or_default(),
        v1::ExportAdapterResponse::decode(bytes).unwrap_or_default(),
    );
});
