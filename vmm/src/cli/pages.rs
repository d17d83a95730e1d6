//! `thermocline pages`

use clap::Args;
use memory_agent::{ByteSize, picture};

use super::{ApiSocket, End};
use crate::control::client::ask;
use crate::control::{Answer, Request};
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
        Answer::Pages(pages) if arguments.json => println!("{}", serde_json::json!(pages)),
        Answer::Pages(pages) => {
            print!("{}", picture::draw(&pages.cells));
            println!("{}", picture::LEGEND);
            let size = |pages: u64| ByteSize(pages * memory_agent::PAGE_SIZE);
            for (name, count) in
                [("resident", pages.counts.resident), ("swapped", pages.counts.swapped), ("hole", pages.counts.hole)]
            {
                println!("{name:>9} {count:>9} pages  {}", size(count));
            }
            if arguments.from_agent {
                println!("as the memory agent saw it, {:.1} s ago at most", pages.age_ms as f64 / 1000.0);
            }
        }
        other => return Err(End::text(ExitCode::Failure, format!("the monitor answered {other:?}"))),
    }
    Ok(())
}
