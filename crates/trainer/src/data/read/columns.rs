//! Which columns of a table, or fields of an object, make a record.

use serde::{Deserialize, Serialize};

/// Columns by name. Those that are not named are found by the names that data sets usually have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// `--text-column`
    pub text: Option<String>,
    /// `--prompt-column`
    pub prompt: Option<String>,
    /// `--completion-column`
    pub completion: Option<String>,
    /// `--messages-column`
    pub messages: Option<String>,
    /// `--chosen-column`
    pub chosen: Option<String>,
    /// `--rejected-column`
    pub rejected: Option<String>,
}
