//! What can be done with a running machine over its API socket.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use thermocline::control::{Answer, FailureKind, MigrationFailure, Response, RunState};
use thermocline_tests::process::TIMEOUT;
use thermocline_tests::random::Random;
use thermocline_tests::trials::unless_the_emulator_fails;
use thermocline_tests::{Machine, Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm], pause_and_resume_stop_and_start_the_guest);
    trial!(trials, [Kvm], two_vcpus_work);
    trial!(trials, [Kvm], six_gib_lie_on_both_sides_of_the_gap);
    trial!(trials, [Kvm], pages_add_up);
    trial!(trials, [Kvm, Root, Zram], page_out_is_what_the_host_sees);
    trial!(trials, [Kvm], garbage_at_the_api_socket_is_answered);
    trial!(trials, [Kvm], failures_have_kinds);
    trial!(trials, [Kvm], requests_with_unknown_fields_are_refused);
    trial!(trials, [Kvm], silent_api_clients_are_in_nobodys_way);
}

fn pause_and_resume_stop_and_start_the_guest() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
    for _ in 0..3 {
        ensure!(machine.ctl(&["pause"])?.0.code() == Some(0), "pause failed");
        ensure!(machine.status()?.state == RunState::Paused, "{:?}", machine.status()?);
        machine.console.must_be_paused()?;
        ensure!(machine.ctl(&["resume"])?.0.code() == Some(0), "resume failed");
        ensure!(machine.status()?.state == RunState::Running, "{:?}", machine.status()?);
        machine.console.must_run()?;
    }
    // As often as one likes.
    machine.ctl(&["pause"])?;
    machine.ctl(&["pause"])?;
    machine.ctl(&["resume"])?;
    machine.ctl(&["resume"])?;
    machine.must_go_on()
}

fn two_vcpus_work() -> Result<()> {
    unless_the_emulator_fails(|| {
        let sandbox = Sandbox::new()?;
        let mut machine = sandbox.boot(&Workload { cpus: 2, rate: 0, ..Workload::default() })?;
        ensure!(machine.console.ready()?.cpus == 2, "not both vCPUs work");
        ensure!(machine.status()?.cpus == 2, "{:?}", machine.status()?);
        machine.must_go_on()
    })
}

fn six_gib_lie_on_both_sides_of_the_gap() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let workload = Workload { memory: 6 << 10, ..Workload::default() };
    let mut machine = sandbox.boot(&workload)?;
    ensure!(machine.status()?.memory.bytes() == 6 << 30, "{:?}", machine.status()?);
    let counts = machine.pages()?.counts;
    ensure!(counts.total() == 6 << 18, "{counts:?}");
    // RAM up to 3 GiB and from 4 GiB on, 3 GiB more.
    for (start, there) in [
        ((3u64 << 30) - 4096, true),
        (3 << 30, false),
        ((4 << 30) - 4096, false),
        (4 << 30, true),
        ((7 << 30) - 4096, true),
        (7 << 30, false),
    ] {
        let (ended, _) = machine.ctl(&["page-out", "--range", &format!("{start:#x}+4096")])?;
        let right = if there { ended.code() == Some(0) } else { ended.sentence(1)?.contains("not all guest RAM") };
        ensure!(right, "{start:#x}: {ended:?}");
    }
    machine.must_go_on()
}

fn pages_add_up() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let machine = sandbox.boot(&Workload::default())?;
    let shown = sandbox.start("pages", &["pages", "--json", "--api-socket", &machine.api.to_string_lossy()])?;
    ensure!(shown.wait()?.code() == Some(0), "pages failed");
    let report: thermocline::control::PagesReport = serde_json::from_str(&shown.stdout.lines().join(""))?;
    ensure!(report.counts.total() == 64 << 8, "{:?}", report.counts);
    ensure!(report.counts.resident >= 32 << 8, "the workload's pages are missing: {:?}", report.counts);
    let cells = report.cells.iter().fold(memory_agent::Counts::default(), |sum, cell| sum + *cell);
    ensure!(cells == report.counts, "the picture's parts are {cells:?}, all is {:?}", report.counts);
    let drawn = sandbox.start("pages", &["pages", "--api-socket", &machine.api.to_string_lossy()])?;
    ensure!(drawn.wait()?.code() == Some(0), "pages failed");
    let text = drawn.stdout.lines().join("\n");
    ensure!(text.contains('█') && text.contains('·') && text.contains("resident"), "{text}");
    Ok(())
}

fn page_out_is_what_the_host_sees() -> Result<()> {
    thermocline_tests::swap::undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let workload = Workload { memory: 96, working_set: 8, cold: 64, ..Workload::default() };
        let mut machine = sandbox.boot(&workload)?;
        let cold = machine.console.ready()?.cold;
        let memory = thermocline_tests::residency::GuestMemory::of(&machine)?;
        let ranges: Vec<String> =
            cold.iter().flat_map(|e| ["--range".into(), format!("{:#x}+{}", e.start, e.len)]).collect();
        let arguments: Vec<&str> = std::iter::once("page-out").chain(ranges.iter().map(String::as_str)).collect();
        let (ended, said) = machine.ctl(&arguments)?;
        ensure!(ended.code() == Some(0), "{ended:?}");
        let said: serde_json::Value = serde_json::from_str(&said.join(""))?;
        ensure!(said.is_object(), "{said}");
        let counts = memory.counts()?;
        ensure!(counts == machine.pages()?.counts, "the host sees {counts:?}, the monitor {:?}", machine.pages()?);
        thermocline_tests::residency::must_be_near("swapped", counts.swapped, cold.pages(), 2)?;
        // The check swaps them all in, whole.
        machine.must_go_on()?;
        ensure!(memory.counts()?.swapped < 64, "{:?}", memory.counts()?);
        Ok(())
    })
}

/// Sends bytes to the API socket; the answer.
fn answer(machine: &Machine, bytes: &[u8]) -> Result<Response> {
    let mut stream = UnixStream::connect(&machine.api)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    // The monitor may have heard enough before the end.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("{line:?} is no answer"))
}

fn garbage_at_the_api_socket_is_answered() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
    let mut random = Random::new(1);
    let mut inputs: Vec<Vec<u8>> = (0..20).map(|n| [random.bytes(n * 37), b"\n".to_vec()].concat()).collect();
    inputs.extend([
        b"".to_vec(),
        b"{\"command\":\"status\"".to_vec(),
        b"{\"command\":\"format-disk\"}\n".to_vec(),
        b"{\"command\":\"page-out\",\"ranges\":[[1,2]]}\n".to_vec(),
        b"{\"command\":\"page-out\",\"ranges\":[[18446744073709551615,4096]]}\n".to_vec(),
        b"{\"command\":\"page-out\",\"ranges\":[[0,0]]}\n".to_vec(),
        b"{\"command\":\"pages\",\"cells\":4294967295}\n".to_vec(),
        b"{\"command\":\"migrate\",\"to\":\"nowhere\",\"cold\":\"paced\",\"window\":1,\"downtime_limit_ms\":1,\"max_rounds\":1}\n".to_vec(),
        [vec![b'['; 100_000], b"\n".to_vec()].concat(),
        vec![b'x'; 3 << 20],
    ]);
    for input in inputs {
        let start = input[..input.len().min(40)].escape_ascii().to_string();
        match answer(&machine, &input).with_context(|| format!("to \"{start}\""))? {
            Response::Error(failure) => ensure!(!failure.text.is_empty(), "{failure:?}"),
            other => anyhow::bail!("{other:?} to \"{start}\""),
        }
    }
    let status = answer(&machine, b"{\"command\":\"status\"}\n")?;
    ensure!(matches!(status, Response::Ok(Answer::Status(_))), "{status:?}");
    machine.must_go_on()
}

fn failures_have_kinds() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let machine = sandbox.boot(&Workload::default())?;
    for (request, kind) in [
        (r#"{"command":"format-disk"}"#, FailureKind::Invalid),
        (r#"{"command":"migrate","to":"nowhere"}"#, FailureKind::Invalid),
        (r#"{"command":"cancel-migration"}"#, FailureKind::NotFound),
        (r#"{"command":"migration"}"#, FailureKind::NotFound),
        (r#"{"command":"page-out","ranges":[[1,2]]}"#, FailureKind::NotFound),
        (r#"{"command":"dump","to":"/nowhere/file"}"#, FailureKind::WrongState),
        (r#"{"command":"migrate","to":"unix:/nowhere"}"#, FailureKind::MigrationFailed),
    ] {
        match answer(&machine, format!("{request}\n").as_bytes())? {
            Response::Error(failure) => {
                ensure!(failure.kind == kind, "{failure:?} to {request}");
                let is_migration = kind == FailureKind::MigrationFailed;
                ensure!(failure.reason == is_migration.then_some(MigrationFailure::Unreachable), "{failure:?}");
            }
            other => anyhow::bail!("{other:?} to {request}"),
        }
    }
    Ok(())
}

/// A field that is not known may be one that matters: better no than half of what was asked for.
fn requests_with_unknown_fields_are_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let machine = sandbox.boot(&Workload::default())?;
    for request in [
        "{\"command\":\"page-out\",\"range\":[[0,4096]]}\n",
        "{\"command\":\"pages\",\"cell\":1}\n",
        "{\"command\":\"status\",\"more\":1}\n",
    ] {
        match answer(&machine, request.as_bytes())? {
            Response::Error(failure) => ensure!(failure.text.contains("unknown field"), "{failure:?}"),
            other => anyhow::bail!("{other:?} to {request}"),
        }
    }
    Ok(())
}

fn silent_api_clients_are_in_nobodys_way() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot(&Workload::default())?;
    let silent: Vec<_> = (0..8).map(|_| UnixStream::connect(&machine.api)).collect::<Result<_, _>>()?;
    ensure!(machine.status()?.state == RunState::Running, "{:?}", machine.status()?);
    // More than are served at a time are told so.
    let crowd: Vec<_> = (0..16).map(|_| UnixStream::connect(&machine.api)).collect::<Result<_, _>>()?;
    let refused = machine.ask(&thermocline::control::Request::Status {});
    let text = refused.err().context("no limit on connections")?.to_string();
    ensure!(text.contains("too many connections"), "{text}");
    drop((silent, crowd));
    thermocline_tests::console::eventually("room for a client", || Ok(machine.status().is_ok()))?;
    machine.must_go_on()
}
