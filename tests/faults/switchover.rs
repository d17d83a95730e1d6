//! Faults around the moment at which the guest changes hands. Whatever breaks, one side runs it, or none until a person
//! who has looked at the destination says so.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use thermocline::control::RunState;
use thermocline_tests::owner::{destination_only, gone_without_guest, source_only, source_paused};
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::{How, Machine, Migration, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], commit_lost_on_the_way);
    trial!(trials, [Kvm], commit_garbled);
    trial!(trials, [Kvm], commit_repeated);
    trial!(trials, [Kvm], ready_repeated);
    trial!(trials, [Kvm], running_lost_on_the_way);
    trial!(trials, [Kvm], settled_lost_on_the_way);
    trial!(trials, [Kvm], the_source_killed_after_commit);
    trial!(trials, [Kvm], the_source_killed_before_commit);
    trial!(trials, [Kvm], the_destination_killed_before_commit);
    trial!(trials, [Kvm], the_destination_killed_after_commit);
    trial!(trials, [Kvm], the_source_interrupted_while_it_holds_the_guest);
}

use Way::{Back, There};

const GUEST: Workload = Workload { memory: 48, working_set: 8, cold: 16, rate: 2000, writes: 50, cpus: 1 };

/// A migration through a proxy that has just done its fault.
struct Struck {
    sandbox: Sandbox,
    source: Machine,
    destination: Machine,
    migration: Migration,
    proxy: Proxy,
}

fn strike(way: Way, frame: &'static str, wrong: Wrong) -> Result<Struck> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&GUEST)?;
    let destination = sandbox.receive(&GUEST)?;
    let proxy = Proxy::with_fault(&destination.address, Fault { way, frame, which: Which::Nth(0), wrong })?;
    let migration = source.migrate(&proxy.address, &How::usual())?;
    proxy.wait_struck()?;
    Ok(Struck { sandbox, source, destination: destination.machine, migration, proxy })
}

/// Lets the source's guest go on, which nobody else runs, and migrates it after all.
fn forced_to_go_on(sandbox: &Sandbox, mut source: Machine) -> Result<()> {
    let (forced, _) = source.ctl(&["resume", "--force"])?;
    ensure!(forced.code() == Some(0), "{forced:?}");
    source.must_go_on()?;
    let mut good = sandbox.receive(&GUEST)?;
    source.migrate(&good.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut good.machine)
}

fn commit_lost_on_the_way() -> Result<()> {
    for wrong in [Wrong::CutBefore, Wrong::CutInside, Wrong::ResetBefore] {
        let struck = strike(There, "commit", wrong)?;
        let sentence = struck.migration.fails_at_once(20)?;
        ensure!(sentence.contains("resume --force"), "{sentence:?} does not say what to do");
        source_paused(&struck.source)?;
        let ended = struck.destination.process.wait()?;
        ended.sentence(16)?;
        gone_without_guest(&struck.destination, &ended)?;
        // Nor may it be given to a third one before somebody has looked.
        let third = struck.sandbox.receive(&GUEST)?;
        let refused = struck.source.migrate(&third.address, &How::usual())?.fails(1)?;
        ensure!(refused.contains("handed over"), "{refused:?}");
        third.machine.console.must_be_silent()?;
        forced_to_go_on(&struck.sandbox, struck.source).with_context(|| format!("{wrong:?}"))?;
    }
    Ok(())
}

/// The destination says that it has not understood: then it does not run the guest, and the source knows.
fn commit_garbled() -> Result<()> {
    for wrong in [Wrong::FlipHeader, Wrong::FlipPayload] {
        let mut struck = strike(There, "commit", wrong)?;
        struck.migration.fails_at_once(17)?;
        source_only(&mut struck.source, &struck.destination, 17)?;
        let mut good = struck.sandbox.receive(&GUEST)?;
        struck.source.migrate(&good.address, &How::usual())?.succeeds()?;
        destination_only(&struck.source, &mut good.machine)?;
    }
    Ok(())
}

fn commit_repeated() -> Result<()> {
    let mut struck = strike(There, "commit", Wrong::Repeat)?;
    struck.migration.succeeds()?;
    destination_only(&struck.source, &mut struck.destination)
}

/// What the source can no longer take back, and cannot be sure of.
fn ready_repeated() -> Result<()> {
    let mut struck = strike(Back, "ready", Wrong::Repeat)?;
    struck.migration.fails_at_once(20)?;
    source_paused(&struck.source)?;
    struck.destination.must_go_on()
}

fn running_lost_on_the_way() -> Result<()> {
    for wrong in
        [Wrong::CutBefore, Wrong::CutInside, Wrong::ResetBefore, Wrong::FlipHeader, Wrong::FlipPayload, Wrong::Drop]
    {
        let mut struck = strike(Back, "running", wrong)?;
        struck.migration.fails_at_once(20).with_context(|| format!("{wrong:?}"))?;
        struck.destination.must_go_on().with_context(|| format!("{wrong:?}: the destination"))?;
        source_paused(&struck.source)?;
        // The person looks at the destination, and ends the one that is paused.
        let (quit, _) = struck.source.ctl(&["quit"])?;
        ensure!(quit.code() == Some(0), "{quit:?}");
        ensure!(struck.source.process.wait()?.code() == Some(0), "quit failed");
        struck.destination.console.must_run()?;
    }
    Ok(())
}

fn settled_lost_on_the_way() -> Result<()> {
    for wrong in [Wrong::CutBefore, Wrong::CutInside, Wrong::FlipPayload, Wrong::Drop, Wrong::Repeat] {
        let mut struck = strike(Back, "paged out", wrong)?;
        let migrated = struck.migration.succeeds().with_context(|| format!("{wrong:?}"))?;
        let told = migrated.report.destination.is_some();
        ensure!(told == (wrong == Wrong::Repeat), "{wrong:?}: {:?}", migrated.report);
        destination_only(&struck.source, &mut struck.destination).with_context(|| format!("{wrong:?}"))?;
    }
    Ok(())
}

fn the_source_killed_after_commit() -> Result<()> {
    let mut struck = strike(There, "commit", Wrong::HoldAfter)?;
    struck.source.process.kill();
    struck.source.process.wait()?;
    ensure!(struck.migration.end()?.code() != Some(0), "the client takes it for a success");
    drop(struck.proxy);
    struck.destination.must_go_on()?;
    // Any machine: it can go on from there.
    let mut next = struck.sandbox.receive(&GUEST)?;
    struck.destination.migrate(&next.address, &How::usual())?.succeeds()?;
    destination_only(&struck.destination, &mut next.machine)
}

fn the_source_killed_before_commit() -> Result<()> {
    for (way, frame, wrong) in [
        (There, "offer", Wrong::HoldAfter),
        (There, "pages", Wrong::HoldAfter),
        (There, "round end", Wrong::HoldAfter),
        (There, "state", Wrong::HoldAfter),
        (Back, "ready", Wrong::HoldBefore),
        (There, "commit", Wrong::HoldBefore),
    ] {
        let struck = strike(way, frame, wrong)?;
        struck.source.process.kill();
        struck.source.process.wait()?;
        drop(struck.proxy);
        let ended = struck.destination.process.wait().with_context(|| format!("at '{frame}'"))?;
        ended.sentence(16).with_context(|| format!("at '{frame}'"))?;
        gone_without_guest(&struck.destination, &ended)?;
    }
    Ok(())
}

fn the_destination_killed_before_commit() -> Result<()> {
    for (way, frame, wrong) in [
        (There, "offer", Wrong::HoldBefore),
        (Back, "accept", Wrong::HoldBefore),
        (There, "zeros", Wrong::HoldAfter),
        (There, "pages", Wrong::HoldAfter),
        (Back, "round done", Wrong::HoldBefore),
        (There, "state", Wrong::HoldAfter),
        (Back, "ready", Wrong::HoldBefore),
    ] {
        let mut struck = strike(way, frame, wrong)?;
        struck.destination.process.kill();
        struck.destination.process.wait()?;
        drop(struck.proxy);
        struck.migration.fails_at_once(16).with_context(|| format!("at '{frame}'"))?;
        struck.destination.console.must_be_silent()?;
        struck.source.must_go_on().with_context(|| format!("at '{frame}'"))?;
    }
    Ok(())
}

/// The destination had the guest, or may have had it: the source cannot know, and stays paused.
fn the_destination_killed_after_commit() -> Result<()> {
    for wrong in [Wrong::HoldBefore, Wrong::HoldAfter] {
        let struck = strike(There, "commit", wrong)?;
        struck.destination.process.kill();
        struck.destination.process.wait()?;
        drop(struck.proxy);
        struck.migration.fails_at_once(20).with_context(|| format!("{wrong:?}"))?;
        source_paused(&struck.source)?;
        // What the person sees is that the destination is no more.
        let (forced, _) = struck.source.ctl(&["resume", "--force"])?;
        ensure!(forced.code() == Some(0), "{forced:?}");
        ensure!(struck.source.status()?.state == RunState::Running, "{:?}", struck.source.status()?);
        struck.source.console.must_run()?;
    }
    Ok(())
}

fn the_source_interrupted_while_it_holds_the_guest() -> Result<()> {
    let mut struck = strike(There, "commit", Wrong::HoldAfter)?;
    struck.source.process.signal(Signal::TERM)?;
    struck.source.process.wait()?.sentence(130)?;
    drop(struck.proxy);
    struck.destination.must_go_on()
}
