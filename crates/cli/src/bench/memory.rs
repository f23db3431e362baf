use anyhow::Context;
use offshoot_client::{Client, ClientError, MemoryReport};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Barrier, oneshot};
use tokio::task::JoinHandle;

/// Rare enough to cost nothing, often enough to see tapes.
const INTERVAL: Duration = Duration::from_millis(200);

/// The server's bytes during a measurement, as it counts them itself.
#[derive(Debug, Default)]
pub struct MemorySeen {
    /// The largest of each kind; not all at the same moment.
    pub peak: MemoryReport,
    /// When all sessions were open, before the first frame of those that are measured.
    pub begin: MemoryReport,
    pub n_readings: usize,
}

/// Asks the server again and again.
pub struct MemoryWatch {
    end: oneshot::Sender<()>,
    task: JoinHandle<Result<MemorySeen, ClientError>>,
}

impl MemoryWatch {
    /// Reads once, and from the time on at which all have come to `start` again and again.
    pub async fn start(client: Client, start: Arc<Barrier>) -> Result<MemoryWatch, ClientError> {
        let (end, mut ended) = oneshot::channel();
        let begin = client.describe().await?.memory;
        let task = tokio::spawn(async move {
            let mut seen = MemorySeen { peak: begin, begin, n_readings: 1 };
            start.wait().await;
            while tokio::time::timeout(INTERVAL, &mut ended).await.is_err() {
                seen.add(client.describe().await?.memory);
            }
            // For the peaks that the server keeps itself.
            seen.add(client.describe().await?.memory);
            Ok(seen)
        });
        Ok(MemoryWatch { end, task })
    }

    /// What was seen until now.
    pub async fn end(self) -> anyhow::Result<MemorySeen> {
        // If it has ended by itself, its error says why.
        let _ = self.end.send(());
        Ok(self.task.await.context("the task that reads the server's memory")??)
    }
}

impl MemorySeen {
    fn add(&mut self, now: MemoryReport) {
        let peak = &mut self.peak;
        peak.resident_bytes = peak.resident_bytes.max(now.resident_bytes);
        peak.weights_bytes = peak.weights_bytes.max(now.weights_bytes);
        peak.adapter_bytes = peak.adapter_bytes.max(now.adapter_bytes);
        peak.tape_bytes = peak.tape_bytes.max(now.tape_bytes);
        peak.workspace_bytes = peak.workspace_bytes.max(now.workspace_bytes);
        peak.host_bytes = peak.host_bytes.max(now.host_bytes);
        peak.live_sessions = peak.live_sessions.max(now.live_sessions);
        peak.open_microbatches = peak.open_microbatches.max(now.open_microbatches);
        peak.sessions_on_device = peak.sessions_on_device.max(now.sessions_on_device);
        peak.sessions_on_host = peak.sessions_on_host.max(now.sessions_on_host);
        // The server keeps it itself.
        peak.peak = now.peak;
        self.n_readings += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_peak() {
        let mut seen = MemorySeen::default();
        seen.add(MemoryReport { tape_bytes: 9, adapter_bytes: 1, ..Default::default() });
        seen.add(MemoryReport { tape_bytes: 2, adapter_bytes: 5, ..Default::default() });
        assert_eq!((seen.peak.tape_bytes, seen.peak.adapter_bytes, seen.n_readings), (9, 5, 2));
        assert_eq!(seen.begin, MemoryReport::default());
    }
}
