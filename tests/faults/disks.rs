//! A disk that cannot go where its guest goes, or whose storage fails on the way.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, fcntl_lock};
use thermocline_tests::disk::{self, Disk, counts, job, must_be_right};
use thermocline_tests::owner::{destination_only, source_only, source_paused};
use thermocline_tests::proxy::{Fault, Proxy, Way, Which, Wrong};
use thermocline_tests::{How, Machine, Sandbox, Trials, linux, trial};

use harness::mount::Mount;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], an_image_is_one_machines);
    trial!(trials, [Kvm, Qemu], an_image_is_qemus_or_ours);
    trial!(trials, [Kvm], a_disk_that_cannot_be_there_is_refused_by_name);
    trial!(trials, [Kvm], an_image_that_somebody_else_has_there);
    trial!(trials, [Kvm], a_guest_that_may_run_there_does_not_go_on_here);
    trial!(trials, [Kvm], the_source_killed_after_commit_with_requests_under_way);
    trial!(trials, [Kvm], the_destination_killed_before_commit_lets_go);
    trial!(trials, [Kvm, Root, Mount], a_request_that_does_not_end);
    trial!(trials, [Kvm, Root, Mount], storage_that_is_full_there);
}

const BYTES: u64 = 512 << 10;
const WORK: &str = "disk mixed random 4096 32 forever";

fn disk_in(sandbox: &Sandbox, name: &str) -> Result<Disk> {
    Disk::new(&sandbox.path(name), BYTES, "")
}

/// A machine whose disk is at work.
fn at_work(sandbox: &Sandbox, disk: &Disk) -> Result<Machine> {
    let mut machine = disk.boot(sandbox, ",interrupts=on")?;
    job(&mut machine, "disk write sequential 4096 8 once")?;
    machine.console.type_line(WORK)?;
    machine.console.must_run()?;
    Ok(machine)
}

/// `thermocline run` with this disk is refused, with a sentence that has all `parts`.
fn is_refused(sandbox: &Sandbox, disk: &Disk, parts: &[&str]) -> Result<()> {
    let second = sandbox.start("second", &["run", "--kernel", "workload", "--disk", &disk.option()])?;
    let ended = second.wait()?;
    let sentence = ended.sentence(2)?;
    ensure!(parts.iter().all(|part| sentence.contains(part)), "{sentence:?}");
    Ok(())
}

fn an_image_is_one_machines() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let disk = disk_in(&sandbox, "disk.img")?;
    let mut first = at_work(&sandbox, &disk)?;
    let name = disk.path.display().to_string();
    is_refused(&sandbox, &disk, &[&name, "in use by another process", "readonly"])?;
    let reader = Disk { options: ",readonly".into(), ..disk.clone() };
    is_refused(&sandbox, &reader, &[&name, "in use by another process"])?;
    // Handed over, it is the other's.
    let destination = disk.receive(&sandbox, &first.workload)?;
    let mut there = destination.machine;
    first.migrate(&destination.address, &How::usual())?.succeeds()?;
    is_refused(&sandbox, &disk, &["in use by another process"])?;
    destination_only(&first, &mut there)?;
    is_refused(&sandbox, &disk, &["in use by another process"])?;
    must_be_right(&mut there, &disk)?;
    drop(there);
    first = disk.boot(&sandbox, "")?;
    first.console.must_run().map(drop)
}

fn qemu(disk: &Disk) -> Result<std::process::Child> {
    let drive = format!("file={},format=raw,if=none,id=disk", disk.path.display());
    let machine = ["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"];
    let child = Command::new(linux::qemu())
        .args(machine)
        .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    child.context("QEMU cannot be started")
}

fn an_image_is_qemus_or_ours() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let disk = disk_in(&sandbox, "disk.img")?;
    let ours = at_work(&sandbox, &disk)?;
    let refused = qemu(&disk)?.wait_with_output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("lock"), "QEMU took it: {said:?}");
    drop(ours);
    let mut theirs = qemu(&disk)?;
    // Its monitor greets once the machine is made.
    let greeted = std::io::BufRead::read_line(
        &mut std::io::BufReader::new(theirs.stdout.take().context("no output")?),
        &mut String::new(),
    );
    let refused = greeted.map_err(Into::into).and_then(|_| is_refused(&sandbox, &disk, &["in use by another process"]));
    theirs.kill()?;
    theirs.wait()?;
    refused
}

/// The destination refuses with the code for devices before a page has been sent, and names the disk; the guest goes on.
fn refused_there(sandbox: &Sandbox, source: &mut Machine, options: &[&str], parts: &[&str]) -> Result<()> {
    let there = sandbox.receive_on("tcp:127.0.0.1:0", options, &source.workload)?;
    let migration = source.migrate(&there.address, &How::usual())?;
    let sentence = migration.fails(13)?;
    ensure!(parts.iter().all(|part| sentence.contains(part)), "{sentence:?} does not say {parts:?}");
    ensure!(migration.process.stdout.is_empty(), "pages were sent: {:?}", migration.process.stdout.lines());
    let said = source_only(source, &there.machine, 13)?;
    ensure!(parts.iter().all(|part| said.contains(part)), "{said:?} does not say {parts:?}");
    Ok(())
}

fn a_disk_that_cannot_be_there_is_refused_by_name() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let disk = disk_in(&sandbox, "disk.img")?;
    let mut source = at_work(&sandbox, &disk)?;
    let option = disk.option();
    let small = sandbox.path("small.img");
    File::create(&small)?.set_len(BYTES)?;
    let (small, missing) = (format!("path={}", small.display()), sandbox.path("missing.img"));
    let missing = format!("path={}", missing.display());
    let readonly = format!("{option},readonly");
    let folder = format!("path={}", sandbox.path("x").parent().context("no folder")?.display());
    for (options, parts) in [
        (&[][..], &["'disk0'", "--disk path=FILE,id=disk0"][..]),
        (&["--disk", &option, "--disk", &format!("{small},id=more")], &["'more'", "leave it out"]),
        (&["--disk", &format!("{option},id=other")], &["'other'", "id=NAME"]),
        (&["--disk", &small], &["'disk0'", "2048 sectors", "has 1024"]),
        (&["--disk", &missing], &["'disk0'", "missing.img", "No such file"]),
        (&["--disk", &readonly], &["'disk0'", "opened for reading alone"]),
        (&["--disk", &folder], &["'disk0'", "neither a file nor a block device"]),
    ] {
        refused_there(&sandbox, &mut source, options, parts).with_context(|| format!("{options:?}"))?;
    }
    for key in ["serial=S", "queues=2"] {
        let said = sandbox
            .start("receive", &["receive", "--listen", "tcp:127.0.0.1:0", "--disk", &format!("{option},{key}")])?;
        let ended = said.wait()?;
        let sentence = ended.sentence(2)?;
        ensure!(sentence.contains("leave it out"), "{sentence:?}");
    }
    must_be_right(&mut source, &disk)
}

/// It is locked there when all has been sent: the guest goes on, and its disk too.
fn an_image_that_somebody_else_has_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let disk = disk_in(&sandbox, "disk.img")?;
    let mut source = at_work(&sandbox, &disk)?;
    let other = disk_in(&sandbox, "other.img")?;
    let lock = File::options().read(true).write(true).open(&other.path)?;
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    let there = other.receive(&sandbox, &source.workload)?;
    let sentence = source.migrate(&there.address, &How::usual())?.fails(13)?;
    ensure!(sentence.contains("'disk0'") && sentence.contains("other.img"), "{sentence:?}");
    let said = source_only(&mut source, &there.machine, 13)?;
    ensure!(said.contains("'disk0'") && said.contains("other.img"), "{said:?}");
    is_refused(&sandbox, &disk, &["in use by another process"])?;
    let good = disk.receive(&sandbox, &source.workload)?;
    let mut there = good.machine;
    source.migrate(&good.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut there)?;
    must_be_right(&mut there, &disk)
}

struct Struck {
    sandbox: Sandbox,
    disk: Disk,
    source: Machine,
    destination: Machine,
    migration: thermocline_tests::Migration,
    proxy: Proxy,
}

/// A migration with a busy disk through a proxy that has just done its fault.
fn strike(way: Way, frame: &'static str, wrong: Wrong) -> Result<Struck> {
    let sandbox = Sandbox::new()?;
    let disk = disk_in(&sandbox, "disk.img")?;
    let source = at_work(&sandbox, &disk)?;
    let there = disk.receive(&sandbox, &source.workload)?;
    let proxy = Proxy::with_fault(&there.address, Fault { way, frame, which: Which::Nth(0), wrong })?;
    let migration = source.migrate(&proxy.address, &How::usual())?;
    proxy.wait_struck()?;
    Ok(Struck { sandbox, disk, source, destination: there.machine, migration, proxy })
}

/// The guest runs there and nobody has said so here: by force it goes on here only once it is gone there.
fn a_guest_that_may_run_there_does_not_go_on_here() -> Result<()> {
    let mut struck = strike(Way::Back, "running", Wrong::CutBefore)?;
    struck.migration.fails_at_once(20)?;
    struck.destination.must_go_on()?;
    source_paused(&struck.source)?;
    let (forced, _) = struck.source.ctl(&["resume", "--force"])?;
    let sentence = forced.sentence(1)?;
    ensure!(sentence.contains("'disk0'") && sentence.contains("end it there first"), "{sentence:?}");
    source_paused(&struck.source)?;
    must_be_right(&mut struck.destination, &struck.disk)?;
    struck.destination.process.kill();
    struck.destination.process.wait()?;
    let (forced, _) = struck.source.ctl(&["resume", "--force"])?;
    ensure!(forced.code() == Some(0), "{forced:?}");
    struck.source.console.must_run().map(drop)
}

fn the_source_killed_after_commit_with_requests_under_way() -> Result<()> {
    let mut struck = strike(Way::There, "commit", Wrong::HoldAfter)?;
    struck.source.process.kill();
    struck.source.process.wait()?;
    ensure!(struck.migration.end()?.code() != Some(0), "the client takes it for a success");
    drop(struck.proxy);
    struck.destination.must_go_on()?;
    let before = counts(&struck.destination)?;
    struck.destination.console.must_run()?;
    let after = counts(&struck.destination)?;
    ensure!(after.reads > before.reads && after.writes > before.writes, "{before:?} {after:?}");
    is_refused(&struck.sandbox, &struck.disk, &["in use by another process"])?;
    // It can go on from there.
    let next = struck.disk.receive(&struck.sandbox, &struck.destination.workload)?;
    let mut there = next.machine;
    struck.destination.migrate(&next.address, &How::usual())?.succeeds()?;
    destination_only(&struck.destination, &mut there)?;
    must_be_right(&mut there, &struck.disk)
}

fn the_destination_killed_before_commit_lets_go() -> Result<()> {
    for (way, frame, wrong) in [(Way::There, "state", Wrong::HoldAfter), (Way::Back, "ready", Wrong::HoldBefore)] {
        let mut struck = strike(way, frame, wrong)?;
        struck.destination.process.kill();
        struck.destination.process.wait()?;
        drop(struck.proxy);
        struck.migration.fails_at_once(16)?;
        struck.source.must_go_on()?;
        is_refused(&struck.sandbox, &struck.disk, &["in use by another process"])?;
        let next = struck.disk.receive(&struck.sandbox, &struck.source.workload)?;
        let mut there = next.machine;
        struck.source.migrate(&next.address, &How::usual())?.succeeds()?;
        destination_only(&struck.source, &mut there)?;
        must_be_right(&mut there, &struck.disk).with_context(|| format!("at '{frame}'"))?;
    }
    Ok(())
}

/// A frozen file system takes no write before it is thawed: a request that does not end, for as long as anybody likes.
fn a_request_that_does_not_end() -> Result<()> {
    const WAITS_US: u64 = 500_000;
    let sandbox = Sandbox::new()?;
    let mount = Mount::ext4(&sandbox.path("mount"), 64 << 20)?;
    let disk = Disk::new(&mount.path().join("disk.img"), BYTES, "")?;
    let mut source = at_work(&sandbox, &disk)?;
    let frozen = mount.freeze()?;
    thermocline_tests::console::eventually("a write hangs", || Ok(counts(&source)?.oldest_us > WAITS_US))?;
    let there = disk.receive(&sandbox, &source.workload)?;
    let sentence = source.migrate(&there.address, &How::usual())?.fails(1)?;
    ensure!(sentence.contains("'disk0'"), "{sentence:?}");
    source_only(&mut source, &there.machine, 16)?;
    let hangs = counts(&source)?;
    ensure!(hangs.under_way > 0 && hangs.oldest_us > WAITS_US, "{hangs:?}");
    drop(frozen);
    let good = disk.receive(&sandbox, &source.workload)?;
    let mut there = good.machine;
    source.migrate(&good.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut there)?;
    must_be_right(&mut there, &disk)?;
    drop((source, there));
    mount.remove()
}

fn storage_that_is_full_there() -> Result<()> {
    const USED: u64 = 4 << 20;
    let sandbox = Sandbox::new()?;
    let mount = Mount::tmpfs(&sandbox.path("mount"), 2 << 20)?;
    let disk = Disk::new(&mount.path().join("disk.img"), USED, "")?;
    let source = disk.boot(&sandbox, ",interrupts=on")?;
    let destination = disk.receive(&sandbox, &source.workload)?;
    let mut there = destination.machine;
    source.migrate(&destination.address, &How::usual())?.succeeds()?;
    destination_only(&source, &mut there)?;
    let full = there.console.device("disk write sequential 65536 4 once", disk::done)?;
    ensure!(full.errors > 0 && full.bad + full.repeated == 0, "{full:?}");
    there.must_go_on()?;
    mount.grow(8 << 20)?;
    job(&mut there, "disk write sequential 65536 4 once")?;
    there.console.type_line(WORK)?;
    there.console.must_run()?;
    std::thread::sleep(Duration::from_millis(100));
    let ended = there.console.device("disk-stop", disk::done)?;
    ensure!(ended.requests > 0 && ended.errors + ended.bad + ended.repeated == 0, "{ended:?}");
    drop((source, there));
    mount.remove()
}
