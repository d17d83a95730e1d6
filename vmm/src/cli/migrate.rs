//! `thermocline migrate`

use clap::Args;
use command_line::End;

use super::progress::Shown;
use super::{ApiSocket, MigrationOptions, table};
use crate::control::client::ask;
use crate::control::{Answer, MigrateRequest, Request};
use crate::exit::ExitCode;

/// Options of `thermocline migrate`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    api: ApiSocket,
    /// Where to: `tcp:HOST:PORT` or `unix:PATH`, where `thermocline receive` listens.
    #[arg(long, value_name = "ADDRESS")]
    to: String,
    #[command(flatten)]
    options: MigrationOptions,
    /// Leave the source process, with the guest's memory and its guest stopped for good, until `thermocline ctl quit`.
    #[arg(long)]
    stay: bool,
    /// Print progress and result as JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let options = &arguments.options;
    let request = Request::Migrate(MigrateRequest {
        to: arguments.to.clone(),
        cold: options.cold.into(),
        window: options.window,
        downtime_limit_ms: options.downtime_limit,
        max_rounds: options.max_rounds,
        stay: arguments.stay,
        switchover: options.switchover.into(),
        cold_rate: options.cold_rate,
    });
    let mut shown = Shown::new(arguments.json);
    let answer = ask(&arguments.api.api_socket, &request, |progress| shown.show(progress));
    let mut output = shown.finish()?;
    match answer? {
        Answer::Migrated(report) if arguments.json => {
            Ok(output.print_json(&serde_json::json!({ "migrated": report }))?)
        }
        Answer::Migrated(report) => {
            Ok(output.print(&format!("{}\n", table::of_reports(&[(arguments.options.cold.into(), report, None)])))?)
        }
        other => Err(End::text(ExitCode::Failure, format!("the monitor answered {other:?} to a migration"))),
    }
}
