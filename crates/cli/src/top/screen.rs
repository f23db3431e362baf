//! The live view: what is drawn, and what keys do.

use super::rows::{COLUMNS, Sort, rows};
use super::{look_again, summary};
use crate::operate::count;
use offshoot_client::Client;
use offshoot_client::operations::Overview;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Sparkline, Table};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// Lines of the picture of throughput.
const PICTURE_LINES: u16 = 3;
/// How often the thread that reads keys looks whether it is still wanted.
const KEY_WAIT: Duration = Duration::from_millis(200);
/// A look that takes longer is given up, and said so.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is shown.
#[derive(Default)]
pub struct Screen {
    pub address: String,
    pub overview: Overview,
    pub sort: Sort,
    pub is_reverse: bool,
    /// The first line of sessions.
    pub top: usize,
    /// Why the last look failed.
    pub error: Option<String>,
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
pub enum After {
    GoOn,
    End,
}

/// Draws until somebody ends it.
pub async fn watch(mut screen: Screen, client: &Client, every: Duration) -> anyhow::Result<()> {
    let mut keys = read_keys();
    // Also restores the terminal when the program panics.
    let mut terminal = ratatui::try_init()?;
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = loop {
        if let Err(error) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(error.into());
        }
        tokio::select! {
            event = keys.recv() => match event {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    if screen.press(key) == After::End {
                        break Ok(());
                    }
                }
                // Another size is drawn at once.
                Some(_) => {}
                None => break Ok(()),
            },
            _ = ticks.tick() => screen.look(client).await,
        }
    };
    ratatui::restore();
    ended
}

/// Keys and changes of size, read by a thread that ends when nobody listens.
fn read_keys() -> mpsc::Receiver<Event> {
    let (keys, pressed) = mpsc::channel(64);
    std::thread::spawn(move || {
        while !keys.is_closed() {
            match event::poll(KEY_WAIT) {
                Ok(true) => {
                    let Ok(event) = event::read() else { return };
                    if keys.blocking_send(event).is_err() {
                        return;
                    }
                }
                Ok(false) => {}
                Err(_) => return,
            }
        }
    });
    pressed
}

/// Columns by how much they would be missed, the most first.
const WANTED: [usize; 15] = [0, 8, 6, 9, 2, 10, 3, 1, 13, 11, 12, 7, 4, 5, 14];
/// Between two columns.
const GAP: usize = 2;

/// The columns that fit side by side, in their order. `width`: none if nothing stands in one.
fn fitting(mut room: usize, width: impl Fn(usize) -> Option<usize>) -> Vec<usize> {
    let mut shown = Vec::new();
    for n in WANTED {
        match width(n) {
            Some(width) if width <= room => {
                shown.push(n);
                room = room.saturating_sub(width + GAP);
            }
            Some(_) => break,
            None => {}
        }
    }
    shown.sort_unstable();
    shown
}

impl Screen {
    /// Looks at the server again. If that fails, what was seen last stays.
    async fn look(&mut self, client: &Client) {
        let looked = tokio::time::timeout(PATIENCE, look_again(client, &self.overview)).await;
        self.error = match looked {
            Ok(Ok(overview)) => {
                self.overview = overview;
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("{} does not answer; trying again", self.address)),
        };
    }

    /// What a key does.
    fn press(&mut self, key: KeyEvent) -> After {
        let last = self.overview.sessions.len().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return After::End,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return After::End;
            }
            KeyCode::Char('s') => (self.sort, self.top) = (self.sort.next(), 0),
            KeyCode::Char('r') => (self.is_reverse, self.top) = (!self.is_reverse, 0),
            KeyCode::Down | KeyCode::Char('j') => self.top = (self.top + 1).min(last),
            KeyCode::Up | KeyCode::Char('k') => self.top = self.top.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => self.top = (self.top + 20).min(last),
            KeyCode::PageUp => self.top = self.top.saturating_sub(20),
            KeyCode::Home | KeyCode::Char('g') => self.top = 0,
            KeyCode::End | KeyCode::Char('G') => self.top = last,
            _ => {}
        }
        After::GoOn
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let head = summary::lines(&self.overview, &self.address);
        let refused = summary::refused(&self.overview);
        let n_head = head.len() as u16;
        let n_refused = u16::from(refused.is_some());
        let areas = Layout::vertical([
            Constraint::Length(n_head),
            Constraint::Length(PICTURE_LINES),
            Constraint::Length(n_refused),
            Constraint::Min(2),
            Constraint::Length(1),
        ]);
        let [server, picture, refusals, sessions, foot] = areas.areas(frame.area());
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let mut lines: Vec<Line<'_>> = head.into_iter().map(Line::from).collect();
        if let Some(first) = lines.first_mut() {
            *first = first.clone().style(bold);
        }
        frame.render_widget(Paragraph::new(Text::from(lines)), server);
        self.draw_throughput(frame, picture);
        frame.render_widget(Paragraph::new(refused.unwrap_or_default()), refusals);
        self.draw_sessions(frame, sessions);
        self.draw_foot(frame, foot);
    }

    fn draw_throughput(&self, frame: &mut Frame<'_>, area: Rect) {
        let [name, bars] =
            Layout::horizontal([Constraint::Length(14), Constraint::Min(1)]).areas(area);
        let values = summary::throughput(&self.overview.samples, bars.width.into());
        let most = values.iter().copied().fold(0.0, f64::max);
        let label = Text::from(vec![
            Line::from("tokens/s"),
            Line::from("last hour"),
            Line::from(format!("at most {}", count(most))),
        ]);
        frame.render_widget(Paragraph::new(label), name);
        let data: Vec<u64> = values.iter().map(|value| value.round() as u64).collect();
        frame.render_widget(Sparkline::default().data(data), bars);
    }

    fn draw_sessions(&self, frame: &mut Frame<'_>, area: Rect) {
        let sorted = rows(&self.overview, self.sort, self.is_reverse);
        let cells: Vec<[String; 15]> = sorted.iter().map(|row| row.cells()).collect();
        let n_chars = |text: &str| text.chars().count();
        let used = |n: usize| cells.iter().any(|row| !row[n].is_empty());
        let width = |n: usize| {
            let widest = cells.iter().map(|row| n_chars(&row[n])).max().unwrap_or(0);
            widest.max(n_chars(COLUMNS[n].name))
        };
        let shown = fitting(area.width.into(), |n| used(n).then(|| width(n)));
        let aligned = |n: usize, text: String| {
            let side = if COLUMNS[n].is_number { Alignment::Right } else { Alignment::Left };
            Cell::from(Text::from(text).alignment(side))
        };
        let height = usize::from(area.height.saturating_sub(1));
        // Never beyond the last line.
        let top = self.top.min(cells.len().saturating_sub(height));
        let line = |row: &[String; 15]| {
            Row::new(shown.iter().map(|&n| aligned(n, row[n].clone())).collect::<Vec<_>>())
        };
        let lines = cells.iter().skip(top).take(height).map(line);
        let names = shown.iter().map(|&n| aligned(n, COLUMNS[n].name.into()));
        let header = Row::new(names).style(Style::new().add_modifier(Modifier::REVERSED));
        let table = Table::new(lines, shown.iter().map(|&n| Constraint::Length(width(n) as u16)));
        let table = table.header(header).column_spacing(GAP as u16);
        frame.render_widget(table, area);
    }

    fn draw_foot(&self, frame: &mut Frame<'_>, area: Rect) {
        let n = self.overview.sessions.len();
        let order = if self.is_reverse { ", reversed" } else { "" };
        let keys = format!(
            "{n} sessions by {}{order} | q end, s sort, r reverse, arrows scroll",
            self.sort.name()
        );
        let (text, style) = match &self.error {
            Some(error) => (error.clone(), Style::new().add_modifier(Modifier::BOLD)),
            None => (keys, Style::new().add_modifier(Modifier::DIM)),
        };
        frame.render_widget(Paragraph::new(text).style(style), area);
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::overview;
    use super::*;
    use offshoot_client::operations::Sample;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn drawn(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y) + "\n").collect()
    }

    fn key(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    #[test]
    fn the_screen_shows_server_throughput_and_sessions_and_keys_sort_them() {
        let mut overview = overview();
        let sample = |n| Sample { tokens_per_second: f64::from(n), ..Default::default() };
        overview.samples = (0..300).map(sample).collect();
        let mut screen = Screen { address: "trunk:1".into(), overview, ..Screen::default() };
        let text = drawn(&screen, 140, 16);
        println!("{text}");
        for part in
            ["at trunk:1", "2 attached", "tokens/s", "█", "session", "first", "q end", "by state"]
        {
            assert!(text.contains(part), "{part}");
        }
        let place = |text: &str, name: &str| text.find(name).unwrap();
        assert!(place(&text, "first") < place(&text, "second"));
        assert_eq!(screen.press(key(KeyCode::Char('s'))), After::GoOn);
        let text = drawn(&screen, 140, 16);
        assert!(place(&text, "second") < place(&text, "first") && text.contains("by tokens"));
        screen.press(key(KeyCode::Char('r')));
        let text = drawn(&screen, 140, 16);
        assert!(place(&text, "first") < place(&text, "second") && text.contains("reversed"));
        // Scrolled as far as it goes, the last lines are still there.
        screen.press(key(KeyCode::End));
        assert!(drawn(&screen, 140, 16).contains("first"));
        let low = drawn(&screen, 140, 11);
        assert!(!low.contains("first") && low.contains("long"), "{low}");
        screen.error = Some("gone for now".into());
        assert!(drawn(&screen, 140, 16).contains("gone for now"));
        assert_eq!(screen.press(key(KeyCode::Char('q'))), After::End);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.press(control_c), After::End);
        // A narrow one has fewer columns, and those are whole.
        let narrow = drawn(&screen, 60, 16);
        println!("{narrow}");
        assert!(narrow.contains("tok/s") && narrow.contains("200") && !narrow.contains("opened"));
        // Whatever the size, it is drawn.
        for (width, height) in [(1, 1), (20, 5), (300, 80)] {
            drawn(&screen, width, height);
        }
    }
}
