//! What a tenant hears of an error: nothing that tells about others.

use super::Error;

impl Error {
    /// What a tenant hears instead of this error, if it tells how much others have or do. An open
    /// server has one tenant without a name, who hears everything.
    pub fn hidden_from(&self, tenant: &str) -> Option<Error> {
        use Error::*;
        if tenant.is_empty() {
            return None;
        }
        match self {
            NoRoom { retry_after: None, .. } => Some(NeverFits),
            NoRoom { .. }
            | LiveSessions { .. }
            | QueueFull { .. }
            | WaitingForRoom { .. }
            | LargeRequests { .. } => {
                Some(Full { retry_after: self.retry_after().unwrap_or_default() })
            }
            // What one tenant may pin is of his own share.
            PinRoom { share, .. } if *share == crate::residency::PINS_OF_ALL => Some(PinFull),
            // Its text may have the shapes of a batch.
            Panic { job, .. } => Some(Panic { job, panic: "the server's log says why".into() }),
            _ => None,
        }
    }

    /// The error as this tenant hears it.
    pub fn told_to(self, tenant: &str) -> Error {
        self.hidden_from(tenant).unwrap_or(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{BytesKind, Ledger};
    use std::time::Duration;

    #[test]
    fn totals_are_for_open_servers_only() {
        let shortage = || Ledger::new(Some(1234)).reserve(BytesKind::Adapters, 98765).unwrap_err();
        let after = Some(Duration::from_secs(3));
        let all: Vec<(fn() -> Error, bool)> = vec![
            (|| Error::LiveSessions { limit: 1234 }, true),
            (|| Error::QueueFull { limit: 1234 }, true),
            (|| Error::WaitingForRoom { limit: 1234 }, true),
            (|| Error::LargeRequests { limit: 1234 }, true),
            (|| Error::Panic { job: "Forward", panic: "[1234, 8]".into() }, false),
        ];
        let mut errors: Vec<(Error, bool)> =
            all.iter().map(|(make, full)| (make(), *full)).collect();
        errors.push((Error::NoRoom { shortage: shortage(), retry_after: after }, true));
        errors.push((Error::NoRoom { shortage: shortage(), retry_after: None }, false));
        for (error, full) in errors {
            assert!(error.to_string().contains("1234"), "{error}");
            assert!(error.hidden_from("").is_none(), "{error}");
            let (class, after) = (error.class(), error.retry_after());
            let told = error.told_to("blue");
            assert_eq!((told.class(), told.retry_after()), (class, after), "{told}");
            let text = told.to_string();
            assert!(!text.contains("1234") && !text.contains("98765"), "{text}");
            assert_eq!(text.contains("the server is full; try again in"), full, "{text}");
        }
        let own = Error::UnknownSession("x".into());
        assert!(own.hidden_from("blue").is_none());
    }
}
