//! A grid of characters to draw on, each of two by four braille dots.

/// Dots of a cell, by column and row, in Unicode's order of braille patterns.
const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
/// The pattern without dots.
const BRAILLE: u32 = 0x2800;

#[derive(Clone, Copy, Default)]
struct Cell {
    dots: u8,
    /// In place of the dots.
    mark: Option<char>,
    colour: Option<u8>,
}

/// A drawing of `columns` times `rows` characters.
pub struct Canvas {
    columns: usize,
    cells: Vec<Cell>,
}

/// How a line or a point looks: in braille dots, or in a character.
#[derive(Clone, Copy)]
pub struct Pen {
    pub mark: Option<char>,
    /// Of the 256 that terminals know.
    pub colour: Option<u8>,
}

impl Canvas {
    pub fn new(columns: usize, rows: usize) -> Self {
        Canvas { columns, cells: vec![Cell::default(); columns * rows] }
    }

    pub fn rows(&self) -> usize {
        self.cells.len() / self.columns
    }

    /// Joins points whose coordinates go from 0 (left, bottom) to 1 (right, top).
    pub fn line(&mut self, points: impl IntoIterator<Item = (f64, f64)>, pen: Pen) {
        let mut last = None;
        for point in points {
            let to = self.dot(point);
            self.segment(last.unwrap_or(to), to, pen);
            last = Some(to);
        }
    }

    /// A character at each point, instead of what is there.
    pub fn marks(&mut self, points: impl IntoIterator<Item = (f64, f64)>, pen: Pen) {
        for point in points {
            let dot = self.dot(point);
            self.set(dot, pen);
        }
    }

    fn dot(&self, (x, y): (f64, f64)) -> (i64, i64) {
        let (width, height) = (self.columns * 2 - 1, self.rows() * 4 - 1);
        let scaled = |value: f64, most: usize| (value.clamp(0.0, 1.0) * most as f64).round() as i64;
        (scaled(x, width), height as i64 - scaled(y, height))
    }

    /// Every dot on the way, the longer side's one by one.
    fn segment(&mut self, from: (i64, i64), to: (i64, i64), pen: Pen) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let n = dx.abs().max(dy.abs()).max(1);
        for i in 0..=n {
            let part = |d: i64| (d as f64 * i as f64 / n as f64).round() as i64;
            self.set((from.0 + part(dx), from.1 + part(dy)), pen);
        }
    }

    fn set(&mut self, (x, y): (i64, i64), pen: Pen) {
        let (x, y) = (x as usize, y as usize);
        let cell = &mut self.cells[y / 4 * self.columns + x / 2];
        cell.colour = pen.colour;
        match pen.mark {
            Some(_) => cell.mark = pen.mark,
            None => {
                cell.mark = None;
                cell.dots |= DOTS[x % 2][y % 4];
            }
        }
    }

    /// A row's characters, coloured where a pen was, without spaces at its end.
    pub fn row(&self, row: usize) -> String {
        let cells = &self.cells[row * self.columns..][..self.columns];
        let used = cells.iter().rposition(|cell| cell.dots > 0 || cell.mark.is_some());
        let mut text = String::new();
        for cell in &cells[..used.map_or(0, |last| last + 1)] {
            let braille = || char::from_u32(BRAILLE + u32::from(cell.dots)).unwrap_or(' ');
            let shown = match (cell.mark, cell.dots) {
                (Some(mark), _) => mark,
                (None, 0) => ' ',
                (None, _) => braille(),
            };
            text += &coloured(&shown.to_string(), cell.colour);
        }
        text
    }
}

/// As terminals take it; as it is without a colour.
pub fn coloured(text: &str, colour: Option<u8>) -> String {
    match colour {
        Some(colour) if !text.trim().is_empty() => format!("\x1b[38;5;{colour}m{text}\x1b[0m"),
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_dots_and_points_are_marks() {
        let mut canvas = Canvas::new(4, 2);
        let pen = Pen { mark: None, colour: None };
        canvas.line([(0.0, 0.0), (1.0, 1.0)], pen);
        assert_eq!([canvas.row(0), canvas.row(1)], ["  ⡠⠊", "⡠⠊"]);
        canvas.marks([(0.0, 1.0)], Pen { mark: Some('a'), colour: Some(33) });
        assert_eq!(canvas.row(0), "\x1b[38;5;33ma\x1b[0m ⡠⠊");
        // What lies outside is drawn at the border.
        canvas.line([(-5.0, 9.0)], pen);
        assert_eq!(canvas.row(0), "⠁ ⡠⠊");
    }
}
