//! A guest with a network interface moves between taps of different names: what is said to it arrives, the network hears where it
//! is, and a tap that does not do leaves it where it was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::echo;
use harness::tap::{ALL, Interface, TapNetwork};
use thermocline::migration::progress::Phase;
use thermocline_tests::owner::{destination_only, source_only};
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::{How, Machine, Sandbox, Trials, trial};
use workload_guest::device_report::{Net, NetDone};
use workload_guest::{Line, frame};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Network], frames_go_on_there_and_back);
    trial!(trials, [Kvm, Root, Network], the_network_hears_where_the_guest_is);
    trial!(trials, [Kvm, Root, Network], a_paused_guest_is_announced_when_it_goes_on);
    trial!(trials, [Kvm, Root, Network], a_switchover_that_fails_is_not_announced);
    trial!(trials, [Kvm, Root, Network], a_tap_that_goes_on_the_way);
    trial!(trials, [Kvm, Root, Network], an_interface_that_is_another_is_refused);
}

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
pub(crate) const AT_T0: &str = "tap=t0,mac=52:54:00:00:00:07";

/// Ethertypes of what is announced: by the monitor, and by the guest.
const REVERSE_ARP: [u8; 2] = [0x80, 0x35];
const ARP: [u8; 2] = [0x08, 0x06];
/// More than the five announcements take.
const ANNOUNCED_WITHIN: Duration = Duration::from_millis(1500);
/// The shortest time between the first and the last of them.
const ANNOUNCED_FOR: Duration = Duration::from_millis(750);

/// Two taps on one bridge.
pub(crate) fn two_taps() -> Result<TapNetwork> {
    let network = TapNetwork::new(&["t0", "t1"])?;
    network.bridge(&["t0", "t1"])?;
    Ok(network)
}

fn boot(sandbox: &Sandbox, network: &TapNetwork, guest: &str) -> Result<Machine> {
    sandbox.boot_devices(&network.prefix(), guest, &["--net", AT_T0])
}

/// Moves the guest to another process, with this tap.
fn move_to(sandbox: &Sandbox, network: &TapNetwork, from: &Machine, tap: &str, how: &How) -> Result<Machine> {
    let net = format!("id=net0,tap={tap}");
    let destination = sandbox.receive_behind(&network.prefix(), "tcp:127.0.0.1:0", &["--net", &net], &from.workload)?;
    let mut there = destination.machine;
    from.migrate(&destination.address, how)?.succeeds()?;
    destination_only(from, &mut there)?;
    Ok(there)
}

fn net_done(line: Line) -> Option<NetDone> {
    if let Line::NetDone(done) = line { Some(done) } else { None }
}

fn net(line: Line) -> Option<Net> {
    if let Line::Net(net) = line { Some(net) } else { None }
}

fn frames_go_on_there_and_back() -> Result<()> {
    for (guest, how) in [
        ("net=on", How::usual()),
        ("net=on,interrupts=on", How::usual()),
        ("net=on,interrupts=on", How::with(&["--switchover", "now"])),
    ] {
        let network = two_taps()?;
        let sandbox = Sandbox::new()?;
        let mut source = boot(&sandbox, &network, guest)?;
        source.console.type_line("net-echo forever")?;
        let (mut back, heard) = echo::during(&network, "b0", MAC, (200, Duration::from_millis(1)), || {
            let there = move_to(&sandbox, &network, &source, "t1", &how)?;
            drop(source);
            let back = move_to(&sandbox, &network, &there, "t0", &how)?;
            // Some more, from where it is in the end.
            back.console.must_run()?;
            Ok(back)
        })?;
        ensure!(heard.duplicate + heard.corrupt == 0, "{guest}: {heard:?}");
        ensure!(heard.came > heard.sent / 2 && heard.silent_for < Duration::from_secs(1), "{guest}: {heard:?}");
        let ended = back.console.device("net-stop", net_done)?;
        // What the other side never heard back may have come all the same; none came twice, or from before it came here.
        ensure!(ended.duplicate + ended.corrupt == 0 && ended.received >= heard.came, "{guest}: {ended:?} {heard:?}");
    }
    Ok(())
}

/// Frames of the guest and of this ethertype at an interface, for so long, and when they came.
fn listen(interface: &Interface, ethertype: [u8; 2], time: Duration) -> Result<Vec<(Instant, Vec<u8>)>> {
    let until = Instant::now() + time;
    let mut frames = Vec::new();
    while Instant::now() < until {
        while let Some(frame) = interface.receive()? {
            if frame.get(6..14).is_some_and(|head| head == [MAC.as_slice(), &ethertype].concat()) {
                frames.push((Instant::now(), frame));
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(frames)
}

fn the_network_hears_where_the_guest_is() -> Result<()> {
    for guest in ["net=on", "net=on,interrupts=on"] {
        let network = two_taps()?;
        let sandbox = Sandbox::new()?;
        let source = boot(&sandbox, &network, guest)?;
        let [far, by_guest] = ["t1", "t1"].map(|tap| network.interface(tap, ALL));
        let (far, by_guest) = (far?, by_guest?);
        let (there, announced) = std::thread::scope(|scope| {
            let heard = scope.spawn(|| listen(&far, REVERSE_ARP, Duration::from_secs(4)));
            let there = move_to(&sandbox, &network, &source, "t1", &How::usual())?;
            let heard = heard.join().ok().context("the thread that listens panicked")??;
            Ok::<_, anyhow::Error>((there, heard))
        })?;
        ensure!(announced.len() == 5, "{} announcements: {announced:?}", announced.len());
        for (_, frame) in &announced {
            ensure!(
                frame.len() == 60 && frame[..6] == [0xff; 6] && frame[20..28] == [&[0, 3], MAC.as_slice()].concat(),
                "{frame:x?}"
            );
        }
        let took = announced[4].0 - announced[0].0;
        ensure!(took >= ANNOUNCED_FOR, "five announcements within {took:?}");
        // And the guest itself, as often as its driver has heard of it.
        let counts = there.console.output().wait_for(0, Duration::from_secs(5), |text| {
            Line::parse(text).ok().and_then(net).filter(|net| net.announced > 0)
        });
        let (_, counts) = counts.context("the guest was not asked to announce itself")?;
        let own = listen(&by_guest, ARP, Duration::from_millis(100))?;
        ensure!(own.len() as u64 >= counts.announced.min(5), "{} of {counts:?}", own.len());
        ensure!(own.iter().all(|(_, bytes)| *bytes == frame::announcement(MAC)), "{own:x?}");
        ensure!(own.len() <= 5, "it is asked again though it has answered: {} times", own.len());
    }
    Ok(())
}

fn a_paused_guest_is_announced_when_it_goes_on() -> Result<()> {
    let network = two_taps()?;
    let sandbox = Sandbox::new()?;
    let source = boot(&sandbox, &network, "net=on")?;
    let far = network.interface("t1", ALL)?;
    ensure!(source.ctl(&["pause"])?.0.code() == Some(0), "pause");
    let destination =
        sandbox.receive_behind(&network.prefix(), "tcp:127.0.0.1:0", &["--net", "id=net0,tap=t1"], &source.workload)?;
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    ensure!(listen(&far, REVERSE_ARP, Duration::from_millis(400))?.is_empty(), "it is announced and does not run");
    ensure!(destination.machine.ctl(&["resume"])?.0.code() == Some(0), "resume");
    let announced = listen(&far, REVERSE_ARP, ANNOUNCED_WITHIN)?;
    ensure!(announced.len() == 5, "{announced:?}");
    destination.machine.console.must_run()?;
    Ok(())
}

fn a_switchover_that_fails_is_not_announced() -> Result<()> {
    for (way, frame) in [(Way::There, "state"), (Way::Back, "ready")] {
        let network = two_taps()?;
        let sandbox = Sandbox::new()?;
        let mut source = boot(&sandbox, &network, "net=on,interrupts=on")?;
        source.console.type_line("net-echo forever")?;
        let [near, far] = ["t0", "t1"].map(|tap| network.interface(tap, ALL));
        let (near, far) = (near?, far?);
        let ((), heard) = echo::during(&network, "b0", MAC, (200, Duration::from_millis(1)), || {
            let net = ["--net", "id=net0,tap=t1"];
            let destination = sandbox.receive_behind(&network.prefix(), "tcp:127.0.0.1:0", &net, &source.workload)?;
            let fault = Fault { way, frame, which: Which::Nth(0), wrong: Wrong::CutBefore };
            let proxy = network.within(|| Proxy::with_fault(&destination.address, fault))?;
            source.migrate(&proxy.address, &How::usual())?.fails(16)?;
            source_only(&mut source, &destination.machine, 16).map(drop)
        })?;
        ensure!(heard.duplicate + heard.corrupt == 0 && heard.silent_for < Duration::from_secs(1), "{heard:?}");
        for interface in [near, far] {
            ensure!(
                listen(&interface, REVERSE_ARP, Duration::from_millis(300))?.is_empty(),
                "'{frame}': it has not moved"
            );
        }
    }
    Ok(())
}

/// Between the destination's word that it takes the guest and its having it all.
fn a_tap_that_goes_on_the_way() -> Result<()> {
    let network = two_taps()?;
    let sandbox = Sandbox::new()?;
    let mut source = boot(&sandbox, &network, "net=on")?;
    source.console.type_line("net-echo forever")?;
    let destination =
        sandbox.receive_behind(&network.prefix(), "tcp:127.0.0.1:0", &["--net", "id=net0,tap=t1"], &source.workload)?;
    let slow = network.within(|| Proxy::with_rate(&destination.address, 2 << 20))?;
    let migration = source.migrate(&slow.address, &How::usual())?;
    migration.wait_for(|progress| progress.phase != Phase::Negotiating)?;
    network.delete("t1")?;
    let sentence = migration.fails(13)?;
    for word in ["net0", "tap 't1' has gone", "migrate again"] {
        ensure!(sentence.contains(word), "no '{word}' in {sentence:?}");
    }
    source_only(&mut source, &destination.machine, 13)?;
    let ((), heard) =
        echo::during(&network, "b0", MAC, (200, Duration::from_millis(1)), || source.console.must_run().map(drop))?;
    ensure!(heard.duplicate + heard.corrupt == 0, "{heard:?}");
    Ok(())
}

fn an_interface_that_is_another_is_refused() -> Result<()> {
    let network = TapNetwork::new(&["t0", "t1"])?;
    let sandbox = Sandbox::new()?;
    let mut source = boot(&sandbox, &network, "net=on")?;
    let nets: [(&[&str], &[&str]); 4] = [
        (&["--net", "id=net0,tap=t1,mac=52:54:00:00:00:08"], &["net0", "mac=52:54:00:00:00:07"]),
        (&["--net", "id=net9,tap=t1"], &["net0", "id=net0"]),
        (&[], &["net0", "id=net0"]),
        (&["--net", "id=net0,tap=t1"], &["net0", "ip link set t1 mtu 1500"]),
    ];
    for (number, (net, words)) in nets.into_iter().enumerate() {
        if number == 3 {
            network.set_mtu("t1", 1400)?;
        }
        let destination = sandbox.receive_behind(&network.prefix(), "tcp:127.0.0.1:0", net, &source.workload)?;
        let migration = source.migrate(&destination.address, &How::usual())?;
        let sentence = migration.fails_at_once(13)?;
        for word in words {
            ensure!(sentence.contains(word), "no '{word}' in {sentence:?}");
        }
        // Before the first page.
        let progress = migration.process.stdout.lines();
        ensure!(progress.iter().all(|line| line.contains(r#""phase":"negotiating""#)), "{progress:?}");
        source_only(&mut source, &destination.machine, 13)?;
    }
    Ok(())
}
