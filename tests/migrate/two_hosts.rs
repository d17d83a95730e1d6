//! Two hosts with a network between them that is slower than memory.

use anyhow::{Result, ensure};
use harness::network::{Network, SECOND};
use thermocline_tests::owner::{destination_only, source_only};
use thermocline_tests::{How, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Network], the_rate_is_shown);
    trial!(trials, [Kvm, Root, Network], too_slow_a_network_is_told);
    trial!(trials, [Kvm, Root, Network], a_host_that_is_not_there);
}

const MBIT: u32 = 200;
/// The same in bytes.
const RATE: u64 = MBIT as u64 * 1_000_000 / 8;

/// Everything of `receive` but its port is known before.
fn listen() -> String {
    format!("tcp:{SECOND}:0")
}

fn the_rate_is_shown() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let network = Network::with_rate(MBIT)?;
    let workload = Workload { memory: 128, working_set: 48, cold: 48, rate: 500, ..Workload::default() };
    let source = sandbox.boot_behind(&network.prefix(0), &workload)?;
    let mut destination = sandbox.receive_behind(&network.prefix(1), &listen(), &[], &workload)?;
    let migrated = source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut destination.machine)?;
    // Past the start, when buffers fill, and while there is much to send.
    let steady: Vec<_> = migrated
        .progress
        .iter()
        .filter(|p| p.elapsed_ms > 2200 && p.owed_hot + p.owed_cold > 2000)
        .map(|p| p.bytes_per_second)
        .collect();
    ensure!(steady.len() > 5, "too little progress is shown: {:?}", migrated.progress.len());
    for rate in steady {
        ensure!(rate > RATE / 2 && rate < RATE * 3 / 2, "{rate} bytes a second are shown, {RATE} are possible");
    }
    let left: Vec<_> = migrated.progress.iter().filter_map(|p| p.left_ms).collect();
    ensure!(left.iter().any(|ms| (500..10_000).contains(ms)), "the time left is not told: {left:?}");
    Ok(())
}

fn too_slow_a_network_is_told() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let network = Network::with_rate(2 * MBIT)?;
    let workload = Workload { working_set: 40, cold: 0, rate: 0, writes: 100, ..Workload::default() };
    let mut source = sandbox.boot_behind(&network.prefix(0), &workload)?;
    let destination = sandbox.receive_behind(&network.prefix(1), &listen(), &[], &workload)?;
    let how = How::with(&["--max-rounds", "3", "--downtime-limit", "10"]);
    let sentence = source.migrate(&destination.address, &how)?.fails(18)?;
    ensure!(sentence.contains("does not converge"), "{sentence:?}");
    source_only(&mut source, &destination.machine, 16).map(drop)
}

fn a_host_that_is_not_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let network = Network::with_rate(MBIT)?;
    let mut source = sandbox.boot_behind(&network.prefix(0), &Workload::default())?;
    // In the same network, so that nobody refuses: there is no answer at all.
    let to = "tcp:10.177.0.77:4000";
    let sentence = source.migrate(to, &How::usual())?.fails(10)?;
    ensure!(sentence.contains(to) && sentence.contains("nobody answers"), "{sentence:?}");
    source.must_go_on()
}
