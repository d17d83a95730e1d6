//! A destination that is not there, is something else, or does not take the guest; and a source that is something else.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use thermocline::arch::x86_64::msrs::Msr;
use thermocline::devices::DeviceDescription;
use thermocline::migration::wire::message::receive_message;
use thermocline::migration::wire::{
    Features, FrameReader, FrameWriter, Message, Offer, Preamble, Refusal, RefusalReason, Versions, preamble,
};
use thermocline_tests::owner::{destination_only, gone_without_guest, source_only};
use thermocline_tests::peer::{Server, answer_to, connect, offer_of, read_to_end};
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], nobody_listens);
    trial!(trials, [Kvm], another_program_listens);
    trial!(trials, [Kvm], another_version_listens);
    trial!(trials, [Kvm], another_version_connects);
    trial!(trials, [Kvm], features_are_agreed_upon);
    trial!(trials, [Kvm], too_little_memory_there);
    trial!(trials, [Kvm], another_processor_there);
    trial!(trials, [Kvm], an_unknown_device);
    trial!(trials, [Kvm], a_feature_that_a_driver_may_have_accepted);
    trial!(trials, [Kvm], every_refusal_has_its_code_at_the_source);
    trial!(trials, [Kvm], a_machine_that_cannot_be_is_refused);
}

/// Preambles of programs that speak no version of ours, and how those are said: of the first version, which said nothing else,
/// and of one to come.
fn other_versions() -> [(Vec<u8>, &'static str); 2] {
    let newer = Preamble { versions: Versions { oldest: 77, newest: 78 }, ..Preamble::OURS };
    [(b"THRMCLNE\x01\0\0\0\0\0\0\0".to_vec(), "version 1 "), (newer.to_bytes().to_vec(), "versions 77 to 78 ")]
}

fn nobody_listens() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let socket = sandbox.path("nobody.sock");
    for to in [format!("tcp:{nobody}"), format!("unix:{}", socket.display())] {
        let sentence = source.migrate(&to, &How::usual())?.fails(10)?;
        ensure!(sentence.contains(&to) && sentence.contains("thermocline receive"), "{sentence:?}");
    }
    source.must_go_on()?;
    // Once somebody does, it goes on from there.
    let mut destination = sandbox.receive_on(&format!("unix:{}", socket.display()), &[], &Workload::default())?;
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut destination.machine)
}

fn another_program_listens() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    for (says, shown) in [("SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0"), ("+OK\r\n", "+OK"), ("QEVM\0\0\0\x03", "QEVM")] {
        let server = Server::start(move |mut stream| {
            stream.write_all(says.as_bytes())?;
            read_to_end(&stream);
            Ok(())
        })?;
        let sentence = source.migrate(&server.address, &How::usual())?.fails(14)?;
        ensure!(sentence.contains(shown) && sentence.contains("check the address"), "{sentence:?}");
        server.finish()?;
    }
    // One that waits for a request it understands, and hangs up on ours.
    let server = Server::start(|stream| {
        drop(stream);
        Ok(())
    })?;
    source.migrate(&server.address, &How::usual())?.fails(16)?;
    source.must_go_on()
}

fn another_version_listens() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    for (preamble, said) in other_versions() {
        let server = Server::start(move |mut stream| {
            stream.write_all(&preamble)?;
            read_to_end(&stream);
            Ok(())
        })?;
        let sentence = source.migrate(&server.address, &How::usual())?.fails(15)?;
        ensure!(sentence.contains(said) && sentence.contains("same release"), "{sentence:?}");
        server.finish()?;
    }
    source.must_go_on()
}

fn another_version_connects() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for (preamble, said) in other_versions() {
        let destination = sandbox.receive(&Workload::default())?;
        let mut stream = connect(&destination.address)?;
        stream.write_all(&preamble)?;
        let answer = read_to_end(&stream);
        drop(stream);
        // It says who it is, so that the other side can tell the same.
        ensure!(answer.starts_with(&Preamble::OURS.to_bytes()), "it said {:?}", answer.escape_ascii().to_string());
        let ended = destination.machine.process.wait()?;
        ensure!(ended.sentence(15)?.contains(said), "{ended:?}");
        gone_without_guest(&destination.machine, &ended)?;
    }
    Ok(())
}

/// Features that nobody knows yet are not used; without post-copy there, there is none.
fn features_are_agreed_upon() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let none = Preamble { features: Features::default(), ..Preamble::OURS };
    let server = Server::start(move |mut stream| {
        stream.write_all(&none.to_bytes())?;
        read_to_end(&stream);
        Ok(())
    })?;
    let sentence = source.migrate(&server.address, &How::with(&["--cold", "lazy"]))?.fails(15)?;
    ensure!(sentence.contains("pages left to post-copy"), "{sentence:?}");
    server.finish()?;
    source.must_go_on()?;
    let more = Preamble { features: Features::from_bits(u64::MAX), ..Preamble::OURS };
    let destination = sandbox.receive(&Workload::default())?;
    let mut stream = connect(&destination.address)?;
    stream.write_all(&more.to_bytes())?;
    let mut reader = FrameReader::new(stream.try_clone()?);
    preamble::receive(reader.link())?;
    Message::Offer(real_offer(&sandbox)?).send(&mut FrameWriter::new(stream))?;
    let answer = receive_message(&mut reader, "accept")?;
    ensure!(matches!(answer, Message::Accept(_)), "{} instead of accept", answer.name());
    Ok(())
}

fn too_little_memory_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    let small = sandbox.receive_on("tcp:127.0.0.1:0", &["--max-memory", "63MiB"], &Workload::default())?;
    let sentence = source.migrate(&small.address, &How::usual())?.fails(11)?;
    ensure!(sentence.contains("64 MiB") && sentence.contains("63 MiB"), "{sentence:?}");
    let there = source_only(&mut source, &small.machine, 11)?;
    ensure!(there.contains("64 MiB") && there.contains("63 MiB"), "{there:?}");
    let mut enough = sandbox.receive_on("tcp:127.0.0.1:0", &["--max-memory", "64MiB"], &Workload::default())?;
    source.migrate(&enough.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut enough.machine)
}

/// The offer of a real machine, which a real destination takes.
fn real_offer(sandbox: &Sandbox) -> Result<Offer> {
    let mut source = sandbox.boot(&Workload::default())?;
    let refusal = Refusal { reason: RefusalReason::Host, text: "only asking for an offer".into() };
    let (offer, _) = offer_of(&source, refusal)?;
    source.must_go_on()?;
    Ok(offer)
}

/// Has a real destination refuse an offer; checks the class and the destination's code, and that both sentences have
/// all `parts`.
fn refused(sandbox: &Sandbox, offer: Offer, reason: RefusalReason, code: i32, parts: &[&str]) -> Result<()> {
    let destination = sandbox.receive(&Workload::default())?;
    let refusal = match answer_to(&destination.address, offer)? {
        Message::Refuse(refusal) => refusal,
        other => bail!("{} instead of a refusal", other.name()),
    };
    ensure!(refusal.reason == reason, "{refusal:?} instead of {reason:?}");
    let ended = destination.machine.process.wait()?;
    let sentence = ended.sentence(code)?;
    for part in parts {
        ensure!(sentence.contains(part), "{sentence:?} does not say {part:?}");
        ensure!(refusal.text.contains(part), "{refusal:?} does not say {part:?}");
    }
    gone_without_guest(&destination.machine, &ended)
}

fn another_processor_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let offer = real_offer(&sandbox)?;
    let mut vendor = offer.clone();
    for leaf in vendor.machine.processor.cpuid.iter_mut().filter(|leaf| leaf.function == 0) {
        (leaf.ebx, leaf.edx, leaf.ecx) = (0x746e_6543, 0x4872_7561, 0x736c_7561);
    }
    refused(&sandbox, vendor, RefusalReason::Cpu, 12, &["CentaurHauls"]).context("another vendor")?;
    let mut feature = offer.clone();
    for leaf in feature.machine.processor.cpuid.iter_mut().filter(|leaf| leaf.function == 7 && leaf.index == 0) {
        leaf.ebx = u32::MAX;
    }
    refused(&sandbox, feature, RefusalReason::Cpu, 12, &["avx512f", "bit 22 of CPUID 7.0.ebx"]).context("a feature")?;
    let mut nested = offer.clone();
    for leaf in nested.machine.processor.cpuid.iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.ecx |= 1 << 5;
    }
    refused(&sandbox, nested, RefusalReason::Cpu, 12, &["vmx"]).context("nested virtualization")?;
    let mut msr = offer.clone();
    msr.machine.processor.features = vec![Msr { index: 0x10a, value: u64::MAX }];
    refused(&sandbox, msr, RefusalReason::Cpu, 12, &["MSR 0x10a", "ibrs_all"]).context("a feature in an MSR")?;
    let mut address = offer.clone();
    for leaf in address.machine.processor.cpuid.iter_mut().filter(|leaf| leaf.function == 0x8000_0008) {
        leaf.eax |= 0xff;
    }
    refused(&sandbox, address, RefusalReason::Cpu, 12, &["255 physical address bits"]).context("a longer address")?;
    let mut tsc = offer.clone();
    tsc.machine.processor.tsc_khz = 1;
    refused(&sandbox, tsc, RefusalReason::Cpu, 12, &["1 kHz", "time stamp counter"]).context("another frequency")?;
    let mut cpus = offer;
    cpus.machine.cpus = 0;
    refused(&sandbox, cpus, RefusalReason::Cpu, 12, &["vCPU"]).context("no vCPU")
}

fn an_unknown_device() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let offer = real_offer(&sandbox)?;
    let mut more = offer.clone();
    let device = more.machine.devices[0].clone();
    more.machine.devices.push(DeviceDescription { kind: "flux-capacitor".try_into()?, ..device });
    refused(&sandbox, more, RefusalReason::Devices, 13, &["flux-capacitor", "version 1"])?;
    let mut newer = offer;
    newer.machine.devices[0].version += 100;
    refused(&sandbox, newer, RefusalReason::Devices, 13, &["serial0", "serial-16550a", "version 101"])
}

fn a_feature_that_a_driver_may_have_accepted() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let offer = real_offer(&sandbox)?;
    let of_rng = |offer: &mut Offer, change: fn(u64) -> u64| -> Result<()> {
        let rng = offer.machine.devices.iter_mut().find(|device| device.id.as_str() == "rng0");
        let rng = rng.context("no rng0")?;
        ensure!(rng.features != 0, "it offers nothing");
        rng.features = change(rng.features);
        Ok(())
    };
    let mut more = offer.clone();
    of_rng(&mut more, |features| features | 1 << 40)?;
    refused(&sandbox, more, RefusalReason::Devices, 13, &["'rng0'", "virtio-rng", "features 0x10000000000"])?;
    // What it does not offer there it need not have here.
    let mut fewer = offer;
    of_rng(&mut fewer, |features| features & !(1 << 29))?;
    let destination = sandbox.receive(&Workload::default())?;
    let answer = answer_to(&destination.address, fewer)?;
    ensure!(matches!(answer, Message::Accept(_)), "{} instead of accept", answer.name());
    Ok(())
}

fn every_refusal_has_its_code_at_the_source() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut source = sandbox.boot(&Workload::default())?;
    for (reason, code) in [
        (RefusalReason::Memory, 11),
        (RefusalReason::Cpu, 12),
        (RefusalReason::Devices, 13),
        (RefusalReason::Stream, 17),
        (RefusalReason::Host, 1),
    ] {
        let refusal = Refusal { reason, text: format!("this host has no room for {reason:?} today") };
        let text = refusal.text.clone();
        let migration = offer_of(&source, refusal);
        let (_, sentence) = migration.with_context(|| format!("{reason:?} is not {code}"))?;
        ensure!(sentence.contains(&text) && sentence.contains("refuses"), "{sentence:?}");
    }
    source.must_go_on()
}

fn a_machine_that_cannot_be_is_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let offer = real_offer(&sandbox)?;
    let layout = |regions: &[(u64, u64)]| -> Result<_> {
        let regions: Vec<_> =
            regions.iter().map(|(start, length)| serde_json::json!({"start": start, "length": length})).collect();
        Ok(serde_json::from_value(serde_json::json!({ "regions": regions }))?)
    };
    for regions in [
        &[][..],
        &[(0, 0)],
        &[(4096, 64 << 20)],
        &[(0, 64 << 20), (0, 64 << 20)],
        &[(0, (64 << 20) + 5)],
        &[(0, u64::MAX)],
        &[(0, u64::MAX), (4096, u64::MAX)],
        &[(0, 1 << 50)],
    ] {
        let mut other = offer.clone();
        other.machine.ram = layout(regions)?;
        refused(&sandbox, other, RefusalReason::Memory, 11, &["memory"]).with_context(|| format!("{regions:?}"))?;
    }
    Ok(())
}
