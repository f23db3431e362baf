//! A run through everything that its server goes through: it goes back when the server does, waits
//! while it is away, and ends at once if it is asked to meanwhile.

use super::Run;
use crate::TrainError;
use crate::checkpoint;
use crate::options::CancelToken;
use offshoot_client::{Client, ClientError, ErrorCode};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Times in a row that the server may fall back without a step beyond the ones before, or a newer
/// snapshot: then something is broken for good.
const MAX_ROLLBACKS: u32 = 10;
/// A shorter break than this does not count as the server's absence: the run ends with a checkpoint.
const AWAY: Duration = Duration::from_secs(1);

/// Without a sign of life for so long after it was asked to end, a run does not wait for its server.
const SILENT: Duration = Duration::from_secs(3);

/// Returns once the run was asked to end, and has waited for its server for at least this long.
async fn stopped(cancel: &CancelToken, client: &Client, least: Duration) {
    cancel.cancelled().await;
    tokio::select! {
        () = client.offline_for(least) => {}
        () = client.silent_for(SILENT) => {}
    }
}

/// Something of a run's beginning that waits for the server.
pub(super) async fn unless_stopped<T>(
    cancel: &CancelToken,
    client: &Client,
    beginning: impl Future<Output = Result<T, TrainError>>,
) -> Result<T, TrainError> {
    tokio::select! {
        begun = beginning => begun,
        () = stopped(cancel, client, Duration::ZERO) => Err(TrainError::StoppedAtStart),
    }
}

impl Run {
    /// Trains to the end and exports. None: it was asked to end before.
    pub(super) async fn follow(
        &mut self,
        cancel: &CancelToken,
    ) -> Result<Option<(PathBuf, u64)>, TrainError> {
        let dir = self.options.output.dir.clone();
        let client = self.prepared.client.clone();
        let ended = tokio::select! {
            ended = self.go_on_and_back(cancel) => ended,
            () = stopped(cancel, &client, AWAY) => {
                return Err(TrainError::StoppedOffline { newest: newest(&dir) });
            }
        };
        if ended.is_err() {
            // What was in flight was dropped, and is discarded with this: the session may be resumed
            // from a checkpoint, and until then its tapes serve nobody.
            let _ = self.session.settle().await;
        }
        ended.map_err(|error| match error {
            TrainError::Client(cause @ ClientError::Unreachable { .. }) => {
                TrainError::Offline { cause: Box::new(cause), newest: newest(&dir) }
            }
            // This side's own mistake, such as numbers that overflowed: going on brings it again.
            own @ TrainError::Client(ClientError::Refused { code: ErrorCode::Invalid, .. }) => own,
            cause @ (TrainError::Client(_) | TrainError::Answer { .. }) => {
                TrainError::Ended { cause: Box::new(cause), newest: newest(&dir) }
            }
            other => other,
        })
    }

    async fn go_on_and_back(
        &mut self,
        cancel: &CancelToken,
    ) -> Result<Option<(PathBuf, u64)>, TrainError> {
        let mut rollbacks = 0;
        // The furthest step, and the furthest one that a rollback led to.
        let mut furthest = (self.step, self.step);
        loop {
            let error = match self.go_on(cancel).await {
                Ok(()) => match self.export_at_end().await {
                    Ok(exported) => return Ok(exported),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let TrainError::Client(ClientError::RolledBack { snapshots, .. }) = &error else {
                return Err(error);
            };
            tracing::info!(%error, "the server rolled back");
            let was = self.step;
            self.go_back(snapshots).await?;
            let progress = was > furthest.0 || self.step > furthest.1;
            rollbacks = if progress { 1 } else { rollbacks + 1 };
            furthest = (was.max(furthest.0), self.step.max(furthest.1));
            if rollbacks > MAX_ROLLBACKS {
                return Err(error);
            }
        }
    }
}

/// The newest checkpoint of a run's folder.
pub(super) fn newest(dir: &Path) -> Option<PathBuf> {
    checkpoint::list(dir).ok()?.pop().map(|saved| saved.path)
}
