use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Who gets in, and what is written down about it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessConfig {
    /// The tenants with their hashed tokens and quotas, read again when it changes. None: the server
    /// is open, and whoever reaches it can do everything.
    pub tenants: Option<PathBuf>,
    /// Who opened, exported, deleted what and when, as JSON lines, appended. None: nothing is written.
    pub audit_log: Option<PathBuf>,
}
