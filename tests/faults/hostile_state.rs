//! State that is not that of the machine which was offered: refused by name, at both ends, and nothing of it is run.

use anyhow::{Context, Result, bail, ensure};
use thermocline::arch::x86_64::msrs::Msr;
use thermocline::arch::x86_64::state::{Time, VcpuState};
use thermocline::machine::MachineState;
use thermocline::migration::wire::message::receive_message;
use thermocline::migration::wire::{FrameReader, FrameWriter, Message, Offer, Refusal, RefusalReason, preamble};
use thermocline::record::Record;
use thermocline_tests::owner::gone_without_guest;
use thermocline_tests::peer::{connect, offer_of, state_of};
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], state_of_other_parts);
    trial!(trials, [Kvm], registers_that_no_guest_has);
    trial!(trials, [Kvm], clocks_of_another_machine);
}

/// A machine's offer and its state.
fn real_machine(sandbox: &Sandbox) -> Result<(Offer, MachineState)> {
    let source = sandbox.boot(&Workload::default())?;
    let refusal = Refusal { reason: RefusalReason::Host, text: "only asking for an offer".into() };
    Ok((offer_of(&source, refusal)?.0, state_of(&source)?))
}

/// Sends the offer, RAM of nothing but zeros and then `state`; the destination refuses it with all `parts` in its
/// sentence and code 17.
fn refused(sandbox: &Sandbox, offer: &Offer, state: MachineState, parts: &[&str]) -> Result<()> {
    let destination = sandbox.receive(&Workload::default())?;
    let mut stream = connect(&destination.address)?;
    preamble::send(&mut stream)?;
    preamble::receive(&mut stream)?;
    let mut reader = FrameReader::new(stream.try_clone()?);
    let mut writer = FrameWriter::new(stream);
    Message::Offer(offer.clone()).send(&mut writer)?;
    let answer = receive_message(&mut reader, "accept")?;
    ensure!(matches!(answer, Message::Accept(_)), "{} instead of accept", answer.name());
    Message::Zeros(vec![offer.machine.ram.all_pages()]).send(&mut writer)?;
    Message::State(state).send(&mut writer)?;
    let refusal = match receive_message(&mut reader, "a refusal")? {
        Message::Refuse(refusal) => refusal,
        other => bail!("{} instead of a refusal", other.name()),
    };
    ensure!(refusal.reason == RefusalReason::Stream, "{refusal:?}");
    drop((reader, writer));
    let ended = destination.machine.process.wait()?;
    let sentence = ended.sentence(17)?;
    for part in parts {
        ensure!(sentence.contains(part) && refusal.text.contains(part), "{sentence:?}, {refusal:?}: no {part:?}");
    }
    gone_without_guest(&destination.machine, &ended)
}

fn state_of_other_parts() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (offer, state) = real_machine(&sandbox)?;
    let altered = |alter: &dyn Fn(&mut Vec<Record>)| {
        let mut state = state.clone();
        alter(&mut state.records.0);
        state
    };
    let at = |id: &str| {
        let found = state.records.0.iter().position(|record| record.id.as_str() == id);
        found.with_context(|| format!("no {id} in {:?}", state.records.0))
    };
    let (serial, vcpu) = (at("serial0")?, at("vcpu0")?);
    let twice = altered(&|records| records.push(records[serial].clone()));
    refused(&sandbox, &offer, twice, &["'serial0' twice"])?;
    let missing = altered(&|records| drop(records.remove(vcpu)));
    refused(&sandbox, &offer, missing, &["no part 'vcpu0'"])?;
    let mut another = state.records.0[vcpu].clone();
    another.id = "vcpu1".try_into()?;
    let more = altered(&|records| records.push(another.clone()));
    refused(&sandbox, &offer, more, &["'vcpu1'", "has not"])?;
    let version = altered(&|records| records[serial].version = 999);
    refused(&sandbox, &offer, version, &["'serial0'", "version 999"])?;
    let kind = altered(&|records| records[serial].kind = records[vcpu].kind.clone());
    refused(&sandbox, &offer, kind, &["'serial0'", "'vcpu-x86_64'", "'serial-16550a'"])?;
    let short = altered(&|records| records[vcpu].bytes.truncate(100));
    refused(&sandbox, &offer, short, &["'vcpu0'", "no sense"])?;
    let long = altered(&|records| records[vcpu].bytes.push(0));
    refused(&sandbox, &offer, long, &["'vcpu0'", "1 bytes too many"])
}

fn registers_that_no_guest_has() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (offer, state) = real_machine(&sandbox)?;
    let altered = |alter: &dyn Fn(&mut VcpuState)| -> Result<MachineState> {
        let mut state = state.clone();
        let record = state.records.0.iter_mut().find(|record| record.id.as_str() == "vcpu0").context("no vCPU")?;
        let mut vcpu: VcpuState = record.read()?;
        alter(&mut vcpu);
        *record = Record::of("vcpu0", &vcpu)?;
        Ok(state)
    };
    let with = |msr: Msr| altered(&move |vcpu| vcpu.msrs.push(msr));
    // Hyper-V's guest OS id: KVM takes it from user space, whatever the guest was told.
    refused(&sandbox, &offer, with(Msr { index: 0x4000_0000, value: 1 })?, &["MSR 0x40000000"])?;
    refused(&sandbox, &offer, with(Msr { index: 0x1234_5678, value: 1 })?, &["MSR 0x12345678"])?;
    refused(&sandbox, &offer, altered(&|vcpu| vcpu.msrs.push(vcpu.msrs[0]))?, &["twice"])?;
    let too_large = altered(&|vcpu| vcpu.xsave.resize(1 << 14, 1))?;
    refused(&sandbox, &offer, too_large, &["extended processor state"])?;
    // What the offer says, and the state cannot change: features, and counters that no guest has.
    refused(&sandbox, &offer, with(Msr { index: 0x10a, value: 1 })?, &["MSR 0x10a", "no part of a guest's state"])?;
    refused(&sandbox, &offer, with(Msr { index: 0x38f, value: 1 })?, &["MSR 0x38f", "no part of a guest's state"])?;
    let hypervisor = altered(&|vcpu| vcpu.sregs.efer |= 1 << 12)?;
    refused(&sandbox, &offer, hypervisor, &["'vcpu0'", "hypervisor"])?;
    let pointers = altered(&|vcpu| {
        vcpu.sregs.efer |= 1 << 10;
        vcpu.sregs.pdptrs = Some([1; 4]);
    })?;
    refused(&sandbox, &offer, pointers, &["'vcpu0'", "no PAE paging"])?;
    let segment = altered(&|vcpu| vcpu.sregs.cs.dpl = 9)?;
    refused(&sandbox, &offer, segment, &["'vcpu0'", "privilege level 9"])
}

fn clocks_of_another_machine() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (offer, state) = real_machine(&sandbox)?;
    let with_counters = |count: usize| -> Result<MachineState> {
        let mut state = state.clone();
        let record = state.records.0.iter_mut().find(|record| record.id.as_str() == "time").context("no clocks")?;
        let time = Time { tscs: vec![1; count], ..record.read()? };
        *record = Record::of("time", &time)?;
        Ok(state)
    };
    refused(&sandbox, &offer, with_counters(0)?, &["'time'", "0 time stamp counters for 1 vCPUs"])?;
    refused(&sandbox, &offer, with_counters(2)?, &["'time'", "2 time stamp counters for 1 vCPUs"])?;
    refused(&sandbox, &offer, with_counters(1000)?, &["'time'", "no sense"])
}
