use crate::access::Stranger;
use std::collections::HashMap;
use std::net::IpAddr;

/// Peers that are told apart in one window; what comes from more of them is counted together.
const MAX_PEERS: usize = 256;

/// Who was refused: a peer, and whose token it had, if that is known. Claims do not count: whoever made
/// them up could fill the list.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Who {
    pub peer: Option<IpAddr>,
    /// Tenant and the token's id.
    pub known: Option<(String, String)>,
}

impl Who {
    pub fn of(stranger: &Stranger) -> Who {
        let Stranger { peer, tenant, token } = stranger;
        let peer = peer.map(|peer| peer.ip().to_canonical());
        Who { peer, known: tenant.clone().zip(token.clone()) }
    }
}

/// How often peers were refused in the current window, so that a flood fills no disk. Pure.
#[derive(Default)]
pub(super) struct Refusals {
    /// Refusals after the first, which has a line of its own.
    peers: HashMap<Who, u64>,
    others: u64,
}

impl Refusals {
    /// Counts one. Whether it is the peer's first, and has a line at once.
    pub fn note(&mut self, peer: Who) -> bool {
        if let Some(count) = self.peers.get_mut(&peer) {
            *count += 1;
            return false;
        }
        if self.peers.len() == MAX_PEERS {
            self.others += 1;
            return false;
        }
        self.peers.insert(peer, 0);
        true
    }

    /// Ends the window: how many more there were of whom. Nobody: of peers beyond the first ones.
    pub fn take(&mut self) -> Vec<(Who, u64)> {
        let Refusals { peers, others } = std::mem::take(self);
        let mut all: Vec<_> = peers.into_iter().filter(|(_, count)| *count > 0).collect();
        all.sort();
        if others > 0 {
            all.push((Who::default(), others));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_flood_is_a_few_lines() {
        let mut refusals = Refusals::default();
        let peer = |n: u32| Who { peer: Some(IpAddr::from(Ipv4Addr::from(n))), known: None };
        assert!(refusals.note(peer(1)));
        for _ in 0..1000 {
            assert!(!refusals.note(peer(1)));
        }
        let first = (2..2000).filter(|&n| refusals.note(peer(n))).count();
        assert_eq!(first, MAX_PEERS - 1);
        assert_eq!(refusals.take(), [(peer(1), 1000), (Who::default(), 1998 - 255)]);
        assert!(refusals.take().is_empty() && refusals.note(peer(1)));
        // A token that was stolen is not hidden among what else its thief tries.
        let known = || Who { known: Some(("blue".into(), "b1".into())), ..peer(1) };
        assert!(refusals.note(known()) && !refusals.note(known()));
    }
}
