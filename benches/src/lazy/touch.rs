//! A guest that touches cold pages at the destination while they are outstanding.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use workload_guest::Command;

use crate::console::GuestConsole;
use crate::migration::{WORK, ms, of_faults};
use crate::peer::qemu::Qemu;
use crate::stop;
use crate::subject::thermocline::Thermocline;
use crate::subject::{Faults, GuestSpec, Subject};
use crate::table::Row;

/// This part.
pub(super) const MODE: &str = "touch";
/// Hardly anything is sent that the guest does not wait for.
pub(super) const SLOW: &str = "thermocline-lazy-slow";
/// The same, and some time passes from one touch to the next.
pub(super) const APART: &str = "thermocline-lazy-slow-apart";
/// Everything is sent as quickly as possible.
pub(super) const UNLIMITED: &str = "thermocline-lazy-unlimited";

/// Cold pages that the guest touches, chosen at random.
const TOUCHES: u64 = 2000;
/// The same, apart: each is a command of its own.
const TOUCHES_APART: u64 = 1000;
/// Fewer waits say nothing of the 99th percentile.
const LEAST: u64 = 300;

/// What the guest saw of its touches, by its own clock.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    pages: u64,
    took_us: u64,
    longest_us: u64,
    errors: u64,
}

/// What came of touching, by either clock.
struct Touching {
    seen: Seen,
    /// From its beginning to its end, by the host's.
    took: Duration,
    faults: Option<Faults>,
    /// Pages that are not what the guest wrote, of all.
    errors: u64,
}

/// Who is measured.
pub(super) fn subjects(qemu: &Qemu) -> Result<[Box<dyn Subject>; 4]> {
    let lazy = |name, rate| -> Result<Box<dyn Subject>> {
        Ok(Box::new(Thermocline::find("lazy")?.with(name, &["--cold-rate", rate])))
    };
    Ok([lazy(SLOW, "1MiB")?, lazy(APART, "1MiB")?, lazy(UNLIMITED, "0")?, Box::new(qemu.post_copy())])
}

/// Boots, pages out, migrates, touches, and then has the guest check every page, for which those that have not come yet
/// come at once.
pub(super) fn measure(subject: &dyn Subject, machine: &GuestSpec) -> Result<Row> {
    let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
    let source = subject.run(folder.path(), machine)?;
    let (_, ready) = source.console.ready()?;
    let destination = subject.receive(folder.path(), machine)?;
    source.ram()?.page_out(&ready.cold)?;
    stop::sleep(WORK)?;
    source.console.send(Command::ResetStall)?;
    let mut found = None;
    let migrated = subject.migrate(&source, &destination, &mut || {
        let started = Instant::now();
        let seen = touch(&destination.console, subject.name() == APART)?;
        let took = started.elapsed();
        let faults = subject.faults_so_far(&destination)?;
        let errors = destination.console.check()?.errors.max(seen.errors);
        found = Some(Touching { seen, took, faults, errors });
        Ok(())
    })?;
    let Touching { seen, took, faults, errors } = found.context("post-copy sent nothing")?;
    ensure!(errors == 0, "{errors} pages are not what the guest wrote");
    let mut values = BTreeMap::from([
        ("switchover_ms", ms(migrated.switchover)),
        ("downtime_ms", ms(migrated.downtime)),
        ("touch_mean_us", seen.took_us as f64 / seen.pages as f64),
        ("touch_longest_us", seen.longest_us as f64),
        ("touch_every_ms", ms(took) / seen.pages as f64),
        ("guest_errors", errors as f64),
    ]);
    if let Some(faults) = faults {
        ensure!(faults.count >= LEAST, "the guest waited for {} pages only: {faults:?}", faults.count);
        values.extend(of_faults(&faults));
    }
    Ok(Row { subject: subject.name().to_owned(), mode: MODE.to_owned(), values })
}

fn touch(console: &GuestConsole, apart: bool) -> Result<Seen> {
    let commands = if apart { vec![1; TOUCHES_APART as usize] } else { vec![TOUCHES] };
    commands.into_iter().try_fold(Seen::default(), |seen, pages| {
        let touched = console.touch_cold(pages)?;
        Ok(Seen {
            pages: seen.pages + touched.pages,
            took_us: seen.took_us + touched.took_us,
            longest_us: seen.longest_us.max(touched.longest_us),
            errors: seen.errors + touched.errors,
        })
    })
}
