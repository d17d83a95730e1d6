//! A guest whose disk and network are busy all the time moves back and forth, with every policy, and now and then the connection
//! is cut at any moment: no request is lost or done twice, no frame comes twice, no page loses its contents, and no monitor
//! keeps a descriptor.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use harness::echo;
use harness::tap::TapNetwork;
use thermocline_tests::console::eventually;
use thermocline_tests::cutter::Cutter;
use thermocline_tests::disk::{Disk, job, must_be_right};
use thermocline_tests::owner::destination_only;
use thermocline_tests::random::Random;
use thermocline_tests::trials::give_more_time;
use thermocline_tests::{How, Machine, Sandbox, Trials, Workload, trial};
use workload_guest::Line;
use workload_guest::device_report::NetDone;

use crate::net::{AT_T0, MAC, two_taps};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Network, Zram], a_busy_guest_moves_again_and_again);
}

/// How often the guest moves, by hand.
const TIMES: &str = "THERMOCLINE_TESTS_SOAK_TIMES";
/// One of so many connections is cut.
const CUT_ONE_OF: u64 = 10;
/// A switchover without one comes earlier than this.
const CUT_WITHIN_MS: u64 = 120;

const HOWS: [&[&str]; 5] = [
    &["--cold", "paced"],
    &["--cold", "eager"],
    &["--cold", "lazy", "--cold-rate", "0"],
    &["--switchover", "now", "--cold-rate", "0"],
    &["--cold", "lazy", "--switchover", "now", "--cold-rate", "256MiB"],
];

/// So few blocks that a request that is done late, or once more, meets what was written there since.
const DISK_BYTES: u64 = 512 << 10;
const GUEST: Workload = Workload { memory: 80, working_set: 4, cold: 8, rate: 500, writes: 50, cpus: 1 };

fn net_done(line: Line) -> Option<NetDone> {
    if let Line::NetDone(done) = line { Some(done) } else { None }
}

/// What has become of a migration whose connection may have been cut.
enum Outcome {
    Moved(Machine),
    /// The guest goes on where it was.
    Stayed,
}

/// The trial's state between moves.
struct Soak<'a> {
    sandbox: &'a Sandbox,
    network: &'a TapNetwork,
    disk: &'a Disk,
    random: Random,
    cuts: u32,
    stayed: u32,
}

impl Soak<'_> {
    /// Moves the guest to this tap in this manner, if nothing is cut.
    fn attempt(&mut self, here: &mut Machine, tap: &str, how: &[&str], is_cut: bool) -> Result<Outcome> {
        let net = format!("id=net0,tap={tap}");
        let options = ["--disk", &self.disk.option(), "--net", &net];
        let destination = self.sandbox.receive_behind(&self.network.prefix(), "tcp:127.0.0.1:0", &options, &GUEST)?;
        let mut there = destination.machine;
        let cutter = self.network.within(|| Cutter::new(&destination.address))?;
        let migration = here.migrate(cutter.address(), &How::with(how))?;
        if is_cut {
            std::thread::sleep(Duration::from_millis(self.random.below(CUT_WITHIN_MS)));
            cutter.cut();
            self.cuts += 1;
        }
        let ended = migration.end()?;
        match ended.code() {
            Some(0) => {
                destination_only(here, &mut there)?;
                Ok(Outcome::Moved(there))
            }
            // Nobody has confirmed that it runs there: a person looks, and says which one goes on.
            Some(20) => {
                let runs_there = there.process.wait_within(Duration::from_millis(500)).is_err();
                if runs_there {
                    ensure!(here.ctl(&["quit"])?.0.code() == Some(0), "quit");
                    here.process.wait()?;
                    there.must_go_on()?;
                    return Ok(Outcome::Moved(there));
                }
                ensure!(here.ctl(&["resume", "--force"])?.0.code() == Some(0), "resume --force");
                here.must_go_on()?;
                Ok(Outcome::Stayed)
            }
            code if is_cut => {
                ended.sentence(code.context("the client was killed")?)?;
                there.process.wait().context("the destination")?;
                there.console.must_be_silent()?;
                here.must_go_on()?;
                self.stayed += 1;
                Ok(Outcome::Stayed)
            }
            _ => bail!("the migration failed: {} {:?}", ended.status, ended.stderr),
        }
    }
}

/// Open descriptors of a process.
fn descriptors(machine: &Machine) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", machine.process.pid()))?.count())
}

/// Waits until a monitor has no more descriptors open than these: what a migration takes goes with it.
fn must_fall_to(machine: &Machine, most: usize) -> Result<()> {
    eventually("descriptors are closed", || Ok(descriptors(machine)? <= most)).with_context(|| {
        format!("{} descriptors are open in place of {most}", descriptors(machine).unwrap_or_default())
    })
}

/// The number of descriptors to which a monitor comes when all that follows a guest's arrival is over.
fn settled(machine: &Machine) -> Result<usize> {
    let mut least = descriptors(machine)?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        least = least.min(descriptors(machine)?);
    }
    Ok(least)
}

fn a_busy_guest_moves_again_and_again() -> Result<()> {
    let times: u32 = std::env::var(TIMES).ok().map_or(Ok(10), |times| times.parse())?;
    let network = two_taps()?;
    let sandbox = Sandbox::new()?;
    let folder = tempfile::tempdir()?;
    let disk = Disk::new(&folder.path().join("disk.img"), DISK_BYTES, "")?;
    let driving = format!("disk={DISK_BYTES},net=on,interrupts=on");
    let options = ["--disk", &disk.option(), "--net", AT_T0];
    let mut here = sandbox.boot_driving(&network.prefix(), &GUEST, &driving, &options)?;
    let ready = here.console.ready()?;
    job(&mut here, "disk write sequential 4096 8 once")?;
    here.console.type_line("disk mixed random 4096 32 forever")?;
    here.console.type_line("net-echo forever")?;
    let random = Random::new(0x50a4);
    let mut soak = Soak { sandbox: &sandbox, network: &network, disk: &disk, random, cuts: 0, stayed: 0 };
    let ((mut here, soak), heard) = echo::during(&network, "b0", MAC, (200, Duration::from_millis(1)), || {
        // A guest whose memory came by post-copy has its faults handled by whoever has received it, for good.
        let (mut at, mut most) = (0, [None; 2]);
        for time in 0..times {
            give_more_time();
            let how = HOWS[time as usize % HOWS.len()];
            here.page_out_cold(&ready)?;
            // One is cut in the short form too.
            let is_cut = time == 1 || soak.random.below(CUT_ONE_OF) == 0;
            let before = descriptors(&here)?;
            let tap = ["t0", "t1"][1 - at];
            let outcome = soak.attempt(&mut here, tap, how, is_cut);
            match outcome.with_context(|| format!("move {time}, {how:?}, cut: {is_cut}"))? {
                Outcome::Stayed => must_fall_to(&here, before).with_context(|| format!("the source of move {time}"))?,
                Outcome::Moved(there) => {
                    (here, at) = (there, 1 - at);
                    let of_kind = &mut most[usize::from(how.contains(&"lazy") || how.contains(&"now"))];
                    let most = *of_kind.get_or_insert(settled(&here)?);
                    must_fall_to(&here, most).with_context(|| format!("the destination of move {time}, {how:?}"))?;
                }
            }
        }
        Ok((here, soak))
    })?;
    ensure!(heard.duplicate + heard.corrupt == 0 && heard.silent_for < Duration::from_secs(2), "{heard:?}");
    let net = here.console.device("net-stop", net_done)?;
    ensure!(net.duplicate + net.corrupt == 0 && net.received >= heard.came, "{net:?} {heard:?}");
    must_be_right(&mut here, &disk)?;
    let Soak { cuts, stayed, .. } = soak;
    println!("{times} moves, {cuts} cut, {stayed} of them given up; {heard:?}");
    Ok(())
}
