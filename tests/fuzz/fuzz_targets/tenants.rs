//! A tenants file: it is taken, or every mistake in it is named.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_server::access::parse_tenants;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match parse_tenants(text) {
        Ok(tenants) => {
            let mut names: Vec<_> = tenants.iter().map(|tenant| &tenant.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), tenants.len(), "a name is one tenant's");
            assert!(tenants.iter().all(|tenant| tenant.weight > 0));
        }
        Err(mistakes) => assert!(!mistakes.is_empty()),
    }
});
