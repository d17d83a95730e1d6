//! `thermocline doctor`

use clap::Args;
use comfy_table::presets::NOTHING;
use comfy_table::{Cell, Color, ContentArrangement, Table};
use command_line::{End, print_result};

use crate::doctor::{self, Finding, State};
use crate::exit::ExitCode;

/// Options of `thermocline doctor`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let diagnosis = doctor::examine();
    let sentence = &diagnosis.verdict.sentence;
    let mut text = if arguments.json {
        format!("{}\n", serde_json::json!(diagnosis))
    } else {
        format!("{}\n\n", table(&diagnosis.findings).trim_fmt())
    };
    if !arguments.json && diagnosis.verdict.guests {
        text += &format!("{sentence}\n");
    }
    print_result(&text)?;
    // The sentence comes last in any case: here as what went wrong.
    if diagnosis.verdict.guests { Ok(()) } else { Err(End::text(ExitCode::Failure, sentence.clone())) }
}

/// A line a finding, grouped by area. In a terminal long consequences are wrapped; elsewhere a finding stays one line.
fn table(findings: &[Finding]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    let mut area = None;
    for finding in findings {
        let heading =
            if area.replace(finding.area) == Some(finding.area) { String::new() } else { finding.area.to_string() };
        let (mark, colour) = match finding.state {
            State::Ok => ("✓", Color::Green),
            State::Limited => ("!", Color::Yellow),
            State::Missing => ("✗", Color::Red),
        };
        table.add_row([
            Cell::new(heading),
            Cell::new(mark).fg(colour),
            Cell::new(&finding.name),
            Cell::new(&finding.value),
            Cell::new(&finding.consequence),
        ]);
    }
    table
}
