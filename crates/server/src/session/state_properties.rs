//! Random actions and faults against [`SessionState`](super::state::SessionState). The length of a
//! run can be chosen: `PROPTEST_CASES=100000 cargo test -p offshoot-server state_properties`.

use super::state_model;
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig {
        // A failing case prints its bytes: they become a test of their own.
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases(400))
    })]

    #[test]
    fn any_actions_and_faults_leave_the_session_as_the_model_says(
        actions in vec(any::<[u8; 2]>(), 0..200)
    ) {
        state_model::run(actions.as_flattened());
    }
}

/// As many as are asked for, or those that take a second.
pub(super) fn cases(usual: u32) -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    asked.unwrap_or(usual)
}
