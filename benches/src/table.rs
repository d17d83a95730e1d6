//! Rows of measurements: medians over runs, as a table for people and as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde_json::{Map, Value};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// Its name in JSON, with the unit.
    pub(crate) key: &'static str,
    /// Its name in the table.
    pub(crate) heading: &'static str,
}

/// What one run of one subject gave.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    /// Who.
    pub(crate) subject: String,
    /// Doing what.
    pub(crate) mode: String,
    /// By key of the column; a column that does not apply is left out.
    pub(crate) values: BTreeMap<&'static str, f64>,
}

/// One row for each subject and mode, in the order they first came, with the median of each column.
pub(crate) fn medians(rows: &[Row]) -> Vec<Row> {
    let mut groups: Vec<(Row, BTreeMap<&'static str, Vec<f64>>)> = Vec::new();
    for row in rows {
        let found = groups.iter().position(|(group, _)| group.subject == row.subject && group.mode == row.mode);
        let index = found.unwrap_or_else(|| {
            groups.push((Row { values: BTreeMap::new(), ..row.clone() }, BTreeMap::new()));
            groups.len() - 1
        });
        for (key, value) in &row.values {
            groups[index].1.entry(*key).or_default().push(*value);
        }
    }
    let of_group = |(row, values): (Row, BTreeMap<_, Vec<f64>>)| {
        let values = values.into_iter().map(|(key, mut values)| (key, median(&mut values))).collect();
        Row { values, ..row }
    };
    groups.into_iter().map(of_group).collect()
}

/// The middle value; of an even number the mean of the two in the middle. There is one at least.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    low.midpoint(high)
}

/// The table: each value, and below it how many times the peer's it is; `is_peer` says whether another row is the first
/// one's peer.
pub(crate) fn table(columns: &[Column], rows: &[Row], is_peer: impl Fn(&Row, &Row) -> bool) -> Table {
    let used: Vec<_> = columns.iter().filter(|c| rows.iter().any(|row| row.values.contains_key(c.key))).collect();
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    table.set_header(["mode", "subject"].into_iter().chain(used.iter().map(|column| column.heading)));
    for row in rows {
        let peer = rows.iter().find(|other| is_peer(row, other)).filter(|other| *other != row);
        let cells = used.iter().map(|column| cell(row, peer, column.key));
        table.add_row([row.mode.clone(), row.subject.clone()].into_iter().chain(cells));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 0));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn cell(row: &Row, peer: Option<&Row>, key: &str) -> String {
    let Some(value) = row.values.get(key) else { return "-".to_owned() };
    let shown = if value.fract() == 0.0 || *value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") };
    match peer.and_then(|peer| peer.values.get(key)) {
        // Nothing is a multiple of nothing.
        Some(0.0) | None => shown,
        Some(of_peer) => {
            let ratio = value / of_peer;
            let ratio = if ratio >= 100.0 { format!("{ratio:.0}") } else { format!("{ratio:.2}") };
            format!("{shown}\n×{ratio}")
        }
    }
}

/// The rows as a list of flat objects.
pub(crate) fn json(columns: &[Column], rows: &[Row]) -> Value {
    let object = |row: &Row| {
        let mut object = Map::new();
        object.insert("subject".into(), row.subject.clone().into());
        object.insert("mode".into(), row.mode.clone().into());
        for column in columns {
            if let Some(value) = row.values.get(column.key) {
                let whole = value.fract() == 0.0;
                let number =
                    if whole { Value::from(*value as u64) } else { ((value * 1000.0).round() / 1000.0).into() };
                object.insert(column.key.into(), number);
            }
        }
        Value::Object(object)
    };
    rows.iter().map(object).collect()
}

/// Writes the rows to a file.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write_json(path: &Path, columns: &[Column], rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(&json(columns, rows))? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] =
        &[Column { key: "total_ms", heading: "total" }, Column { key: "swap_ins", heading: "ins" }];

    fn row(subject: &str, total: f64, ins: f64) -> Row {
        let values = BTreeMap::from([("total_ms", total), ("swap_ins", ins)]);
        Row { subject: subject.into(), mode: "cold".into(), values }
    }

    #[test]
    fn medians_are_taken_by_subject() {
        let rows = [row("a", 5.0, 1.0), row("b", 8.0, 0.0), row("a", 1.0, 2.0), row("b", 4.0, 0.0), row("a", 3.0, 9.0)];
        assert_eq!(medians(&rows), [row("a", 3.0, 2.0), row("b", 6.0, 0.0)]);
    }

    #[test]
    fn cells_tell_the_ratio_to_the_peer() {
        let (a, qemu) = (row("a", 5.0, 1.0), row("qemu", 20.0, 0.0));
        assert_eq!(cell(&a, Some(&qemu), "total_ms"), "5\n×0.25");
        assert_eq!(cell(&a, Some(&qemu), "swap_ins"), "1");
        assert_eq!(cell(&qemu, None, "total_ms"), "20");
        assert_eq!(cell(&a, Some(&qemu), "downtime_ms"), "-");
        assert_eq!(cell(&row("a", 0.25, 0.0), None, "total_ms"), "0.2");
    }

    #[test]
    fn json_is_flat() {
        let text = json(COLUMNS, &[row("a", 2.5, 7.0)]).to_string();
        assert_eq!(text, r#"[{"mode":"cold","subject":"a","swap_ins":7,"total_ms":2.5}]"#);
    }
}
