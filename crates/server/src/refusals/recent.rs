//! The refusals of the last hour, those of one kind together. Pure, and bounded.

use super::RequestId;
use offshoot_proto::v1;
use std::collections::HashMap;

/// Kinds that are remembered; the one that was seen longest ago goes for a new one.
const MAX_KINDS: usize = 1024;
/// Of a message; errors may name what a client sent.
const MAX_MESSAGE_CHARS: usize = 500;
const N_MINUTES: usize = 60;
const MINUTE_MILLIS: u64 = 60_000;

/// What a client was told.
#[derive(Debug)]
pub struct Told {
    pub id: RequestId,
    pub label: &'static str,
    pub message: String,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Recent {
    /// By tenant, then by the error's own label.
    kinds: HashMap<String, HashMap<&'static str, Kind>>,
    n_kinds: usize,
}

#[derive(Debug)]
struct Kind {
    /// By the minute in which they were, modulo an hour.
    minutes: [u32; N_MINUTES],
    last_millis: u64,
    last: Told,
}

impl Recent {
    /// Notes one of this tenant and label.
    pub fn note(&mut self, (tenant, label): (&str, &'static str), mut told: Told, now_millis: u64) {
        if let Some((end, _)) = told.message.char_indices().nth(MAX_MESSAGE_CHARS) {
            told.message.truncate(end);
            told.message.push_str(" ...");
        }
        let known = self.kinds.get_mut(tenant).and_then(|of| of.get_mut(label));
        if let Some(kind) = known {
            kind.add(told, now_millis);
            return;
        }
        if self.n_kinds >= MAX_KINDS {
            self.forget_oldest();
        }
        let mut kind = Kind { minutes: [0; N_MINUTES], last_millis: now_millis, last: told };
        kind.minutes[place(now_millis)] = 1;
        self.kinds.entry(tenant.to_string()).or_default().insert(label, kind);
        self.n_kinds += 1;
    }

    fn forget_oldest(&mut self) {
        let all = self.kinds.iter().flat_map(|(tenant, of)| {
            of.iter().map(move |(label, kind)| (kind.last_millis, tenant, *label))
        });
        let Some((_, tenant, label)) = all.min() else { return };
        let tenant = tenant.clone();
        if let Some(of) = self.kinds.get_mut(&tenant) {
            of.remove(label);
            self.n_kinds -= 1;
            if of.is_empty() {
                self.kinds.remove(&tenant);
            }
        }
    }

    /// The newest first. A tenant sees its own, each under the label that it was told.
    pub fn last_hour(&self, tenant: Option<&str>, now_millis: u64) -> Vec<v1::Refusal> {
        let mut found: Vec<v1::Refusal> = Vec::new();
        for (of, kinds) in &self.kinds {
            if tenant.is_some_and(|tenant| tenant != of) {
                continue;
            }
            for (&label, kind) in kinds {
                let label = if tenant.is_some() { kind.last.label } else { label };
                let Some(refusal) = kind.seen(label, of, now_millis) else { continue };
                // Several kinds may have been told as one.
                let same = |other: &&mut v1::Refusal| {
                    (&other.label, &other.tenant) == (&refusal.label, &refusal.tenant)
                };
                match found.iter_mut().find(same) {
                    Some(other) => {
                        let count = other.count + refusal.count;
                        if refusal.last_millis > other.last_millis {
                            *other = refusal;
                        }
                        other.count = count;
                    }
                    None => found.push(refusal),
                }
            }
        }
        found.sort_by(|a, b| (b.last_millis, &a.label).cmp(&(a.last_millis, &b.label)));
        found
    }
}

/// Of this moment among the minutes.
fn place(millis: u64) -> usize {
    (millis / MINUTE_MILLIS) as usize % N_MINUTES
}

/// Clears the minutes that have passed since `from`: they are of an hour before.
fn clear_passed(minutes: &mut [u32; N_MINUTES], from_millis: u64, to_millis: u64) {
    let (from, to) = (from_millis / MINUTE_MILLIS, to_millis / MINUTE_MILLIS);
    for minute in (from + 1..=to).take(N_MINUTES) {
        minutes[minute as usize % N_MINUTES] = 0;
    }
}

impl Kind {
    fn add(&mut self, told: Told, now_millis: u64) {
        // A clock that was set back does not make the past longer.
        let now_millis = now_millis.max(self.last_millis);
        clear_passed(&mut self.minutes, self.last_millis, now_millis);
        let count = &mut self.minutes[place(now_millis)];
        *count = count.saturating_add(1);
        (self.last_millis, self.last) = (now_millis, told);
    }

    fn seen(&self, label: &str, tenant: &str, now_millis: u64) -> Option<v1::Refusal> {
        let mut minutes = self.minutes;
        clear_passed(&mut minutes, self.last_millis, now_millis);
        let count: u64 = minutes.iter().map(|&count| u64::from(count)).sum();
        (count > 0).then(|| v1::Refusal {
            label: label.into(),
            tenant: tenant.into(),
            count,
            last_millis: self.last_millis,
            message: self.last.message.clone(),
            request_id: self.last.id.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: u64 = 1_750_000_000_000;
    const HOUR: u64 = 60 * MINUTE_MILLIS;

    fn told(message: &str) -> Told {
        Told { id: RequestId(7), label: "shape", message: message.into() }
    }

    #[test]
    fn an_hour_is_counted_and_then_forgotten() {
        let mut recent = Recent::default();
        for minute in 0..90 {
            recent.note(("blue", "shape"), told("m"), BEGIN + minute * MINUTE_MILLIS);
        }
        let count = |millis| recent.last_hour(None, BEGIN + millis).first().map(|seen| seen.count);
        assert_eq!(count(89 * MINUTE_MILLIS), Some(60));
        assert_eq!(count(119 * MINUTE_MILLIS), Some(30));
        assert_eq!(count(89 * MINUTE_MILLIS + HOUR), None);
        assert_eq!(count(100 * HOUR), None);
    }

    #[test]
    fn a_tenant_sees_its_own_and_the_newest_comes_first() {
        let mut recent = Recent::default();
        recent.note(("blue", "shape"), told("first"), BEGIN);
        recent.note(("red", "shape"), told("second"), BEGIN + 1);
        recent.note(("blue", "wire_dtype"), told("third"), BEGIN + 2);
        recent.note(("blue", "shape"), told("fourth"), BEGIN + 3);
        let all = recent.last_hour(None, BEGIN + 3);
        let seen: Vec<_> = all.iter().map(|r| (r.tenant.as_str(), r.message.as_str())).collect();
        assert_eq!(seen, [("blue", "fourth"), ("blue", "third"), ("red", "second")]);
        // Both were told under one label.
        let blue = recent.last_hour(Some("blue"), BEGIN + 3);
        assert_eq!((blue.len(), blue[0].count, blue[0].message.as_str()), (1, 3, "fourth"));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut recent = Recent::default();
        for i in 0..3 * MAX_KINDS as u64 {
            recent.note((&format!("t{i}"), "shape"), told(&"x".repeat(9999)), BEGIN + i);
        }
        let all = recent.last_hour(None, BEGIN);
        assert_eq!(all.len(), MAX_KINDS);
        assert_eq!(all[0].tenant, format!("t{}", 3 * MAX_KINDS - 1));
        assert!(all.iter().all(|refusal| refusal.message.len() < 600));
    }
}
