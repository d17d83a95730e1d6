//! A picture of a residency map in the terminal.

use std::io::IsTerminal;

use memory_agent::Counts;

/// Cells in a line of a picture.
pub(super) const WIDTH: usize = 64;
/// Cells in a picture.
pub(super) const CELLS: u32 = 4 * WIDTH as u32;

/// What the marks mean.
pub(super) const LEGEND: &str = "█ resident   ░ swapped   · hole   ▒ both";

/// One mark a cell, [`WIDTH`] marks a line; in colour where standard output is a terminal.
pub(super) fn draw(cells: &[Counts]) -> String {
    let colour = std::io::stdout().is_terminal();
    cells.chunks(WIDTH).map(|line| line.iter().map(|cell| mark(cell, colour)).collect::<String>() + "\n").collect()
}

fn mark(cell: &Counts, colour: bool) -> String {
    let (mark, code) = match (cell.resident, cell.swapped) {
        (0, 0) => ("·", "90"),
        (0, _) => ("░", "34"),
        // A few strays among many do not change what a part of memory is.
        (resident, swapped) if resident >= swapped * 16 => ("█", "31"),
        (resident, swapped) if swapped >= resident * 16 => ("░", "34"),
        _ => ("▒", "35"),
    };
    if colour { format!("\x1b[{code}m{mark}\x1b[0m") } else { mark.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_what_most_of_it_is() {
        let cell = |hole, resident, swapped| mark(&Counts { hole, resident, swapped }, false);
        assert_eq!(cell(9, 0, 0), "·");
        assert_eq!(cell(9, 1, 0), "█");
        assert_eq!(cell(0, 1, 100), "░");
        assert_eq!(cell(0, 50, 50), "▒");
    }
}
