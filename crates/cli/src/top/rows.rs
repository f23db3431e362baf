//! The sessions of an overview as lines: sorted, and each value in a few characters.

use crate::operate::named::{SHORT, id_of};
use crate::operate::{Column, age, bytes, count, seconds, share, table};
use clap::ValueEnum;
use offshoot_client::operations::{Overview, SessionSummary, SessionView};
use offshoot_client::{Residency, SessionState};
use std::cmp::Ordering;

/// By what sessions are sorted: the most first, and names by the alphabet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// attached, detached, parked; within these by tenant and age
    #[default]
    State,
    /// tokens per second
    Tokens,
    /// share of the device's time
    Share,
    /// time in the queue
    Queue,
    /// the highest loss that is shared
    Loss,
    /// bytes on the device
    Bytes,
    /// steps taken
    Step,
    /// the last frame, the newest first
    Age,
    /// by tenant, then by name
    Tenant,
    /// by name
    Name,
}

impl Sort {
    /// The one after this, round and round.
    pub fn next(self) -> Sort {
        let all = Sort::value_variants();
        let place = all.iter().position(|&sort| sort == self).unwrap_or(0);
        all[(place + 1) % all.len()]
    }

    /// As an option has it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// What stands above the lines.
pub const COLUMNS: [Column; 15] = [
    Column::text("session"),
    Column::text("name"),
    Column::text("tenant"),
    Column::text("state"),
    Column::text("on"),
    Column::number("rank"),
    Column::number("step"),
    Column::number("durable"),
    Column::number("tok/s"),
    Column::number("loss"),
    Column::number("device"),
    Column::number("queue"),
    Column::number("bytes"),
    Column::number("frame"),
    Column::number("opened"),
];

/// Names are cut behind so many characters.
const NAME_CHARS: usize = 28;

/// A session.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub view: &'a SessionView,
    now_millis: u64,
}

/// All sessions, sorted.
pub fn rows(overview: &Overview, sort: Sort, is_reverse: bool) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> =
        overview.sessions.iter().map(|view| Row::of(overview, view)).collect();
    // As the server sends them: by state, tenant and age.
    rows.sort_by(|a, b| a.by(b, sort));
    if is_reverse {
        rows.reverse();
    }
    rows
}

/// The lines as text.
pub fn text_table(rows: &[Row<'_>]) -> String {
    table(&COLUMNS, &rows.iter().map(|row| row.cells().to_vec()).collect::<Vec<_>>())
}

impl<'a> Row<'a> {
    pub fn of(overview: &Overview, view: &'a SessionView) -> Row<'a> {
        Row { view, now_millis: overview.now_millis }
    }

    fn info(&self) -> Option<&SessionSummary> {
        self.view.info.as_ref()
    }

    pub fn state(&self) -> &'static str {
        match self.info().map(SessionSummary::state) {
            Some(SessionState::Attached) => "attached",
            Some(SessionState::Detached) => "detached",
            Some(SessionState::Parked) => "parked",
            Some(SessionState::Unspecified) | None => "unknown",
        }
    }

    /// The memory that its adapter is in.
    pub fn place(&self) -> &'static str {
        match self.info().map(SessionSummary::residency) {
            Some(Residency::Device) if self.view.pinned => "device, pinned",
            Some(Residency::Device) => "device",
            Some(Residency::Host) => "host",
            Some(Residency::Disk) => "disk",
            Some(Residency::Unspecified) | None => "unknown",
        }
    }

    /// Of adapter, open microbatches and caches.
    fn bytes(&self) -> u64 {
        self.info().map_or(0, |info| info.adapter_bytes + info.tape_bytes + info.cache_bytes)
    }

    /// In the order of [`COLUMNS`].
    pub fn cells(&self) -> [String; 15] {
        let Row { view, now_millis } = *self;
        let info = self.info();
        let is_live = self.state() != "parked";
        let live = |text: String| if is_live { text } else { "-".into() };
        let name = info.map_or("", |info| info.name.as_str());
        [
            id_of(view).chars().take(SHORT).collect(),
            clean(name),
            view.tenant.clone(),
            self.state().into(),
            self.place().into(),
            info.and_then(|info| info.lora.as_ref()).map_or(0, |lora| lora.r).to_string(),
            info.map_or(0, |info| info.step).to_string(),
            view.durable_step.to_string(),
            live(count(view.tokens_per_second)),
            view.shared_loss.map_or_else(|| "-".into(), |loss| format!("{loss:.3}")),
            live(share(view.device_share)),
            live(seconds(view.queue_seconds)),
            bytes(self.bytes()),
            age(now_millis, view.last_frame_millis),
            age(now_millis, view.opened_millis),
        ]
    }

    fn by(&self, other: &Row<'_>, sort: Sort) -> Ordering {
        let (a, b) = (self.view, other.view);
        let name = |row: &Row<'_>| row.info().map_or_else(String::new, |info| info.name.clone());
        let step = |row: &Row<'_>| row.info().map_or(0, |info| info.step);
        match sort {
            Sort::State => Ordering::Equal,
            Sort::Tokens => b.tokens_per_second.total_cmp(&a.tokens_per_second),
            Sort::Share => b.device_share.total_cmp(&a.device_share),
            Sort::Queue => b.queue_seconds.total_cmp(&a.queue_seconds),
            Sort::Loss => {
                let loss = |view: &SessionView| view.shared_loss.unwrap_or(f64::NEG_INFINITY);
                loss(b).total_cmp(&loss(a))
            }
            Sort::Bytes => other.bytes().cmp(&self.bytes()),
            Sort::Step => step(other).cmp(&step(self)),
            Sort::Age => b.last_frame_millis.cmp(&a.last_frame_millis),
            Sort::Tenant => (&a.tenant, name(self)).cmp(&(&b.tenant, name(other))),
            Sort::Name => name(self).cmp(&name(other)),
        }
    }
}

/// A name that a client chose, as it can be shown: what steers a terminal is no part of it.
fn clean(name: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    let mut text: String = name.chars().map(shown).take(NAME_CHARS).collect();
    if name.chars().nth(NAME_CHARS).is_some() {
        text.pop();
        text.push('~');
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use offshoot_client::LoraConfig;

    /// Three sessions of two tenants.
    pub fn overview() -> Overview {
        let session = |n: u64, name: &str, tenant: &str, state: SessionState| {
            let info = SessionSummary {
                session_id: format!("{n:032x}"),
                name: name.into(),
                state: state as i32,
                residency: Residency::Device as i32,
                step: 10 * n,
                adapter_bytes: n << 20,
                lora: Some(LoraConfig { r: 8, ..Default::default() }),
                ..Default::default()
            };
            SessionView {
                info: Some(info),
                tenant: tenant.into(),
                tokens_per_second: 100.0 * n as f64,
                shared_loss: (n == 2).then_some(1.25),
                device_share: 0.25,
                last_frame_millis: 1_000_000 - 1000 * n,
                opened_millis: 500_000,
                durable_step: 9,
                pinned: n == 1,
                ..Default::default()
            }
        };
        Overview {
            now_millis: 1_000_000,
            is_operator: true,
            sessions: vec![
                session(1, "first", "red", SessionState::Attached),
                session(2, "second\u{1b}[2J", "blue", SessionState::Attached),
                session(3, &"long ".repeat(20), "blue", SessionState::Parked),
            ],
            ..Default::default()
        }
    }

    #[test]
    fn sessions_are_sorted_by_any_column() {
        let overview = overview();
        let order = |sort, reverse| {
            let rows = rows(&overview, sort, reverse);
            rows.iter().map(|row| row.info().unwrap().step / 10).collect::<Vec<_>>()
        };
        assert_eq!(order(Sort::State, false), [1, 2, 3]);
        assert_eq!(order(Sort::Tokens, false), [3, 2, 1]);
        assert_eq!(order(Sort::Tokens, true), [1, 2, 3]);
        assert_eq!(order(Sort::Loss, false)[0], 2);
        assert_eq!(order(Sort::Bytes, false), [3, 2, 1]);
        assert_eq!(order(Sort::Age, false), [1, 2, 3]);
        assert_eq!(order(Sort::Tenant, false), [3, 2, 1]);
        assert_eq!(order(Sort::Name, false), [1, 3, 2]);
        let all: Vec<Sort> =
            std::iter::successors(Some(Sort::State), |s| Some(s.next())).take(11).collect();
        assert_eq!((all[10], all[1].name()), (Sort::State, "tokens".to_string()));
    }

    #[test]
    fn a_name_cannot_steer_the_terminal_and_a_parked_session_has_no_speed() {
        let overview = overview();
        let text = text_table(&rows(&overview, Sort::State, false));
        println!("{text}");
        assert!(!text.contains('\u{1b}') && text.contains("second?[2J"));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("device, pinned") && lines[2].contains("1.250"));
        assert!(lines[3].contains('~') && lines[3].contains(" - "), "{text}");
        assert!(lines[1].contains("25%") && lines[1].contains("8m"), "{text}");
    }
}
