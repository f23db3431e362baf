//! What lies in a server's store: records, the tensors of snapshots, recorded answers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_server::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => fuzzing::record(bytes),
        1 => {
            let Some([state, answers]) = offshoot_fuzz::parts(bytes) else { return };
            fuzzing::snapshot(state.to_vec(), Some(answers.to_vec()));
        }
        _ => fuzzing::snapshot(bytes.to_vec(), None),
    }
});
