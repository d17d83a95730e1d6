//! A busy guest moves between two hosts and notices nothing: its disk, its connection, its memory and its clocks, checked from
//! inside all the time (`guest-check busy`), and both hosts stay as warm and as cold as they were.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::network::{FIRST, Network, SECOND};
use linux_guest::value;
use memory_agent::Counts;
use thermocline::control::client::ask;
use thermocline::control::{Answer, Request};
use thermocline::migration::progress::Report;
use thermocline_tests::linux::{LinuxGuest, LinuxMachine, Monitor};
use thermocline_tests::residency::{GuestMemory, must_be_near};
use thermocline_tests::stream_peer::StreamPeer;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::trials::{give_more_time, unless_the_emulator_fails};
use thermocline_tests::{How, Migration, Sandbox, Trials, trial};

use crate::peer::complains_no_more_than_on_qemu;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap, Zram], migrates_paced);
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap, Zram], migrates_eager);
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap, Zram], migrates_lazy);
    trial!(trials, [Kvm, LinuxGuest, Qemu, Root, Tap, Zram], migrates_now);
}

/// Of the guest, MiB.
const MEMORY: u64 = 160;
const TAP: &str = "tap0";
/// Where the stream's other end is, and the guest.
const PEER: [u8; 4] = [172, 31, 9, 1];
const PEER_PORT: u16 = 7007;
const GUEST: &str = "172.31.9.2/24";
/// There, back, and there.
const MOVES: usize = 3;
/// Percent by which a host may differ from what it was.
const NEAR: u64 = 2;
/// How long what the guest works with may take to come back after all of it has been paged out.
const SETTLE_LIMIT: Duration = Duration::from_secs(90);
const SETTLE_LOOK: Duration = Duration::from_secs(3);
/// How much every check has to get done after a move, by the words of its news, before the next.
const GOES_ON: [(&str, u64); 6] =
    [("records", 10), ("reads", 10), ("sent", 100_000), ("received", 100_000), ("pages", 100), ("clocks", 1000)];

fn migrates_paced() -> Result<()> {
    there_and_back(&["--cold", "paced", "--window", "4MiB"], |Moved { before, report, after }| {
        let source = report.source;
        // Of all that it has: the guest goes on working, and wakes some of it meanwhile.
        let room = (before.resident + before.swapped) * NEAR / 100;
        let near = |what: &str, found: u64, expected: u64| {
            ensure!(found.abs_diff(expected) <= room, "{what}: {found} pages, not {expected} within {room}");
            Ok(())
        };
        near("source resident afterwards", source.resident_after, before.resident)?;
        near("source swapped afterwards", source.swapped_after, before.swapped)?;
        near("destination resident", after.resident, before.resident)?;
        // Pages of zeros become holes.
        near("destination swapped", after.swapped + report.pages.zero, before.swapped)
    })
}

fn migrates_eager() -> Result<()> {
    there_and_back(&["--cold", "eager"], |Moved { before, report, after }| {
        must_be_near("destination resident", after.resident, before.resident + before.swapped, NEAR)?;
        must_be_near("source swapped afterwards", report.source.swapped_after, 0, NEAR)
    })
}

fn migrates_lazy() -> Result<()> {
    there_and_back(&["--cold", "lazy", "--cold-rate", "0"], post_copy_leaves_cold_what_was)
}

fn migrates_now() -> Result<()> {
    there_and_back(&["--switchover", "now", "--cold-rate", "0"], post_copy_leaves_cold_what_was)
}

/// What the guest has touched meanwhile is awake at the destination; the rest is as it was at the source, which is left with
/// nothing.
fn post_copy_leaves_cold_what_was(Moved { before, report, after }: &Moved) -> Result<()> {
    let post_copy = report.post_copy.context("no post-copy")?;
    let touched = post_copy.faults.context("no word of faults")?.count;
    ensure!(report.swap_ins_before_switchover * 50 <= before.swapped, "the source woke cold pages: {report:?}");
    let room = before.resident * NEAR / 100 + touched;
    ensure!(
        after.resident.abs_diff(before.resident) <= room && after.swapped.abs_diff(before.swapped) <= room,
        "{before:?} became {after:?}, {touched} pages were touched: {report:?}"
    );
    Ok(())
}

/// One move: guest RAM at the source right before it, and at the destination right behind it.
struct Moved {
    before: Counts,
    report: Report,
    after: Counts,
}

/// Boots a guest that checks everything, moves it there and back, and has it say what it found.
fn there_and_back(how: &[&str], residency: fn(&Moved) -> Result<()>) -> Result<()> {
    let attempt = || {
        let hosts = Hosts::new()?;
        let (mut here, peer) = hosts.boot()?;
        for time in 0..MOVES {
            give_more_time();
            let (there, moved) = hosts.migrate(&here, (time + 1) % 2, how).with_context(|| format!("move {time}"))?;
            println!("{}", moved.line(time));
            println!("busy: {}", goes_on(&there, &peer).with_context(|| format!("after move {time}"))?);
            residency(&moved).with_context(|| format!("move {time}"))?;
            here = there;
        }
        let peer = peer.end()?;
        let found = here.passes("busy")?;
        println!("busy: {found}");
        let by_guest = (count(&found, "sent"), count(&found, "received"));
        ensure!(by_guest == (Some(peer.received), Some(peer.sent)), "{peer:?} went through, by the guest {found}");
        complains_no_more_than_on_qemu(&here)?;
        here.powers_off()?;
        Ok(())
    };
    undisturbed(|| unless_the_emulator_fails(attempt))
}

/// Two hosts with a network between them, another for guests, and disks that both see.
struct Hosts {
    sandbox: Sandbox,
    network: Network,
    machine: LinuxMachine,
}

impl Hosts {
    fn new() -> Result<Self> {
        let network = Network::new()?;
        let peer = IpAddr::from(PEER);
        network.add_guest_network(TAP, &format!("{peer}/24"))?;
        let machine = LinuxMachine { memory: MEMORY, ..LinuxMachine::full(Monitor::Thermocline, TAP, GUEST) };
        Ok(Self { sandbox: Sandbox::new()?, network, machine })
    }

    /// A guest on the first host that does all checks, three quarters of it asleep; and its peer, there too.
    fn boot(&self) -> Result<(LinuxGuest, StreamPeer)> {
        let address = SocketAddr::from((PEER, PEER_PORT));
        let network = &self.network;
        let peer = StreamPeer::listen(address, || network.enter(0))?;
        let checks = [&format!("busy:{address}"), "dmesg", "poweroff"];
        let guest = self.machine.boot_behind(&self.network.prefix(0), &self.sandbox, &checks)?;
        guest.says("busy", "records=")?;
        println!("busy: {}", goes_on(&guest, &peer)?);
        Ok((guest, peer))
    }

    /// Moves the guest to this host, whoever has it; all that it does not work with asleep.
    fn migrate(&self, here: &LinuxGuest, to: usize, how: &[&str]) -> Result<(LinuxGuest, Moved)> {
        let before = sleep_all_but_the_working_set(here)?;
        let listen = format!("tcp:{}:0", [FIRST, SECOND][to]);
        let prefix = self.network.prefix(to);
        let (there, address) = self.machine.receive_behind(&prefix, &self.sandbox, &listen, here.disk.as_deref())?;
        println!("asleep: {before:?}");
        let report = Migration::start(&here.control, &address, &How::with(how))?.succeeds()?.report;
        let after = GuestMemory::of_process(&there.process)?.counts()?;
        ensure!(here.process.wait()?.code() == Some(0), "the source failed");
        Ok((there, Moved { before, report, after }))
    }
}

/// Pages out all of the guest, and waits until what it works with has come back; guest RAM as it is then.
fn sleep_all_but_the_working_set(guest: &LinuxGuest) -> Result<Counts> {
    match ask(&guest.control, &Request::PageOut { ranges: None }, |_| {})? {
        Answer::PageOut(_) => {}
        other => bail!("{other:?} to page-out"),
    }
    let memory = GuestMemory::of_process(&guest.process)?;
    let deadline = Instant::now() + SETTLE_LIMIT;
    let mut last = memory.counts()?;
    loop {
        std::thread::sleep(SETTLE_LOOK);
        let now = memory.counts()?;
        if now.resident.abs_diff(last.resident) * 200 <= now.resident {
            // The rest of its pages are holes.
            ensure!(now.swapped * 4 >= (now.resident + now.swapped) * 3, "less than three quarters sleep: {now:?}");
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "what the guest works with does not settle: {last:?}, then {now:?}");
        last = now;
    }
}

/// A number among the guest's words.
fn count(words: &str, name: &str) -> Option<u64> {
    value(words, name)?.parse().ok()
}

/// Waits until each check has got something more done, and bytes have gone both ways; how far it is.
fn goes_on(guest: &LinuxGuest, peer: &StreamPeer) -> Result<String> {
    let begun = peer.so_far();
    let mut first: Option<String> = None;
    let words = guest
        .says_next("busy", |words| {
            let Some(first) = &first else {
                first = count(words, "clocks").map(|_| words.to_owned());
                return None;
            };
            let done = |(name, least): &(&str, u64)| Some(count(words, name)? >= count(first, name)? + least);
            GOES_ON.iter().all(|word| done(word) == Some(true)).then(|| words.to_owned())
        })
        .with_context(|| format!("something stands still; the guest began with {first:?}"))?;
    let now = peer.so_far();
    ensure!(now.received > begun.received && now.sent > begun.sent, "nothing goes through: {begun:?} then {now:?}");
    ensure!(!peer.has_ended(), "the stream has ended");
    Ok(words)
}

impl Moved {
    fn line(&self, time: usize) -> String {
        let Self { before, report, after } = self;
        let source = report.source;
        let pages = |counts: &Counts| format!("{}/{}/{}", counts.resident, counts.swapped, counts.hole);
        format!(
            "move {time}: {} ms, downtime {} ms, {} rounds; resident/swapped/holes {} at the source before, {} there behind it; \
             source resident {} then {}, swapped {} then {}; faults {:?}",
            report.total_ms,
            report.downtime_us / 1000,
            report.rounds,
            pages(before),
            pages(after),
            source.resident_before,
            source.resident_after,
            source.swapped_before,
            source.swapped_after,
            report.post_copy.and_then(|post_copy| post_copy.faults).map(|faults| faults.count),
        )
    }
}
