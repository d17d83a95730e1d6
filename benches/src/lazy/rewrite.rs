//! A guest that rewrites its working set faster than the link carries it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use harness::network::{Network, SECOND};
use workload_guest::Options;

use crate::migration::{MIB, WORK, ms, of_switchover};
use crate::stop;
use crate::subject::thermocline::{Ending, Thermocline};
use crate::subject::{GuestSpec, Subject};
use crate::table::Row;

/// This part.
pub(super) const MODE: &str = "rewrite";
/// It is switched over after one round.
pub(super) const NOW: &str = "thermocline-now";
/// It is switched over once little is left, which is never.
pub(super) const PRE_COPY: &str = "thermocline-precopy";
/// The exit code that says so.
pub(super) const NOT_CONVERGING: f64 = 18.0;

/// What the link carries.
const MBIT: u32 = 400;
const WORKING_SET_MIB: u64 = 64;

/// Who is measured.
pub(super) fn subjects() -> Result<[Thermocline; 2]> {
    let paced = |name, more: &[&'static str]| anyhow::Ok(Thermocline::find("paced")?.with(name, more));
    Ok([
        paced(PRE_COPY, &["--max-rounds", "3", "--downtime-limit", "10"])?,
        paced(NOW, &["--switchover", "now", "--cold-rate", "0"])?,
    ])
}

/// Boots, lets the guest write as quickly as it can, and migrates it.
pub(super) fn measure(subject: &Thermocline) -> Result<Row> {
    let workload = Options { working_set: WORKING_SET_MIB * MIB, rate: 0, writes: 100, ..Options::default() };
    let machine = GuestSpec { mib: 2 * WORKING_SET_MIB, workload };
    let network = Network::with_rate(MBIT)?;
    let folder = tempfile::Builder::new().prefix("thermocline-bench-").tempdir()?;
    let source = subject.run_behind(&network.prefix(0), folder.path(), &machine)?;
    source.console.ready()?;
    let listen = format!("tcp:{SECOND}:0");
    let place = (folder.path(), "destination");
    let destination = subject.receive_behind(&network.prefix(1), &listen, place, &machine)?;
    stop::sleep(WORK)?;
    let bits = (WORKING_SET_MIB * MIB * 8) as f64;
    let mut values = BTreeMap::from([("link_ms", bits / f64::from(MBIT) / 1000.0)]);
    let (owner, code) = match subject.begin(&source, &destination)?.finish(&mut || Ok(()))? {
        Ending::Migrated(migrated) => {
            values.extend(of_switchover(&migrated));
            values.extend([("downtime_ms", ms(migrated.downtime)), ("total_ms", ms(migrated.total))]);
            (&destination, 0)
        }
        Ending::Failed(code, why) => (&source, code.with_context(|| format!("the client was killed: {why}"))?),
    };
    let all = owner.console.check()?;
    ensure!(all.errors == 0, "{} pages are not what the guest wrote", all.errors);
    values.extend([("exit_code", f64::from(code)), ("guest_errors", all.errors as f64)]);
    Ok(Row { subject: subject.name().to_owned(), mode: MODE.to_owned(), values })
}
