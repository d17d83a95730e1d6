//! Frames go both ways over a tap, in a network namespace of their own.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::tap::{Interface, TapNetwork};
use thermocline_tests::{Machine, Sandbox, Trials, trial};
use workload_guest::frame::{self, Frame, Sequence};

use crate::answers::net_done;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Network], frames_go_both_ways);
    trial!(trials, [Kvm, Root, Network], two_guests_talk_to_one_another);
}

const PATIENCE: Duration = Duration::from_secs(10);

/// Does something in the network's namespace, with the interface of `tap`.
fn at<T: Send>(network: &TapNetwork, tap: &str, work: impl FnOnce(&Interface) -> Result<T> + Send) -> Result<T> {
    network.within(|| work(&Interface::open(tap, true)?))
}

fn boot(sandbox: &Sandbox, network: &TapNetwork, tap: &str, guest: &str) -> Result<Machine> {
    sandbox.boot_devices(&network.prefix(), guest, &["--net", &format!("tap={tap}")])
}

fn next(interface: &Interface) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(frame) = interface.receive()? {
            return Ok(frame);
        }
        ensure!(Instant::now() < deadline, "no frame within {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn outgoing(sequence: u64, length: usize) -> Vec<u8> {
    let mut frame = vec![sequence as u8; length];
    let sum = frame::sum(&frame[frame::HEAD..]);
    frame::seal(&mut frame, [0xff; 6], [2, 0, 0, 0, 0, 1], sequence, sum);
    frame
}

fn frames_go_both_ways() -> Result<()> {
    const FRAMES: u64 = 256;
    for guest in ["net=on", "net=on,interrupts=on"] {
        let network = TapNetwork::new(&["t0"])?;
        let sandbox = Sandbox::new()?;
        let mut machine = boot(&sandbox, &network, "t0", guest)?;
        at(&network, "t0", |interface| {
            for length in [60, 61, 1514] {
                let done = machine.console.device(&format!("net-send {length} once"), net_done)?;
                ensure!(done.sent == FRAMES, "{done:?}");
                let mut came = Sequence::default();
                for _ in 0..FRAMES {
                    let bytes = next(interface)?;
                    match frame::read(&bytes) {
                        Frame::Ours { sequence, echoed: false } if bytes.len() == length => came.take(sequence),
                        other => anyhow::bail!("{} bytes: {other:?}", bytes.len()),
                    }
                }
                ensure!((came.lost, came.duplicate) == (0, 0), "{came:?}");
            }
            machine.console.type_line("net-echo forever")?;
            // Begun when it answers: what comes before is not sent back.
            machine.console.must_run()?;
            for sequence in 0..100 {
                let sent = interface.send(&[outgoing(sequence, 64 + 14 * sequence as usize)])?;
                ensure!(sent == 1, "the tap takes no frame");
                let back = loop {
                    // Of its own frames a packet socket sees those of others only.
                    let frame = frame::read(&next(interface)?);
                    if !matches!(frame, Frame::Ours { echoed: false, .. }) {
                        break frame;
                    }
                };
                ensure!(back == Frame::Ours { sequence, echoed: true }, "{back:?} instead of {sequence}");
            }
            let done = machine.console.device("net-stop", net_done)?;
            ensure!(done.received == 100 && done.lost + done.duplicate + done.corrupt == 0, "{done:?}");
            ensure!((done.interrupts > 0) == guest.contains("interrupts"), "{done:?}");
            Ok(())
        })?;
        machine.console.must_run()?;
    }
    Ok(())
}

fn two_guests_talk_to_one_another() -> Result<()> {
    let network = TapNetwork::new(&["t0", "t1"])?;
    network.bridge(&["t0", "t1"])?;
    let sandbox = Sandbox::new()?;
    let mut near = boot(&sandbox, &network, "t0", "net=on")?;
    let mut far = boot(&sandbox, &network, "t1", "net=on,interrupts=on")?;
    far.console.type_line("net-receive forever")?;
    far.console.must_run()?;
    for length in [64, 1500] {
        let done = near.console.device(&format!("net-send {length} once"), net_done)?;
        ensure!(done.sent == 256, "{done:?}");
    }
    far.console.must_run()?;
    let done = far.console.device("net-stop", net_done)?;
    // A queue that is full loses frames, and nothing else does.
    ensure!(done.received + done.lost == 512 && done.received > 256, "{done:?}");
    ensure!(done.duplicate + done.corrupt == 0, "{done:?}");
    Ok(())
}
