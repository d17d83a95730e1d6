//! Pictures of a residency map: in the terminal, and as SVG.

use std::fmt::Write;
use std::io::IsTerminal;

use crate::page_number::PageNumber;
use crate::page_state::Counts;
use crate::residency::Residency;

/// Cells in a line of a picture.
pub const WIDTH: usize = 64;
/// Cells in a picture.
pub const CELLS: u32 = 4 * WIDTH as u32;

/// What the marks mean.
pub const LEGEND: &str = "█ resident   ░ swapped   · hole   ▒ both";

/// The map in so many parts of equal size, in order.
pub fn cells<P: PageNumber>(residency: &Residency<P>, cells: u32) -> Vec<Counts> {
    let all = residency.pages();
    let share = |cell: u32| (u128::from(residency.len()) * u128::from(cell) / u128::from(cells.max(1))) as u64;
    let edge = |cell: u32| all.start + share(cell);
    (0..cells).map(|cell| residency.counts_in(edge(cell)..edge(cell + 1))).collect()
}

/// One mark a cell, [`WIDTH`] marks a line; in colour where standard output is a terminal.
pub fn draw(cells: &[Counts]) -> String {
    let colour = std::io::stdout().is_terminal();
    cells.chunks(WIDTH).map(|line| line.iter().map(|cell| mark(cell, colour)).collect::<String>() + "\n").collect()
}

/// The map as an SVG drawing of one square a cell, with a legend and the sums in numbers.
pub fn svg<P: PageNumber>(title: &str, residency: &Residency<P>) -> String {
    /// Cells each way, and the size of one.
    const SIDE: u32 = 96;
    const SQUARE: u32 = 8;
    const COLOURS: [(&str, &str); 3] = [("resident", "#c8553d"), ("swapped", "#2d6a9f"), ("hole", "#e9e4da")];
    let side = SIDE * SQUARE;
    let mut svg = String::new();
    let escaped = title.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // Writing to a String does not fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{side}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"14\">\n<title>{escaped}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>",
        side + 56,
    );
    let cells = cells(residency, SIDE * SIDE);
    for (row, line) in (0..).zip(cells.chunks(SIDE as usize)) {
        let mut column = 0;
        for run in line.chunk_by(|a, b| colour(a) == colour(b)) {
            let _ = writeln!(
                svg,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{SQUARE}\" fill=\"{}\"/>",
                column * SQUARE,
                row * SQUARE,
                run.len() as u32 * SQUARE,
                colour(&run[0]),
            );
            column += run.len() as u32;
        }
    }
    let counts = residency.counts();
    let _ = writeln!(svg, "<text x=\"4\" y=\"{}\">{escaped}</text>", side + 20);
    for (i, ((name, colour), pages)) in (0..).zip(COLOURS.iter().zip([counts.resident, counts.swapped, counts.hole])) {
        let x = 4 + i * 250;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"14\" fill=\"{colour}\" stroke=\"#888\"/>\
             <text x=\"{}\" y=\"{}\">{name}: {pages} pages</text>",
            side + 32,
            x + 20,
            side + 44,
        );
    }
    svg + "</svg>\n"
}

/// The mixture of the three colours by how many pages of the cell are in each state.
fn colour(cell: &Counts) -> String {
    let total = cell.total().max(1);
    let channel = |resident: u64, swapped: u64, hole: u64| {
        (cell.resident * resident + cell.swapped * swapped + cell.hole * hole) / total
    };
    let (red, green, blue) = (channel(0xc8, 0x2d, 0xe9), channel(0x55, 0x6a, 0xe4), channel(0x3d, 0x9f, 0xda));
    format!("#{red:02x}{green:02x}{blue:02x}")
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
    use crate::page_state::PageState;

    #[test]
    fn every_page_is_in_one_cell() {
        let mut residency = Residency::uniform(1000, PageState::Hole);
        residency.set(100..350, PageState::Swapped);
        let sum = cells(&residency, 7).into_iter().fold(Counts::default(), |sum, cell| sum + cell);
        assert_eq!(sum, residency.counts());
        assert!(cells(&residency, 0).is_empty());
    }

    #[test]
    fn a_drawing_says_what_it_shows() {
        let mut residency = Residency::uniform(96 * 96, PageState::Hole);
        residency.set(0..96, PageState::Resident);
        residency.set(96..97, PageState::Swapped);
        let svg = svg("a <b> & c", &residency);
        assert!(svg.contains("<title>a &lt;b&gt; &amp; c</title>") && svg.ends_with("</svg>\n"));
        assert!(svg.contains(r##"<rect x="0" y="0" width="768" height="8" fill="#c8553d"/>"##));
        assert!(svg.contains(r##"<rect x="0" y="8" width="8" height="8" fill="#2d6a9f"/>"##));
        assert!(svg.contains("resident: 96 pages"));
    }

    #[test]
    fn a_cell_is_what_most_of_it_is() {
        let cell = |hole, resident, swapped| mark(&Counts { hole, resident, swapped }, false);
        assert_eq!(cell(9, 0, 0), "·");
        assert_eq!(cell(9, 1, 0), "█");
        assert_eq!(cell(0, 1, 100), "░");
        assert_eq!(cell(0, 50, 50), "▒");
    }
}
