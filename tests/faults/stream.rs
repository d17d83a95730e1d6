//! One thing wrong with the stream, at every kind of frame and in both directions, while the source may still go on.
//!
//! A trial keeps one source through all its faults: what a failed migration leaves behind would show in the next.

use std::net::Shutdown;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use thermocline::migration::wire::message::receive_message;
use thermocline::migration::wire::{Accepted, FrameReader, FrameWriter, Message, preamble};
use thermocline_tests::console::eventually;
use thermocline_tests::owner::{destination_only, source_only};
use thermocline_tests::peer::Server;
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::random::Random;
use thermocline_tests::{How, Machine, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], every_kind_of_frame_is_tried);
    trial!(trials, [Kvm], cut_before_a_frame);
    trial!(trials, [Kvm], cut_inside_a_frame);
    trial!(trials, [Kvm], reset_before_a_frame);
    trial!(trials, [Kvm], a_bit_of_a_header_flipped);
    trial!(trials, [Kvm], a_bit_of_a_payload_flipped);
    trial!(trials, [Kvm], a_frame_repeated);
    trial!(trials, [Kvm], a_frame_dropped_and_others_behind_it);
    trial!(trials, [Kvm], a_bit_of_the_preamble_flipped);
    trial!(trials, [Kvm], a_unix_socket_whose_other_end_dies);
    trial!(trials, [Kvm], an_end_behind_a_full_window);
}

use Way::{Back, There};
use Which::{BeforeState, Nth};

/// A frame: direction, name, which of them.
type Site = (Way, &'static str, Which);

/// Frames before the source has given the guest away: nothing that happens to them can take it away.
const BEFORE_COMMIT: &[Site] = &[
    (There, "offer", Nth(0)),
    (Back, "accept", Nth(0)),
    (There, "zeros", Nth(0)),
    (There, "pages", Nth(0)),
    (There, "pages", Nth(20)),
    (There, "pages", BeforeState),
    (There, "round end", Nth(0)),
    (There, "round end", Nth(1)),
    (Back, "round done", Nth(0)),
    (Back, "round done", Nth(1)),
    (There, "state", Nth(0)),
    (Back, "ready", Nth(0)),
];

/// Writes enough that there is a second round, and a batch behind the guest's stop.
const BUSY: Workload = Workload { memory: 48, working_set: 16, cold: 16, rate: 20_000, writes: 100, cpus: 1 };

/// How often a frame that need not come is waited for.
const ATTEMPTS: usize = 6;

/// What the two sides end with.
struct Codes {
    source: i32,
    destination: i32,
}

/// Does one fault to a migration, which fails as it should and leaves the guest with the source. `false` when the guest
/// had written nothing at its stop, so that no pages came before its state, and the migration succeeded.
fn survives(sandbox: &Sandbox, source: &mut Machine, fault: Fault, codes: &Codes) -> Result<bool> {
    let destination = sandbox.receive(&BUSY)?;
    let proxy = Proxy::with_fault(&destination.address, fault)?;
    let migration = source.migrate(&proxy.address, &How::with(&["--downtime-limit", "2000"]))?;
    if fault.which == BeforeState && !proxy.struck()? {
        migration.succeeds()?;
        return Ok(false);
    }
    proxy.wait_struck()?;
    migration.fails_at_once(codes.source).context("at the source")?;
    source_only(source, &destination.machine, codes.destination)?;
    Ok(true)
}

/// The same fault at all sites, with one source, which migrates at the end. Every site is tried, whatever the others do.
fn survives_all(wrong: Wrong, sites: impl Iterator<Item = (Site, Codes)>) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&BUSY)?;
    let mut failures = Vec::new();
    for ((way, frame, which), codes) in sites {
        let fault = Fault { way, frame, which, wrong };
        let mut attempt = 1;
        loop {
            match survives(&sandbox, &mut source, fault, &codes) {
                Ok(true) => break,
                Ok(false) => ensure!(attempt < ATTEMPTS, "{fault}: no such frame in {ATTEMPTS} migrations"),
                Err(e) => {
                    failures.push(format!("{fault}: {e:#}"));
                    source = sandbox.boot(&BUSY)?;
                    break;
                }
            }
            attempt += 1;
            source = sandbox.boot(&BUSY)?;
        }
    }
    ensure!(failures.is_empty(), "{} faults:\n  {}", failures.len(), failures.join("\n  "));
    let mut destination = sandbox.receive(&BUSY)?;
    source.migrate(&destination.address, &How::with(&["--downtime-limit", "2000"]))?.succeeds()?;
    destination_only(&source, &mut destination.machine)
}

/// Pins the list of sites to what really travels.
fn every_kind_of_frame_is_tried() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = sandbox.boot(&BUSY)?;
    let mut destination = sandbox.receive(&BUSY)?;
    let proxy = Proxy::with_rate(&destination.address, u64::MAX)?;
    source.migrate(&proxy.address, &How::with(&["--downtime-limit", "2000"]))?.succeeds()?;
    destination_only(&source, &mut destination.machine)?;
    let handled = ["preamble", "commit", "running", "paged out"];
    for (way, seen) in [There, Back].into_iter().zip(proxy.seen()) {
        for name in seen {
            let tried = BEFORE_COMMIT.iter().any(|site| site.0 == way && site.1 == name) || handled.contains(&name);
            ensure!(tried, "frames of kind '{name}' ({way:?}) are tried by no trial");
        }
    }
    Ok(())
}

fn cut_before_a_frame() -> Result<()> {
    let codes = || Codes { source: 16, destination: 16 };
    survives_all(Wrong::CutBefore, BEFORE_COMMIT.iter().map(|site| (*site, codes())))
}

fn cut_inside_a_frame() -> Result<()> {
    let codes = || Codes { source: 16, destination: 16 };
    survives_all(Wrong::CutInside, BEFORE_COMMIT.iter().map(|site| (*site, codes())))
}

fn reset_before_a_frame() -> Result<()> {
    let codes = || Codes { source: 16, destination: 16 };
    survives_all(Wrong::ResetBefore, BEFORE_COMMIT.iter().map(|site| (*site, codes())))
}

/// Whoever reads the frame finds it garbled; the destination then tells the source so, and the source the destination
/// that it keeps the guest.
fn garbled(site: &Site) -> (Site, Codes) {
    (*site, Codes { source: 17, destination: if site.0 == There { 17 } else { 16 } })
}

fn a_bit_of_a_header_flipped() -> Result<()> {
    survives_all(Wrong::FlipHeader, BEFORE_COMMIT.iter().map(garbled))
}

fn a_bit_of_a_payload_flipped() -> Result<()> {
    survives_all(Wrong::FlipPayload, BEFORE_COMMIT.iter().map(garbled))
}

fn a_frame_repeated() -> Result<()> {
    // Behind 'ready' comes the guest: see `switchover.rs`.
    let sites = BEFORE_COMMIT.iter().filter(|site| site.1 != "ready");
    survives_all(Wrong::Repeat, sites.map(garbled))
}

/// Those for whose answer the sender waits have nothing behind them: see `silence.rs`.
fn a_frame_dropped_and_others_behind_it() -> Result<()> {
    let sites = BEFORE_COMMIT.iter().filter(|site| ["zeros", "pages"].contains(&site.1));
    survives_all(Wrong::Drop, sites.map(garbled))
}

fn a_bit_of_the_preamble_flipped() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&BUSY)?;
    for (way, garbled) in
        [(There, Codes { source: 17, destination: 17 }), (Back, Codes { source: 17, destination: 16 })]
    {
        let fault = Fault { way, frame: "preamble", which: Nth(0), wrong: Wrong::FlipHeader };
        match way {
            // The source hears the refusal, which comes in a frame, or the end.
            There => {
                let destination = sandbox.receive(&BUSY)?;
                let proxy = Proxy::with_fault(&destination.address, fault)?;
                let code = source.migrate(&proxy.address, &How::usual())?.end()?;
                ensure!(matches!(code.code(), Some(15..=17)), "{code:?}");
                source_only(&mut source, &destination.machine, garbled.destination)?;
            }
            Back => survives(&sandbox, &mut source, fault, &garbled).map(drop)?,
        }
        for wrong in [Wrong::CutBefore, Wrong::CutInside] {
            let destination = sandbox.receive(&BUSY)?;
            let proxy = Proxy::with_fault(&destination.address, Fault { wrong, ..fault })?;
            let ended = source.migrate(&proxy.address, &How::usual())?.end()?;
            let there = destination.machine.process.wait()?;
            // Half a preamble is what another program would send.
            for (side, ended) in [("source", &ended), ("destination", &there)] {
                let code = ended.code().context("killed")?;
                ensure!([14, 16].contains(&code), "{wrong:?} {way:?}: {side} {ended:?}");
                ended.sentence(code)?;
            }
            source.must_go_on()?;
        }
    }
    Ok(())
}

/// No proxy: the kernel's own ends of a socket pair.
fn a_unix_socket_whose_other_end_dies() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&BUSY)?;
    let mut random = Random::new(7);
    for _ in 0..4 {
        let listen = format!("unix:{}", sandbox.path("migration.sock").display());
        let destination = sandbox.receive_on(&listen, &[], &BUSY)?;
        let migration = source.migrate(&destination.address, &How::with(&["--downtime-limit", "2000"]))?;
        migration.wait_for_phase(thermocline::migration::progress::Phase::Hot)?;
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        destination.machine.process.kill();
        let ended = migration.end()?;
        match ended.code() {
            // It was quicker than the signal, and ran there when it came.
            Some(0 | 20) => source = sandbox.boot(&BUSY)?,
            _ => {
                ended.sentence(16)?;
                destination.machine.console.must_be_silent()?;
                source.must_go_on()?;
            }
        }
    }
    Ok(())
}

/// A destination that has taken the machine and reads no more of it, and then ends the connection: the source waits for room that
/// will never come.
fn an_end_behind_a_full_window() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&BUSY)?;
    for how in [Shutdown::Write, Shutdown::Both] {
        let (sender, ended) = std::sync::mpsc::channel::<()>();
        let server = Server::start(move |mut stream| {
            // So small that little of the guest's memory has left when the source has to wait.
            rustix::net::sockopt::set_socket_recv_buffer_size(&stream, 64 << 10)?;
            preamble::send(&mut stream)?;
            preamble::receive(&mut stream)?;
            let mut reader = FrameReader::new(stream.try_clone()?);
            receive_message(&mut reader, "offer")?;
            Message::Accept(Accepted { can_page_out: false }).send(&mut FrameWriter::new(&stream))?;
            let waiting = || Ok::<_, anyhow::Error>(rustix::io::ioctl_fionread(&stream)?);
            let mut before = 0;
            eventually("the source gets no further", || {
                std::thread::sleep(Duration::from_millis(200));
                let now = waiting()?;
                Ok(now > 0 && now == std::mem::replace(&mut before, now))
            })?;
            stream.shutdown(how)?;
            // It stays open, as one does that is cut on its way.
            let _ = ended.recv();
            Ok(())
        })?;
        let migration = source.migrate(&server.address, &How::usual())?;
        migration.fails_at_once(16).with_context(|| format!("{how:?}"))?;
        drop(sender);
        server.finish()?;
        source.must_go_on()?;
    }
    Ok(())
}
