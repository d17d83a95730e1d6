//! Whoever else connects where a guest is to come in, and guests that do not come: `receive` goes on listening.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use thermocline::control::RunState;
use thermocline_tests::owner::destination_only;
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], strangers_end_and_delay_nothing);
    trial!(trials, [Kvm], who_comes_second_is_told_so);
    trial!(trials, [Kvm], a_guest_that_does_not_come_is_followed_by_the_next);
}

const GUEST: Workload = Workload { memory: 48, working_set: 8, cold: 16, rate: 2000, writes: 50, cpus: 1 };

/// Says `bytes` and stays.
fn stranger(address: &str, bytes: &[u8]) -> Result<Box<dyn Write>> {
    let mut stream: Box<dyn Write> = match address.split_once(':').context("an address")? {
        ("unix", path) => Box::new(UnixStream::connect(path)?),
        (_, host_port) => Box::new(TcpStream::connect(host_port)?),
    };
    stream.write_all(bytes)?;
    Ok(stream)
}

fn strangers_end_and_delay_nothing() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for listen in ["tcp:127.0.0.1:0".to_owned(), format!("unix:{}", sandbox.path("listen").display())] {
        let source = sandbox.boot(&GUEST)?;
        let mut destination = sandbox.listen_on(&listen, &GUEST)?;
        let mut strangers = Vec::new();
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"", b"THRM"].iter().cycle().take(40) {
            strangers.push(stranger(&destination.address, bytes)?);
        }
        drop(stranger(&destination.address, b"")?);
        source.migrate(&destination.address, &How::usual())?.succeeds().with_context(|| listen.clone())?;
        destination_only(&source, &mut destination.machine)?;
    }
    Ok(())
}

fn who_comes_second_is_told_so() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (first, mut second) = (sandbox.boot(&GUEST)?, sandbox.boot(&GUEST)?);
    let mut destination = sandbox.listen_on("tcp:127.0.0.1:0", &GUEST)?;
    let slow = Proxy::with_rate(&destination.address, 8 << 20)?;
    let migration = first.migrate(&slow.address, &How::usual())?;
    migration.wait_for(|progress| progress.pages.hot > 100)?;
    let told = second.migrate(&destination.address, &How::usual())?.fails_at_once(21)?;
    ensure!(told.contains("another guest is on its way"), "{told:?}");
    second.must_go_on()?;
    migration.succeeds()?;
    destination_only(&first, &mut destination.machine)
}

/// Each of the ways in which one does not come, at one destination.
fn a_guest_that_does_not_come_is_followed_by_the_next() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&GUEST)?;
    let mut destination = sandbox.listen_on("tcp:127.0.0.1:0", &GUEST)?;
    for (frame, wrong, code) in [
        ("offer", Wrong::FlipPayload, 17),
        ("pages", Wrong::CutBefore, 16),
        ("state", Wrong::CutInside, 16),
        ("commit", Wrong::FlipHeader, 17),
    ] {
        let fault = Fault { way: Way::There, frame, which: Which::Nth(0), wrong };
        let proxy = Proxy::with_fault(&destination.address, fault)?;
        source.migrate(&proxy.address, &How::usual())?.fails_at_once(code).with_context(|| fault.to_string())?;
        let state = destination.machine.status()?.state;
        ensure!(state == RunState::Waiting, "{fault}: the destination is {state:?}");
        destination.machine.console.must_be_silent()?;
        source.must_go_on().with_context(|| fault.to_string())?;
    }
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut destination.machine)?;
    let said = destination.machine.process.stderr.lines();
    let failures = said.iter().filter(|line| line.contains("no guest has come")).count();
    ensure!(failures == 4, "{failures} of 4 are told of: {said:?}");
    Ok(())
}
