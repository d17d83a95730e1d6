//! A frame that does not come while both sides wait: after half a minute each takes the other for dead.
//!
//! All at once, because each takes that half minute.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use thermocline_tests::owner::{gone_without_guest, source_only, source_paused};
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], both_sides_notice_silence);
}

use Way::{Back, There};

const GUEST: Workload = Workload { memory: 32, working_set: 2, cold: 2, rate: 200, writes: 50, cpus: 1 };
/// The limit that `docs/protocol.md` promises, and some.
const LIMIT: Duration = Duration::from_secs(40);

fn both_sides_notice_silence() -> Result<()> {
    let dropped = [
        (There, "offer"),
        (Back, "accept"),
        (There, "round end"),
        (Back, "round done"),
        (There, "state"),
        (Back, "ready"),
        (There, "commit"),
    ];
    let failures: Vec<String> = std::thread::scope(|scope| {
        let mut cases: Vec<_> =
            dropped.into_iter().map(|(way, frame)| (frame, scope.spawn(move || nothing_comes(way, frame)))).collect();
        cases.push(("a destination that is stopped", scope.spawn(stopped)));
        let ended = cases.into_iter().map(|(name, case)| (name, case.join()));
        ended
            .filter_map(|(name, result)| match result {
                Ok(Ok(())) => None,
                Ok(Err(e)) => Some(format!("{name}: {e:#}")),
                Err(_) => Some(format!("{name}: panicked")),
            })
            .collect()
    });
    ensure!(failures.is_empty(), "{} cases:\n  {}", failures.len(), failures.join("\n  "));
    Ok(())
}

fn nothing_comes(way: Way, frame: &'static str) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&GUEST)?;
    let destination = sandbox.receive(&GUEST)?;
    let fault = Fault { way, frame, which: Which::Nth(0), wrong: Wrong::Drop };
    let proxy = Proxy::with_fault(&destination.address, fault)?;
    let migration = source.migrate(&proxy.address, &How::usual())?;
    proxy.wait_struck()?;
    let there = destination.machine.process.wait_within(LIMIT).context("the destination")?;
    let ended = migration.end().context("at the source")?;
    // Unless the destination gives up first and says that it does not run the guest, the source cannot know.
    if frame == "commit" && ended.code() == Some(20) {
        ended.sentence(20)?;
        source_paused(&source)?;
        there.sentence(16)?;
        return gone_without_guest(&destination.machine, &there);
    }
    // Who gives up first says so, and the other, who is waiting for the frame that was dropped, hears it out of order.
    let mut codes = [ended.code(), there.code()].map(Option::unwrap_or_default);
    ended.sentence(codes[0])?;
    let sentence = source_only(&mut source, &destination.machine, codes[1])?;
    codes.sort_unstable();
    ensure!([[16, 16], [16, 17]].contains(&codes), "codes {codes:?}: {ended:?} and {sentence:?}");
    Ok(())
}

/// SIGSTOP: the connection stays, and nobody is behind it.
fn stopped() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&GUEST)?;
    let destination = sandbox.receive(&GUEST)?;
    destination.machine.process.signal(Signal::STOP)?;
    let migration = source.migrate(&destination.address, &How::usual())?;
    let ended = migration.process.wait_within(LIMIT)?;
    ended.sentence(16)?;
    destination.machine.process.signal(Signal::CONT)?;
    source_only(&mut source, &destination.machine, 16).map(drop)
}
