//! `thermocline demo`: the newcomer's command. A guest with most of its memory swapped out is migrated to a second
//! process with `--cold paced` and back with `--cold eager`, and a table shows the difference.

mod guest;
mod output;
mod swap;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use command_line::{End, Output, OutputError};
use memory_agent::ByteSize;
use signal_hook::consts::{SIGINT, SIGTERM};

use self::guest::{Directory, Guest};
use self::output::{Migration, Shown};
use crate::control::{Answer, MigrateRequest, Request};
use crate::exit::ExitCode;
use crate::migration::plan::ColdPolicy;
use crate::migration::source::{DEFAULT_COLD_RATE, Switchover};

/// Options of `thermocline demo`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Guest memory; one eighth is worked on all the time, three quarters are written once and go cold.
    #[arg(long, short = 'm', value_name = "SIZE", default_value = "512MiB")]
    memory: ByteSize,
    /// How much of the cold memory may be resident at a time.
    #[arg(long, value_name = "SIZE", default_value = "16MiB")]
    window: ByteSize,
    /// Pages that the guest checks and partly rewrites, a second.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    rate: u64,
    /// Print one JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

/// How long the guest works before and between migrations.
const WORK: Duration = Duration::from_millis(700);

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).map_err(|e| End::new(ExitCode::Failure, e))?;
    }
    let result = play(arguments, &interrupted);
    if interrupted.load(Ordering::SeqCst) {
        return Err(End::text(ExitCode::Interrupted, "interrupted; everything that was set up is gone"));
    }
    Ok(result?)
}

fn play(arguments: &Arguments, interrupted: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let mut output = Output::default();
    let mut say = |text: &str| if arguments.json { Ok(()) } else { output.print(&format!("{text}\n")) };
    let eighth = arguments.memory.bytes() / 8 / memory_agent::PAGE_SIZE * memory_agent::PAGE_SIZE;
    // Declared first, so that it goes last: guests release what they have in swap before it is switched off.
    let swap = swap::prepare(arguments.memory);
    say(&swap.to_string())?;
    let directory = Directory::new()?;

    let kernel = format!("workload:working-set={eighth},cold={},rate={}", eighth * 6, arguments.rate);
    say(&format!(
        "launching a guest with {}: {} are worked on, {} written once and left",
        arguments.memory,
        ByteSize(eighth),
        ByteSize(eighth * 6)
    ))?;
    let memory = arguments.memory.bytes().to_string();
    let first = Guest::run(&directory, &["--memory", &memory, "--kernel", &kernel], Arc::clone(interrupted))?;
    let ready = first.ready()?;
    if swap.is_usable() {
        let ranges = ready.cold.iter().map(|extent| (extent.start, extent.len)).collect();
        match first.ask(&Request::PageOut { ranges: Some(ranges) })? {
            Answer::PageOut(report) => say(&format!("paged out {} of its pages", report.swapped))?,
            other => anyhow::bail!("the monitor answered {other:?} to page-out"),
        }
    }
    guest::wait(WORK, interrupted)?;

    let (second, there) = migrate(first, ColdPolicy::Paced, arguments, &directory, interrupted, &mut say)?;
    guest::wait(WORK, interrupted)?;
    let (third, back) = migrate(second, ColdPolicy::Eager, arguments, &directory, interrupted, &mut say)?;

    say("the guest checks every page it has")?;
    let checked = third.check_all()?;
    let report = third.latest_report()?;
    third.power_off()?;
    let shown = Shown::new(&checked, &report, vec![there, back]);
    if arguments.json { output.print_json(&shown.json()) } else { output.print(&shown.to_string()) }?;
    anyhow::ensure!(checked.errors == 0 && report.errors == 0, "the guest found errors in its memory");
    Ok(())
}

/// Migrates the guest to a new process and looks at both sides before and after.
fn migrate(
    from: Guest,
    cold: ColdPolicy,
    arguments: &Arguments,
    directory: &Directory,
    interrupted: &Arc<AtomicBool>,
    say: &mut dyn FnMut(&str) -> Result<(), OutputError>,
) -> anyhow::Result<(Guest, Migration)> {
    let to = Guest::receive(directory, Arc::clone(interrupted))?;
    from.reset_stall()?;
    let before = from.pages()?;
    let request = MigrateRequest {
        to: to.address()?,
        cold,
        window: arguments.window,
        downtime_limit_ms: 300,
        max_rounds: 50,
        detach: false,
        stay: true,
        switchover: Switchover::Converged,
        cold_rate: DEFAULT_COLD_RATE,
    };
    say(&format!("migrating it to process {} with --cold {}", to.pid(), output::name(cold)))?;
    let report = from.migrate(request, arguments.json)?;
    let source_after = from.pages()?;
    from.quit()?;
    let stall = to.stall_after_arrival()?;
    let destination_after = to.pages()?;
    let migration = Migration { report, stall, before, source_after, destination_after };
    Ok((to, migration))
}
