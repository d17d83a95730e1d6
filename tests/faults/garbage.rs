//! Bytes that make no sense, at a destination that waits for a guest.

use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memory_agent::PageNumber;
use thermocline::control::RunState;
use thermocline::migration::wire::{FrameReader, FrameWriter, Kind, Message, Refusal, RefusalReason, preamble};
use thermocline::ram::RamPage;
use thermocline_tests::machine::Destination;
use thermocline_tests::owner::gone_without_guest;
use thermocline_tests::peer::{connect, offer_of, read_to_end, say, state_of};
use thermocline_tests::random::Random;
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], random_bytes);
    trial!(trials, [Kvm], random_bytes_behind_a_good_preamble);
    trial!(trials, [Kvm], frames_that_make_no_sense);
    trial!(trials, [Kvm], pages_that_do_not_exist);
    trial!(trials, [Kvm], a_state_before_all_pages);
    trial!(trials, [Kvm], a_slow_preamble);
    trial!(trials, [Kvm], a_connection_and_nothing_more);
}

fn own_preamble() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    preamble::send(&mut bytes)?;
    Ok(bytes)
}

/// The destination ends with one of `codes` and one line, and nothing has run there.
fn ends(destination: &Destination, codes: &[i32]) -> Result<()> {
    let ended = destination.machine.process.wait()?;
    let code = ended.code().filter(|code| codes.contains(code)).with_context(|| format!("{ended:?}"))?;
    ended.sentence(code)?;
    gone_without_guest(&destination.machine, &ended)
}

fn random_bytes() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut random = Random::new(4);
    for length in [1, 7, 8, 16, 17, 100, 5000, 1 << 20] {
        let destination = sandbox.receive(&Workload::default())?;
        say(connect(&destination.address)?, &random.bytes(length))?;
        ends(&destination, &[14]).with_context(|| format!("{length} random bytes"))?;
    }
    Ok(())
}

fn random_bytes_behind_a_good_preamble() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut random = Random::new(5);
    for length in [0, 1, 23, 24, 25, 1000, 1 << 20] {
        let destination = sandbox.receive(&Workload::default())?;
        say(connect(&destination.address)?, &[own_preamble()?, random.bytes(length)].concat())?;
        // Too few for a header is a connection that ended.
        let code = if length < 24 { 16 } else { 17 };
        ends(&destination, &[code]).with_context(|| format!("{length} random bytes"))?;
    }
    Ok(())
}

/// Good checksums around nonsense.
fn frames_that_make_no_sense() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut random = Random::new(6);
    let message = |message: &Message| -> Result<Vec<u8>> {
        let mut bytes = own_preamble()?;
        message.send(&mut FrameWriter::new(&mut bytes))?;
        Ok(bytes)
    };
    let frame = |kind, payload: &[u8]| -> Result<Vec<u8>> {
        let mut bytes = own_preamble()?;
        FrameWriter::new(&mut bytes).write(kind, payload)?;
        Ok(bytes)
    };
    let mut streams = vec![
        message(&Message::Commit)?,
        message(&Message::Ready)?,
        message(&Message::RoundEnd(1))?,
        message(&Message::Zeros(vec![RamPage(0).run(1), RamPage(5).run(4)]))?,
        frame(Kind::Message, &[])?,
        frame(Kind::Pages, &[])?,
        frame(Kind::Pages, &[0; 4096])?,
        // An offer, by its number, of a machine with as many of everything as a number can say.
        frame(Kind::Message, &[&[0][..], &[0xff; 40]].concat())?,
    ];
    for length in [1, 10, 100, 10_000] {
        streams.push(frame(Kind::Message, &random.bytes(length))?);
    }
    for (number, stream) in streams.into_iter().enumerate() {
        let destination = sandbox.receive(&Workload::default())?;
        say(connect(&destination.address)?, &stream)?;
        ends(&destination, &[17]).with_context(|| format!("stream {number}"))?;
    }
    Ok(())
}

/// A destination that has accepted a real machine, and what says further frames to it.
fn accepted(sandbox: &Sandbox) -> Result<(Destination, FrameWriter<std::net::TcpStream>)> {
    let source = sandbox.boot(&Workload::default())?;
    let refusal = Refusal { reason: RefusalReason::Host, text: "only asking for an offer".into() };
    let (offer, _) = offer_of(&source, refusal)?;
    let destination = sandbox.receive(&Workload::default())?;
    let mut stream = connect(&destination.address)?;
    preamble::send(&mut stream)?;
    preamble::receive(&mut stream)?;
    let mut reader = FrameReader::new(stream.try_clone()?);
    let mut writer = FrameWriter::new(stream);
    Message::Offer(offer).send(&mut writer)?;
    let answer = thermocline::migration::wire::message::receive_message(&mut reader, "accept")?;
    ensure!(matches!(answer, Message::Accept(_)), "{} instead of accept", answer.name());
    Ok((destination, writer))
}

fn pages_that_do_not_exist() -> Result<()> {
    const PAGES: u64 = 64 << 8;
    let sandbox = Sandbox::new()?;
    let batch = |first: u64, pages: u32| {
        let mut payload = vec![0, 0, 0, 0, 1, 0, 0, 0];
        payload.extend(first.to_le_bytes());
        payload.extend(pages.to_le_bytes());
        payload.extend([0; 4]);
        payload.resize(payload.len() + 4096, 0xab);
        payload
    };
    for (first, pages) in [(PAGES, 1), (PAGES - 1, 2), (u64::MAX, 1), (0, 0), (0, u32::MAX), (u64::MAX - 1, 2)] {
        let (destination, mut writer) = accepted(&sandbox)?;
        writer.write(Kind::Pages, &batch(first, pages))?;
        read_to_end(writer.link());
        drop(writer);
        ends(&destination, &[17]).with_context(|| format!("{pages} pages from {first} on"))?;
    }
    for (start, end) in [(0, PAGES + 1), (0, u64::MAX), (9, 3)] {
        let ranges = vec![RamPage(start)..RamPage(end)];
        let shown = format!("{ranges:?}");
        let (destination, mut writer) = accepted(&sandbox)?;
        Message::Zeros(ranges).send(&mut writer)?;
        read_to_end(writer.link());
        drop(writer);
        ends(&destination, &[17]).with_context(|| format!("zeros {shown}"))?;
    }
    Ok(())
}

/// A source that says it is done and is not must not get a guest to run with holes for pages.
fn a_state_before_all_pages() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let state = state_of(&source)?;
    source.must_go_on()?;
    let (destination, mut writer) = accepted(&sandbox)?;
    Message::Zeros(vec![RamPage(0).run((64 << 8) - 1)]).send(&mut writer)?;
    Message::State(state).send(&mut writer)?;
    read_to_end(writer.link());
    drop(writer);
    ends(&destination, &[17])?;
    ensure!(destination.machine.process.stderr.lines().concat().contains("1 pages never came"), "not said");
    Ok(())
}

fn a_slow_preamble() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for whole in [false, true] {
        let destination = sandbox.receive(&Workload::default())?;
        let mut stream = connect(&destination.address)?;
        let preamble = own_preamble()?;
        for byte in &preamble[..if whole { preamble.len() } else { 11 }] {
            stream.write_all(&[*byte])?;
            std::thread::sleep(Duration::from_millis(20));
        }
        // The monitor has time for others meanwhile.
        ensure!(destination.machine.status()?.state == RunState::Waiting, "{:?}", destination.machine.status()?);
        stream.shutdown(Shutdown::Write)?;
        read_to_end(&stream);
        ends(&destination, if whole { &[16] } else { &[14] })?;
    }
    Ok(())
}

fn a_connection_and_nothing_more() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let destination = sandbox.receive(&Workload::default())?;
    drop(connect(&destination.address)?);
    ends(&destination, &[16])
}
