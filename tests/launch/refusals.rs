//! What cannot be is refused with a code and one clear line.

use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, ensure};
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [], memory_that_cannot_be);
    trial!(trials, [], options_that_cannot_be);
    trial!(trials, [], addresses_that_cannot_be);
    trial!(trials, [Kvm], kernels_that_cannot_be);
    trial!(trials, [Kvm], what_comes_along_with_a_kernel);
    trial!(trials, [Kvm], processors_that_cannot_be);
    trial!(trials, [], an_api_socket_that_exists);
    trial!(trials, [], a_monitor_that_is_not_there);
    trial!(trials, [Kvm], ranges_that_are_no_ram);
    trial!(trials, [Kvm], what_needs_a_guest_before_there_is_one);
}

/// Runs to the end; checks the code, and that the one line has all of `parts`.
fn refused(sandbox: &Sandbox, arguments: &[&str], code: i32, parts: &[&str]) -> Result<()> {
    let shown = || format!("thermocline {}", arguments.join(" "));
    let ended = sandbox.start("refused", arguments)?.wait().with_context(shown)?;
    let sentence = ended.sentence(code).with_context(shown)?;
    for part in parts {
        ensure!(sentence.contains(part), "{}: {sentence:?} does not say {part:?}", shown());
    }
    Ok(())
}

fn memory_that_cannot_be() -> Result<()> {
    let sandbox = Sandbox::new()?;
    refused(&sandbox, &["run", "--memory", "67108865"], 2, &["67108865", "4096"])?;
    refused(&sandbox, &["run", "--memory", "500GiB"], 2, &["500 GiB", "this host"])?;
    refused(&sandbox, &["run", "--memory", "3TiB"], 2, &["3 TiB"])?;
    refused(&sandbox, &["run", "--memory", "4KiB"], 2, &["4 KiB", "least"])?;
    refused(&sandbox, &["run", "--memory", "32MiB", "--kernel", "workload:cold=64MiB"], 2, &["32 MiB"])
}

fn options_that_cannot_be() -> Result<()> {
    let sandbox = Sandbox::new()?;
    refused(&sandbox, &["run", "--kernel", "workload:working-set=5"], 2, &["working-set"])?;
    refused(&sandbox, &["run", "--kernel", "workload:colour=red"], 2, &["options are"])?;
    refused(&sandbox, &["run", "--cpus", "0"], 2, &["0 vCPUs"])?;
    refused(&sandbox, &["run", "--cpus", "3"], 2, &["3 vCPUs"])?;
    refused(&sandbox, &["run", "--serial", "modem"], 2, &["modem", "stdio"])?;
    refused(&sandbox, &["run", "--serial", "file=/no/such/folder/log"], 1, &["/no/such/folder/log"])
}

/// Of the levels one after another: from the first on that this host cannot be, it can be none, and says what it lacks.
fn processors_that_cannot_be() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut lacks = Vec::new();
    for level in ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
        let process = sandbox.start("level", &["run", "--cpu", level, "--dry-run"])?;
        let ended = process.wait()?;
        if ended.code() == Some(0) {
            ensure!(lacks.is_empty(), "this host can be {level}, and lacks {lacks:?}");
            let printed = process.stdout.lines();
            ensure!(printed.contains(&format!("cpu = \"{level}\"")), "{printed:?}");
            continue;
        }
        let sentence = ended.sentence(2)?;
        ensure!(sentence.contains(&format!("cannot be {level}: it lacks ")), "{sentence:?}");
        ensure!(ended.sentence(2)? == sandbox.start("level", &["run", "--cpu", level])?.wait()?.sentence(2)?);
        lacks.push(sentence.to_owned());
    }
    ensure!(sandbox.start("level", &["run", "--cpu", "x86-64-v5"])?.wait()?.code() == Some(2), "x86-64-v5 is taken");
    Ok(())
}

fn addresses_that_cannot_be() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for address in ["", "localhost:4000", "tcp:localhost", "tcp::1", "tcp:host:99999", "unix:", "rdma:host:1"] {
        refused(&sandbox, &["receive", "--listen", address], 2, &["is not an address", "tcp:HOST:PORT"])?;
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp:{}", taken.local_addr()?);
    refused(&sandbox, &["receive", "--listen", &address], 1, &["cannot listen", &address])
}

fn kernels_that_cannot_be() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let write = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = sandbox.path(name);
        std::fs::write(&path, bytes)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let mut bz_image = vec![0; 4096];
    bz_image[0x202..0x206].copy_from_slice(b"HdrS");
    let bz_image = write("bzImage", &bz_image)?;
    refused(&sandbox, &["run", "--kernel", &bz_image], 1, &[&bz_image, "boot protocol 0.00", "2.12"])?;
    let text = write("notes", b"not a kernel at all, but longer than the magic of any format\n")?;
    refused(&sandbox, &["run", "--kernel", &text], 1, &["kernel", "neither a bzImage", "nor an ELF", "vmlinuz"])?;
    let archive = write("initrd.img", b"070701 and so on")?;
    refused(&sandbox, &["run", "--kernel", &archive], 1, &["cpio", "--initramfs"])?;
    let empty = write("empty", b"")?;
    refused(&sandbox, &["run", "--kernel", &empty], 1, &["kernel", "empty"])?;
    // An ELF like any other, without a PVH note.
    refused(&sandbox, &["run", "--kernel", "/bin/true"], 1, &["kernel", "PVH"])?;
    refused(&sandbox, &["run", "--kernel", "/dev/zero"], 1, &["/dev/zero", "a device"])?;
    refused(&sandbox, &["run", "--kernel", "/no/such/kernel"], 1, &["/no/such/kernel"])
}

fn what_comes_along_with_a_kernel() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (kernel, archive, empty) = (sandbox.path("kernel"), sandbox.path("archive"), sandbox.path("empty"));
    std::fs::write(&kernel, workload_guest::ELF)?;
    std::fs::File::create(&archive)?.set_len(100 << 20)?;
    std::fs::write(&empty, "")?;
    let [kernel, archive, empty] = [kernel, archive, empty].map(|path| path.to_string_lossy().into_owned());
    let run = |more: &[&str], parts: &[&str]| {
        let arguments = [&["run", "--memory", "64MiB", "--kernel", &kernel], more].concat();
        refused(&sandbox, &arguments, 1, parts)
    };
    run(&["--initramfs", &archive], &["100 MiB", "free beside the kernel", "--memory"])?;
    run(&["--initramfs", &empty], &[&empty, "is empty"])?;
    run(&["--initramfs", "/no/such/archive"], &["initramfs /no/such/archive"])?;
    run(&["--initramfs", "/proc"], &["a folder"])?;
    run(&["--cmdline", &"x".repeat(5000)], &["5000 bytes", "--cmdline"])?;
    refused(&sandbox, &["run", "--cmdline", "quiet"], 1, &["--kernel workload:OPTIONS"])
}

fn an_api_socket_that_exists() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let path = sandbox.path("taken.sock");
    let _listener = UnixListener::bind(&path)?;
    let path_text = path.to_string_lossy();
    refused(&sandbox, &["run", "--api-socket", &path_text], 3, &[&path_text, "exists"])?;
    refused(
        &sandbox,
        &["receive", "--listen", "tcp:127.0.0.1:0", "--api-socket", &path_text],
        3,
        &[&path_text, "exists"],
    )?;
    ensure!(path.exists(), "somebody else's socket was removed");
    Ok(())
}

fn a_monitor_that_is_not_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (nothing, file, dead) = (sandbox.path("nothing.sock"), sandbox.path("file"), sandbox.path("dead.sock"));
    std::fs::write(&file, "")?;
    drop(UnixListener::bind(&dead)?);
    for path in [nothing, file, dead] {
        let path = path.to_string_lossy();
        for command in [&["ctl", "--api-socket", &path, "status"][..], &["pages", "--api-socket", &path]] {
            refused(&sandbox, command, 1, &[&path, "is a thermocline running"])?;
        }
        let to = ["migrate", "--api-socket", &path, "--to", "tcp:127.0.0.1:1"];
        refused(&sandbox, &to, 1, &[&path, "is a thermocline running"])?;
    }
    Ok(())
}

fn ranges_that_are_no_ram() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
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
    let sandbox = Sandbox::new()?;
    let waiting = sandbox.receive(&Workload::default())?.machine;
    for command in [&["pause"][..], &["resume"], &["page-out"]] {
        let (ended, _) = waiting.ctl(command)?;
        ensure!(ended.sentence(1)?.contains("no guest"), "{command:?}: {ended:?}");
    }
    let (ended, _) = waiting.ctl(&["cancel-migration"])?;
    ensure!(ended.sentence(1)?.contains("no migration"), "{ended:?}");
    let api = waiting.api.to_string_lossy().into_owned();
    refused(&sandbox, &["pages", "--api-socket", &api], 1, &["no guest"])?;
    refused(&sandbox, &["migrate", "--api-socket", &api, "--to", "tcp:127.0.0.1:1"], 1, &["no guest"])?;
    ensure!(waiting.ctl(&["status"])?.1.join("").contains("waiting"), "it does not wait any more");
    Ok(())
}
