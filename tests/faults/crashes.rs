//! Processes that die at moments nobody chose, with no proxy between them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use thermocline::migration::progress::Phase;
use thermocline_tests::owner::{destination_only, source_paused};
use thermocline_tests::random::Random;
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], the_destination_killed_at_any_moment);
    trial!(trials, [Kvm], the_source_killed_at_any_moment);
    trial!(trials, [Kvm, Root, Zram], the_destination_killed_in_each_phase);
}

const GUEST: Workload = Workload { memory: 64, working_set: 16, cold: 24, rate: 5000, writes: 50, cpus: 1 };
const TIMES: usize = 8;
/// About what such a migration takes.
const SPAN_US: u64 = 150_000;

fn the_destination_killed_at_any_moment() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&GUEST)?;
    let mut random = Random::new(2);
    for time in 0..TIMES {
        let moment = Duration::from_micros(random.below(SPAN_US));
        let destination = sandbox.receive(&GUEST)?;
        let migration = source.migrate(&destination.address, &How::usual())?;
        std::thread::sleep(moment);
        destination.machine.process.kill();
        let ended = migration.end()?;
        let context = || format!("time {time}, killed after {moment:?}");
        match ended.code() {
            // It ran there, and died with its monitor.
            Some(0) => source = sandbox.boot(&GUEST)?,
            Some(20) => {
                source_paused(&source).with_context(context)?;
                source = sandbox.boot(&GUEST)?;
            }
            // Killed before or after the connection came about.
            code => {
                let code = code.filter(|code| [10, 16].contains(code)).with_context(|| format!("{ended:?}"))?;
                ended.sentence(code).with_context(context)?;
                destination.machine.process.wait()?;
                destination.machine.console.must_be_silent().with_context(context)?;
                source.must_go_on().with_context(context)?;
            }
        }
    }
    let mut good = sandbox.receive(&GUEST)?;
    source.migrate(&good.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut good.machine)
}

fn the_source_killed_at_any_moment() -> Result<()> {
    let mut random = Random::new(3);
    for time in 0..TIMES {
        let sandbox = Sandbox::new()?;
        let moment = Duration::from_micros(random.below(SPAN_US));
        let source = sandbox.boot(&GUEST)?;
        let destination = sandbox.receive(&GUEST)?;
        let mut there = destination.machine;
        let migration = source.migrate(&destination.address, &How::usual())?;
        migration.wait_for_phase(Phase::Hot)?;
        std::thread::sleep(moment);
        source.process.kill();
        source.process.wait()?;
        let context = || format!("time {time}, killed after {moment:?}");
        // One of the two: it never ran there, or it runs there and is whole.
        let ended = thermocline_tests::console::eventually("the destination knows", || {
            Ok(there.process.has_ended()? || !there.console.output().is_empty())
        });
        ended.with_context(context)?;
        if there.process.has_ended()? {
            there.process.wait()?.sentence(16).with_context(context)?;
            there.console.must_be_silent().with_context(context)?;
        } else {
            there.must_go_on().with_context(context)?;
        }
    }
    Ok(())
}

fn the_destination_killed_in_each_phase() -> Result<()> {
    for phase in [Phase::Hot, Phase::Cold, Phase::Converging, Phase::Switchover, Phase::PagingOut] {
        let sandbox = Sandbox::new()?;
        let mut source = sandbox.boot(&GUEST)?;
        source.page_out_cold(&source.console.ready()?)?;
        let destination = sandbox.receive(&GUEST)?;
        let migration = source.migrate(&destination.address, &How::with(&["--window", "1MiB"]))?;
        migration.wait_for_phase(phase)?;
        destination.machine.process.kill();
        let ended = migration.end()?;
        destination.machine.process.wait()?;
        match ended.code() {
            // By the time the signal arrived the guest was there.
            Some(0) => ensure!(source.process.wait()?.code() == Some(0), "{phase:?}"),
            Some(20) => source_paused(&source).with_context(|| format!("{phase:?}"))?,
            _ => {
                ended.sentence(16).with_context(|| format!("{phase:?}"))?;
                ensure!(phase != Phase::PagingOut, "{ended:?} though it ran there");
                destination.machine.console.must_be_silent()?;
                source.must_go_on().with_context(|| format!("{phase:?}"))?;
            }
        }
    }
    Ok(())
}
