//! Who leaves when room is needed, as pure decisions over what the residents look like now.

use crate::session::SessionId;
use std::time::Duration;

/// Where a session's adapter is. Each leaves for the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    Device,
    /// The host's memory, beside an accelerator.
    Host,
    Disk,
}

/// A session in memory, as it looks now. Times are since the server's start.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    pub id: SessionId,
    pub tier: Tier,
    pub bytes: u64,
    /// It has frames under way or open microbatches: it cannot leave.
    pub busy: bool,
    /// Somebody wants it to stay on the device, whatever happens.
    pub pinned: bool,
    /// It is leaving already.
    pub leaving: bool,
    /// Since when it is there.
    pub since: Duration,
    /// Its last frame in this stay.
    pub used: Option<Duration>,
    /// It was asked to leave and could not; not to be asked before.
    pub rests_until: Duration,
}

/// When quiet sessions leave.
#[derive(Debug, Clone, Copy)]
pub struct Ages {
    /// So long without a frame: even if nobody needs the room.
    pub idle: Duration,
    /// So long each stays that has had a frame, if others need its room.
    pub turn: Duration,
}

/// In the host's memory a session may be idle so many times as long as on the device.
const HOST_PATIENCE: u32 = 10;

/// What to do now, and when to look again even if nothing happens.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    pub leave: Vec<SessionId>,
    pub again: Option<Duration>,
}

/// Who leaves `tier` so that `missing` bytes come free there: quiet ones, the least recently used
/// first, none before its turn is over. What leaves already counts.
pub fn make_room(all: &[Resident], tier: Tier, missing: u64, now: Duration, ages: Ages) -> Choice {
    let of_tier = || all.iter().filter(|resident| resident.tier == tier);
    let leaving: u64 = of_tier().filter(|r| r.leaving).map(|r| r.bytes).sum();
    let mut missing = missing.saturating_sub(leaving);
    let mut choice = Choice { leave: Vec::new(), again: None };
    let may_leave = |r: &&Resident| !r.busy && !r.leaving && !r.stays();
    let mut quiet: Vec<&Resident> = of_tier().filter(may_leave).collect();
    quiet.sort_by_key(|resident| last_use(resident));
    for resident in quiet {
        if missing == 0 {
            break;
        }
        let turn_ends = match (tier, resident.used) {
            (Tier::Device, Some(_)) => resident.since.saturating_add(ages.turn),
            _ => Duration::ZERO,
        };
        let stays_until = turn_ends.max(resident.rests_until);
        if stays_until > now {
            choice.look_again(stays_until);
        } else {
            choice.leave.push(resident.id);
            missing = missing.saturating_sub(resident.bytes);
        }
    }
    choice
}

/// Who has been idle for too long, whether room is needed or not.
pub fn idle(all: &[Resident], now: Duration, ages: Ages) -> Choice {
    let mut choice = Choice { leave: Vec::new(), again: None };
    for resident in all.iter().filter(|resident| !resident.leaving) {
        let patience = match resident.tier {
            Tier::Device => ages.idle,
            Tier::Host => ages.idle.saturating_mul(HOST_PATIENCE),
            Tier::Disk => continue,
        };
        let ends = last_use(resident).saturating_add(patience).max(resident.rests_until);
        if ends > now {
            choice.look_again(ends);
        } else if resident.busy || resident.stays() {
            // Its client may be gone with a microbatch open: the lease will end that. A pin may end
            // without a word.
            choice.look_again(now.saturating_add(ages.idle));
        } else {
            choice.leave.push(resident.id);
        }
    }
    choice
}

impl Resident {
    fn stays(&self) -> bool {
        self.pinned && self.tier == Tier::Device
    }
}

fn last_use(resident: &Resident) -> Duration {
    resident.used.unwrap_or(resident.since)
}

impl Choice {
    fn look_again(&mut self, at: Duration) {
        self.again = Some(self.again.map_or(at, |again| again.min(at)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGES: Ages = Ages { idle: Duration::from_secs(60), turn: Duration::from_secs(1) };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn resident(since: u64, used: Option<u64>) -> Resident {
        Resident {
            id: SessionId::new(),
            tier: Tier::Device,
            bytes: 10,
            busy: false,
            pinned: false,
            leaving: false,
            since: at(since),
            used: used.map(at),
            rests_until: at(0),
        }
    }

    fn room(all: &[Resident], missing: u64, now: u64) -> Choice {
        make_room(all, Tier::Device, missing, at(now), AGES)
    }

    #[test]
    fn the_least_recently_used_leave_and_no_more_than_needed() {
        let all = [resident(0, Some(9)), resident(0, Some(5)), resident(7, None)];
        let leave = |missing| room(&all, missing, 20).leave;
        assert_eq!(leave(0), []);
        assert_eq!(leave(1), [all[1].id]);
        assert_eq!(leave(10), [all[1].id]);
        assert_eq!(leave(11), [all[1].id, all[2].id]);
        assert_eq!(leave(1000), [all[1].id, all[2].id, all[0].id]);
    }

    #[test]
    fn the_busy_stay_and_the_leaving_count() {
        let mut all = [resident(0, Some(1)), resident(0, Some(2)), resident(0, Some(3))];
        all[0].busy = true;
        all[1].leaving = true;
        assert_eq!(room(&all, 10, 20).leave, []);
        assert_eq!(room(&all, 11, 20).leave, [all[2].id]);
        let other = Resident { tier: Tier::Host, ..resident(0, None) };
        assert_eq!(room(&[other], 1, 20).leave, []);
        let host = make_room(&[other], Tier::Host, 1, at(20), AGES);
        assert_eq!(host.leave, [other.id]);
    }

    #[test]
    fn the_pinned_leave_neither_for_others_nor_for_idleness() {
        let mut all = [resident(0, Some(1)), resident(0, Some(2))];
        all[0].pinned = true;
        assert_eq!(room(&all, 1000, 20).leave, [all[1].id]);
        let choice = idle(&all[..1], at(61), AGES);
        assert_eq!(choice, Choice { leave: vec![], again: Some(at(121)) });
        // It is to the device that they are pinned.
        let host = [Resident { tier: Tier::Host, pinned: true, ..resident(0, None) }];
        assert_eq!(make_room(&host, Tier::Host, 1, at(20), AGES).leave, [host[0].id]);
        assert_eq!(idle(&host, at(600), AGES).leave, [host[0].id]);
    }

    #[test]
    fn nobody_leaves_before_its_turn_is_over() {
        let all = [resident(19, Some(19)), resident(20, Some(20))];
        assert_eq!(room(&all, 20, 20), Choice { leave: vec![all[0].id], again: Some(at(21)) });
        assert_eq!(room(&all, 20, 21).leave, [all[0].id, all[1].id]);
        // One that has had no frame yet has no turn to lose.
        let mut fresh = [resident(20, None)];
        assert_eq!(room(&fresh, 1, 20).leave, [fresh[0].id]);
        // One that could not leave is left alone for a while.
        fresh[0].rests_until = at(25);
        assert_eq!(room(&fresh, 1, 20), Choice { leave: vec![], again: Some(at(25)) });
        assert_eq!(room(&fresh, 1, 25).leave, [fresh[0].id]);
    }

    #[test]
    fn the_idle_leave_in_time() {
        let mut all = [resident(0, Some(50)), resident(0, None), resident(70, None)];
        let choice = |all: &[Resident], now| idle(all, at(now), AGES);
        assert_eq!(choice(&all, 59), Choice { leave: vec![], again: Some(at(60)) });
        assert_eq!(choice(&all, 60), Choice { leave: vec![all[1].id], again: Some(at(110)) });
        all[0].busy = true;
        assert_eq!(choice(&all[..1], 110), Choice { leave: vec![], again: Some(at(170)) });
        let host = [Resident { tier: Tier::Host, ..resident(0, None) }];
        assert_eq!(choice(&host, 60), Choice { leave: vec![], again: Some(at(600)) });
        assert_eq!(choice(&host, 600).leave, [host[0].id]);
        assert_eq!(choice(&[], 600), Choice { leave: vec![], again: None });
    }
}
