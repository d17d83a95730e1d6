//! `thermocline pages`

use std::fmt::Write;

use clap::Args;
use command_line::{End, print, print_json};
use memory_agent::{ByteSize, picture};

use super::ApiSocket;
use crate::control::client::ask;
use crate::control::{Answer, PagesReport, Request};
use crate::exit::ExitCode;

/// Options of `thermocline pages`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    api: ApiSocket,
    /// Show what the memory agent saw last, in place of looking now: at once, however large the guest is.
    #[arg(long)]
    from_agent: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let request = Request::Pages { cells: picture::CELLS, from_agent: arguments.from_agent };
    match ask(&arguments.api.api_socket, &request, |_| {})? {
        Answer::Pages(pages) if arguments.json => Ok(print_json(&pages)?),
        Answer::Pages(pages) => Ok(print(&text(&pages, arguments.from_agent))?),
        other => Err(End::text(ExitCode::Failure, format!("the monitor answered {other:?}"))),
    }
}

fn text(pages: &PagesReport, from_agent: bool) -> String {
    let mut text = format!("{}{}\n", picture::draw(&pages.cells), picture::LEGEND);
    let counts = pages.counts;
    for (name, count) in [("resident", counts.resident), ("swapped", counts.swapped), ("hole", counts.hole)] {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name:>9} {count:>9} pages  {}", ByteSize(count * memory_agent::PAGE_SIZE));
    }
    if from_agent {
        let _ = writeln!(text, "as the memory agent saw it, {:.1} s ago at most", pages.age_ms as f64 / 1000.0);
    }
    text
}
