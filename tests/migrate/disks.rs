//! A guest whose disk is at work arrives: what it was told is on the disk is there, and every request is answered once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use harness::tap::{Interface, TapNetwork};
use thermocline_tests::disk::{Disk, job, must_be_right};
use thermocline_tests::owner::destination_only;
use thermocline_tests::{How, Machine, Sandbox, Trials, trial};
use workload_guest::frame::{self, Frame, Sequence};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], a_busy_disk_there_and_back);
    trial!(trials, [Kvm], a_busy_disk_past_the_page_cache);
    trial!(trials, [Kvm], a_busy_disk_whose_memory_follows);
    trial!(trials, [Kvm], what_is_read_while_the_guest_moves_arrives);
    trial!(trials, [Kvm], a_disk_that_is_only_read);
    trial!(trials, [Kvm, Root, Network], disk_and_network_are_busy);
}

/// So few blocks that a request that is done late, or once more, meets what was written there since.
const FEW: u64 = 512 << 10;
const MANY: u64 = 8 << 20;

/// Moves a guest whose disk does `doing` so many times; everything must be as it should then.
fn moves(disk: &Disk, guest: &str, doing: &str, how: &How, times: usize) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut here = disk.boot(&sandbox, guest)?;
    job(&mut here, "disk write sequential 4096 8 once")?;
    here.console.type_line(doing)?;
    for time in 0..times {
        here.console.must_run()?;
        here = move_on(&sandbox, disk, here, how).with_context(|| format!("move {time}"))?;
    }
    must_be_right(&mut here, disk)
}

fn move_on(sandbox: &Sandbox, disk: &Disk, here: Machine, how: &How) -> Result<Machine> {
    let destination = disk.receive(sandbox, &here.workload)?;
    let mut there = destination.machine;
    here.migrate(&destination.address, how)?.succeeds()?;
    destination_only(&here, &mut there)?;
    Ok(there)
}

fn image() -> Result<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.img");
    Ok((folder, path))
}

fn disk(path: &Path, bytes: u64, options: &str) -> Result<Disk> {
    Disk::new(path, bytes, options)
}

fn a_busy_disk_there_and_back() -> Result<()> {
    for guest in ["", ",interrupts=on"] {
        let (_folder, path) = image()?;
        let disk = disk(&path, FEW, "")?;
        moves(&disk, guest, "disk mixed random 4096 32 forever", &How::usual(), 3).with_context(|| guest.to_owned())?;
    }
    Ok(())
}

fn a_busy_disk_past_the_page_cache() -> Result<()> {
    let (_folder, path) = image()?;
    let disk = disk(&path, FEW, ",direct")?;
    moves(&disk, ",interrupts=on", "disk mixed random 4096 32 forever", &How::usual(), 3)
}

fn a_busy_disk_whose_memory_follows() -> Result<()> {
    for how in [&["--cold", "lazy"][..], &["--switchover", "now"]] {
        let (_folder, path) = image()?;
        let disk = disk(&path, FEW, "")?;
        let moved = moves(&disk, ",interrupts=on", "disk mixed random 4096 32 forever", &How::with(how), 2);
        moved.with_context(|| format!("{how:?}"))?;
    }
    Ok(())
}

/// The kernel writes what is read into guest memory, behind the dirty log's back: a page of which the migration does not hear
/// holds at the destination what was read into it before.
fn what_is_read_while_the_guest_moves_arrives() -> Result<()> {
    for how in [How::usual(), How::with(&["--switchover", "now"])] {
        let (_folder, path) = image()?;
        let disk = disk(&path, MANY, ",direct")?;
        moves(&disk, ",interrupts=on", "disk read random 65536 32 forever", &how, 3)?;
    }
    Ok(())
}

fn a_disk_that_is_only_read() -> Result<()> {
    let (_folder, path) = image()?;
    let written = disk(&path, FEW, "")?;
    {
        let sandbox = Sandbox::new()?;
        let mut machine = written.boot(&sandbox, "")?;
        job(&mut machine, "disk write sequential 4096 8 once")?;
        job(&mut machine, "disk-flush")?;
    }
    let sandbox = Sandbox::new()?;
    let read = Disk { options: ",readonly".into(), ..written.clone() };
    let mut here = read.boot(&sandbox, ",interrupts=on")?;
    // Whoever else reads it may.
    let other = read.boot(&sandbox, "")?;
    here.console.type_line("disk read random 4096 32 forever")?;
    here.console.must_run()?;
    // That the guest cannot write is known there.
    let mut there = move_on(&sandbox, &written, here, &How::usual())?;
    let done = there.console.device("disk-stop", thermocline_tests::disk::done)?;
    ensure!(done.requests > 0 && done.errors + done.bad + done.repeated == 0, "{done:?}");
    drop(other);
    Ok(())
}

fn disk_and_network_are_busy() -> Result<()> {
    let network = TapNetwork::new(&["t0", "t1"])?;
    network.bridge(&["t0", "t1"])?;
    let sandbox = Sandbox::new()?;
    let (_folder, path) = image()?;
    let disk = disk(&path, FEW, "")?;
    let guest = format!("disk={FEW},net=on,interrupts=on");
    let arguments = ["--disk", &disk.option(), "--net", "tap=t0,id=net0"];
    let mut here = sandbox.boot_devices(&network.prefix(), &guest, &arguments)?;
    job(&mut here, "disk write sequential 4096 8 once")?;
    std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let network = &network;
        let wire = scope.spawn(move || -> Result<(Sequence, u64)> {
            network.enter()?;
            let bridge = Interface::open("b0", true)?;
            let (mut came, mut frames) = (Sequence::default(), 0);
            while stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
                while let Some(bytes) = bridge.receive()? {
                    let Frame::Ours { sequence, .. } = frame::read(&bytes) else { continue };
                    came.take(sequence);
                    frames += 1;
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            Ok((came, frames))
        });
        let moved = (|| -> Result<()> {
            here.console.type_line("net-send 64 forever")?;
            here.console.type_line("disk mixed random 4096 32 forever")?;
            here.console.must_run()?;
            let more = ["--disk", &disk.option(), "--net", "tap=t1,id=net0"];
            let listen = format!("unix:{}", sandbox.path("move.sock").display());
            let there = sandbox.receive_behind(&network.prefix(), &listen, &more, &here.workload)?;
            let mut destination = there.machine;
            here.migrate(&there.address, &How::usual())?.succeeds()?;
            destination_only(&here, &mut destination)?;
            let sent = destination.console.device("net-stop", |line| {
                if let workload_guest::Line::NetDone(done) = line { Some(done) } else { None }
            })?;
            ensure!(sent.sent > 0, "{sent:?}");
            must_be_right(&mut destination, &disk)
        })();
        drop(stop);
        let (came, frames) = wire.join().ok().context("the thread at the bridge panicked")??;
        moved?;
        ensure!(frames > 0 && came.duplicate == 0, "{frames} frames came: {came:?}");
        Ok(())
    })
}
