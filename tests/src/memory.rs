//! What a server says of its memory: it counts on the engine's thread, after it has answered.

use offshoot_client::{Client, MemoryReport};
use std::time::Duration;
use tokio::time::Instant;

/// Longer than a server takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks until what the server says of its memory is as wanted.
pub async fn until_memory(
    client: &Client,
    what: &str,
    is_so: impl Fn(&MemoryReport) -> bool,
) -> MemoryReport {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let memory = client.describe().await.expect("it serves").memory;
        if is_so(&memory) {
            return memory;
        }
        assert!(Instant::now() < deadline, "not {what}: {memory:?}");
    }
}
