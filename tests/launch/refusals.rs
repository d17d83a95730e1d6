//! What cannot be is refused with a code and one clear line.

use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, ensure};
use thermocline_tests::{Lab, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [], memory_that_cannot_be);
    trial!(trials, [], options_that_cannot_be);
    trial!(trials, [], addresses_that_cannot_be);
    trial!(trials, [Kvm], kernels_that_cannot_be);
    trial!(trials, [], an_api_socket_that_exists);
    trial!(trials, [], a_monitor_that_is_not_there);
    trial!(trials, [Kvm], ranges_that_are_no_ram);
    trial!(trials, [Kvm], what_needs_a_guest_before_there_is_one);
}

/// Runs to the end; checks the code, and that the one line has all of `parts`.
fn refused(lab: &Lab, arguments: &[&str], code: i32, parts: &[&str]) -> Result<()> {
    let shown = || format!("thermocline {}", arguments.join(" "));
    let ended = lab.start("refused", arguments)?.wait().with_context(shown)?;
    let sentence = ended.sentence(code).with_context(shown)?;
    for part in parts {
        ensure!(sentence.contains(part), "{}: {sentence:?} does not say {part:?}", shown());
    }
    Ok(())
}

fn memory_that_cannot_be() -> Result<()> {
    let lab = Lab::new()?;
    refused(&lab, &["run", "--memory", "67108865"], 2, &["67108865", "4096"])?;
    refused(&lab, &["run", "--memory", "500GiB"], 2, &["500 GiB", "this host"])?;
    refused(&lab, &["run", "--memory", "3TiB"], 2, &["3 TiB"])?;
    refused(&lab, &["run", "--memory", "4KiB"], 2, &["4 KiB", "least"])?;
    refused(&lab, &["run", "--memory", "32MiB", "--kernel", "workload:cold=64MiB"], 2, &["32 MiB"])
}

fn options_that_cannot_be() -> Result<()> {
    let lab = Lab::new()?;
    refused(&lab, &["run", "--kernel", "workload:working-set=5"], 2, &["working-set"])?;
    refused(&lab, &["run", "--kernel", "workload:colour=red"], 2, &["options are"])?;
    refused(&lab, &["run", "--cpus", "0"], 2, &["0 vCPUs"])?;
    refused(&lab, &["run", "--cpus", "3"], 2, &["3 vCPUs"])?;
    refused(&lab, &["run", "--serial", "modem"], 2, &["modem", "stdio"])?;
    refused(&lab, &["run", "--serial", "file=/no/such/folder/log"], 1, &["/no/such/folder/log"])
}

fn addresses_that_cannot_be() -> Result<()> {
    let lab = Lab::new()?;
    for address in ["", "localhost:4000", "tcp:localhost", "tcp::1", "tcp:host:99999", "unix:", "rdma:host:1"] {
        refused(&lab, &["receive", "--listen", address], 2, &["is not an address", "tcp:HOST:PORT"])?;
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp:{}", taken.local_addr()?);
    refused(&lab, &["receive", "--listen", &address], 1, &["cannot listen", &address])
}

fn kernels_that_cannot_be() -> Result<()> {
    let lab = Lab::new()?;
    let write = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = lab.path(name);
        std::fs::write(&path, bytes)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let mut bz_image = vec![0; 4096];
    bz_image[0x202..0x206].copy_from_slice(b"HdrS");
    let bz_image = write("bzImage", &bz_image)?;
    refused(&lab, &["run", "--kernel", &bz_image], 1, &[&bz_image, "bzImage", "vmlinux"])?;
    let text = write("notes", b"not a kernel at all, but longer than the magic of any format\n")?;
    refused(&lab, &["run", "--kernel", &text], 1, &["kernel"])?;
    let empty = write("empty", b"")?;
    refused(&lab, &["run", "--kernel", &empty], 1, &["kernel"])?;
    // An ELF like any other, without a PVH note.
    refused(&lab, &["run", "--kernel", "/bin/true"], 1, &["kernel"])?;
    refused(&lab, &["run", "--kernel", "/no/such/kernel"], 1, &["/no/such/kernel"])
}

fn an_api_socket_that_exists() -> Result<()> {
    let lab = Lab::new()?;
    let path = lab.path("taken.sock");
    let _listener = UnixListener::bind(&path)?;
    let path_text = path.to_string_lossy();
    refused(&lab, &["run", "--api-socket", &path_text], 3, &[&path_text, "exists"])?;
    refused(&lab, &["receive", "--listen", "tcp:127.0.0.1:0", "--api-socket", &path_text], 3, &[&path_text, "exists"])?;
    ensure!(path.exists(), "somebody else's socket was removed");
    Ok(())
}

fn a_monitor_that_is_not_there() -> Result<()> {
    let lab = Lab::new()?;
    let (nothing, file, dead) = (lab.path("nothing.sock"), lab.path("file"), lab.path("dead.sock"));
    std::fs::write(&file, "")?;
    drop(UnixListener::bind(&dead)?);
    for path in [nothing, file, dead] {
        let path = path.to_string_lossy();
        for command in [&["ctl", "--api-socket", &path, "status"][..], &["pages", "--api-socket", &path]] {
            refused(&lab, command, 1, &[&path, "is a thermocline running"])?;
        }
        let to = ["migrate", "--api-socket", &path, "--to", "tcp:127.0.0.1:1"];
        refused(&lab, &to, 1, &[&path, "is a thermocline running"])?;
    }
    Ok(())
}

fn ranges_that_are_no_ram() -> Result<()> {
    let lab = Lab::new()?;
    let mut machine = lab.boot(&Workload::default())?;
    for range in ["0x4000000+4096", "0x3fff000+8192", "0+100", "5+4096", "0+0", "0xfffffffffffff000+8192"] {
        let (ended, said) = machine.ctl(&["page-out", "--range", range])?;
        let sentence = ended.sentence(1).with_context(|| range.to_owned())?;
        ensure!(sentence.contains("guest RAM") && said.is_empty(), "{range}: {sentence} {said:?}");
    }
    // Nothing to do with the machine: the command line is wrong.
    for range in ["5", "a+b", "0x+1"] {
        let (ended, _) = machine.ctl(&["page-out", "--range", range])?;
        ensure!(ended.code() == Some(2), "{range}: {ended:?}");
    }
    machine.must_go_on()
}

fn what_needs_a_guest_before_there_is_one() -> Result<()> {
    let lab = Lab::new()?;
    let waiting = lab.receive(&Workload::default())?.machine;
    for command in [&["pause"][..], &["resume"], &["page-out"]] {
        let (ended, _) = waiting.ctl(command)?;
        ensure!(ended.sentence(1)?.contains("no guest"), "{command:?}: {ended:?}");
    }
    let (ended, _) = waiting.ctl(&["cancel-migration"])?;
    ensure!(ended.sentence(1)?.contains("no migration"), "{ended:?}");
    let api = waiting.api.to_string_lossy().into_owned();
    refused(&lab, &["pages", "--api-socket", &api], 1, &["no guest"])?;
    refused(&lab, &["migrate", "--api-socket", &api, "--to", "tcp:127.0.0.1:1"], 1, &["no guest"])?;
    ensure!(waiting.ctl(&["status"])?.1.join("").contains("waiting"), "it does not wait any more");
    Ok(())
}
