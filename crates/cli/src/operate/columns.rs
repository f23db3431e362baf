//! A table of texts, each column as wide as it has to be.

/// A column's name, and on which side its texts begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    /// Numbers end where those above and below end.
    pub is_number: bool,
}

impl Column {
    pub const fn text(name: &'static str) -> Column {
        Column { name, is_number: false }
    }

    pub const fn number(name: &'static str) -> Column {
        Column { name, is_number: true }
    }
}

/// The lines of a table, its names first. Columns in which nothing stands are left out.
pub fn table(columns: &[Column], rows: &[Vec<String>]) -> String {
    let has_content = |n: &usize| rows.iter().any(|row| !row[*n].is_empty());
    let shown: Vec<usize> = (0..columns.len()).filter(has_content).collect();
    let n_chars = |text: &str| text.chars().count();
    let width = |n: usize| {
        let cells = rows.iter().map(|row| n_chars(&row[n]));
        cells.max().unwrap_or(0).max(n_chars(columns[n].name))
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let names: Vec<String> = columns.iter().map(|column| column.name.into()).collect();
    let mut text = String::new();
    for row in std::iter::once(&names).chain(rows) {
        let cells = shown.iter().map(|&n| {
            let (cell, width) = (&row[n], widths[n]);
            match columns[n].is_number {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be_and_empty_ones_are_left_out() {
        let columns = [Column::text("name"), Column::text("tenant"), Column::number("step")];
        let row = |cells: [&str; 3]| cells.map(String::from).to_vec();
        let rows = [row(["größer", "", "7"]), row(["b", "", "1000"])];
        assert_eq!(table(&columns, &rows), "name    step\ngrößer     7\nb       1000\n");
    }
}
