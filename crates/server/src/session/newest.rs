//! Who may attach: the newest client of a session, and whoever begins after it.

use super::messages::Greeting;
use crate::error::Error;
use std::time::SystemTime;

/// The client that attached last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Newest {
    pub epoch: u64,
    client: u64,
    attempt: u64,
}

/// The time, so that epochs grow also where nobody remembers the last one.
pub fn epoch_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

impl Newest {
    /// Nobody yet; clients of earlier epochs are not taken back.
    pub fn since(epoch: u64) -> Self {
        Newest { epoch, client: 0, attempt: 0 }
    }

    /// A client says Hello. One that begins gets a new epoch; one that comes back keeps its own,
    /// unless another has begun since, or it has said a later Hello itself.
    pub fn replaced_by(self, greeting: Greeting) -> Result<Newest, Error> {
        let Greeting { epoch, client, attempt, .. } = greeting;
        let is_same = client != 0 && client == self.client;
        if is_same && attempt < self.attempt {
            return Err(Error::TakenOver);
        }
        let epoch = match epoch {
            // Its first answer was lost.
            0 if is_same => self.epoch,
            0 => epoch_now().max(self.epoch.saturating_add(1)),
            older if older < self.epoch => return Err(Error::TakenOver),
            known => known,
        };
        Ok(Newest { epoch, client, attempt })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(client: u64, epoch: u64, attempt: u64) -> Greeting {
        Greeting { last_answered: 0, epoch, client, attempt }
    }

    #[test]
    fn who_begins_takes_over_and_who_was_before_does_not_come_back() {
        let nobody = Newest::since(0);
        let first = nobody.replaced_by(hello(7, 0, 1)).unwrap();
        assert!(first.epoch > 0);
        let again = first.replaced_by(hello(7, first.epoch, 2)).unwrap();
        assert_eq!(again.epoch, first.epoch);
        let second = again.replaced_by(hello(8, 0, 1)).unwrap();
        assert!(second.epoch > first.epoch);
        assert!(second.replaced_by(hello(7, first.epoch, 3)).is_err());
        assert_eq!(second.replaced_by(hello(8, second.epoch, 2)).unwrap().epoch, second.epoch);
        // Without a number of its own, too.
        let third = second.replaced_by(hello(0, 0, 0)).unwrap();
        assert!(third.epoch > second.epoch);
        assert!(third.replaced_by(hello(0, second.epoch, 0)).is_err());
        assert!(third.replaced_by(hello(0, third.epoch, 0)).is_ok());
    }

    #[test]
    fn a_delayed_hello_does_not_push_out_the_same_clients_later_one() {
        let nobody = Newest::since(0);
        // The first two have no epoch yet: the first answer was lost on its way.
        let later = nobody.replaced_by(hello(7, 0, 2)).unwrap();
        assert!(later.replaced_by(hello(7, 0, 1)).is_err());
        assert_eq!(later.replaced_by(hello(7, 0, 3)).unwrap().epoch, later.epoch);
        let back = later.replaced_by(hello(7, later.epoch, 4)).unwrap();
        assert!(back.replaced_by(hello(7, later.epoch, 3)).is_err());
    }

    #[test]
    fn where_nobody_remembers_a_client_comes_back_unless_the_session_was_set_back() {
        let before = Newest::since(0).replaced_by(hello(7, 0, 1)).unwrap();
        let revived = Newest::since(0).replaced_by(hello(7, before.epoch, 2)).unwrap();
        assert_eq!(revived.epoch, before.epoch);
        let restored = Newest::since(before.epoch + 1);
        assert!(restored.replaced_by(hello(7, before.epoch, 2)).is_err());
        assert!(restored.replaced_by(hello(9, 0, 1)).unwrap().epoch > before.epoch);
    }
}
