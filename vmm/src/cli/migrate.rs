//! `thermocline migrate`

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;

use clap::Args;
use command_line::End;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::progress::Shown;
use super::{ApiSocket, MigrationOptions, table};
use crate::PROGRAM;
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
    /// Start it and do not wait for its end: prints its id as JSON, for `ctl migration` and `ctl wait-migration`.
    #[arg(long)]
    detach: bool,
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
        detach: arguments.detach,
        cold_rate: options.cold_rate,
    });
    cancel_when_interrupted(&arguments.api.api_socket)?;
    let mut shown = Shown::new(arguments.json);
    let answer = ask(&arguments.api.api_socket, &request, |progress| shown.show(progress));
    let mut output = shown.finish()?;
    match answer? {
        Answer::Migrated(report) if arguments.json => {
            Ok(output.print_json(&serde_json::json!({ "migrated": report }))?)
        }
        Answer::Migrated(report) => {
            let downtime = table::of_downtime(&report.downtime);
            let of_report = table::of_reports(&[(arguments.options.cold.into(), report, None)]);
            Ok(output.print(&format!("{of_report}\n{downtime}\n"))?)
        }
        Answer::Migration(status) => Ok(output.print_json(&serde_json::json!({ "migration": status }))?),
        other => Err(End::text(ExitCode::Failure, format!("the monitor answered {other:?} to a migration"))),
    }
}

/// The first Ctrl-C cancels the migration, which goes on without whoever started it otherwise; its end is waited for. The
/// second one ends this process alone.
fn cancel_when_interrupted(api: &Path) -> Result<(), End> {
    let failed = |e: io::Error| End::new(ExitCode::Failure, e);
    let (mut signals, sender) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, sender.try_clone().map_err(failed)?).map_err(failed)?;
    }
    let api = api.to_owned();
    let thread = std::thread::Builder::new().name("interrupts".into());
    thread
        .spawn(move || {
            let mut wait = || signals.read_exact(&mut [0]);
            if wait().is_ok() {
                if let Err(e) = ask(&api, &Request::CancelMigration {}, |_| {}) {
                    PROGRAM.say(format_args!("{e}; interrupt again to leave it alone"));
                }
                if wait().is_ok() {
                    let _ = signal_hook::low_level::emulate_default_handler(SIGINT);
                }
            }
        })
        .map_err(failed)?;
    Ok(())
}
