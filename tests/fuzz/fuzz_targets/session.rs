//! The order of a session's frames under any actions and faults, beside a model of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| offshoot_server::fuzzing::session(bytes));
