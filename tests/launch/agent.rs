//! The memory agent in `thermocline run`.

use anyhow::{Context, Result, ensure};
use thermocline::control::AgentStatus;
use thermocline_tests::agent::ColdGuest;
use thermocline_tests::console::eventually;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::{Sandbox, Trials, Workload, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], the_agent_knows_what_the_host_says);
    trial!(trials, [Kvm, Root, Zram], the_agent_restores_what_readers_swap_in);
    trial!(trials, [Kvm, Root, Zram], write_protection_leaves_markers_under_a_guest);
    trial!(trials, [Kvm], a_machine_can_be_without_an_agent);
    trial!(trials, [Kvm], impossible_agents_are_refused);
}

fn agent(guest: &ColdGuest) -> Result<AgentStatus> {
    guest.machine.status()?.agent.context("the machine has no agent")
}

/// Waits until the agent has looked at everything once more, from its beginning to its end.
fn after_another_look(guest: &ColdGuest) -> Result<AgentStatus> {
    let rounds = agent(guest)?.cost.rounds;
    eventually("the agent looks again", || Ok(agent(guest)?.cost.rounds >= rounds + 2))?;
    agent(guest)
}

fn the_agent_knows_what_the_host_says() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::with(&sandbox, &["--agent-budget", "20"])?;
        let status = after_another_look(&guest)?;
        ensure!(!status.probe.is_empty() && status.cost.cpu_ns > 0, "{status:?}");
        ensure!(status.percent > 0.0 && status.percent < 60.0, "{} % of a core with a budget of 20 %", status.percent);
        ensure!(status.age_ms.is_some_and(|age| age < 30_000), "{status:?}");
        let api = guest.machine.api.to_string_lossy().into_owned();
        let shown = sandbox.start("pages", &["pages", "--json", "--from-agent", "--api-socket", &api])?;
        ensure!(shown.wait()?.code() == Some(0), "pages failed");
        let pages: thermocline::control::PagesReport = serde_json::from_str(&shown.stdout.lines().join(""))?;
        ensure!(pages.counts == guest.before, "{:?} instead of {:?}", pages.counts, guest.before);
        let (ended, lines) = guest.machine.ctl(&["metrics"])?;
        let text = lines.join("\n");
        ensure!(ended.code() == Some(0), "{ended:?}");
        let pid = guest.pid();
        let swapped = format!("memory_agent_pages{{pid=\"{pid}\",state=\"swapped\"}} {}", guest.before.swapped);
        ensure!(text.contains(&swapped) && text.contains("memory_agent_cpu_seconds_total"), "{text}");
        // Its looks have changed nothing.
        guest.must_be_as_before()
    })
}

fn the_agent_restores_what_readers_swap_in() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::with(&sandbox, &["--agent-budget", "100"])?;
        after_another_look(&guest)?;
        guest.read()?;
        eventually("what was read is cold again", || Ok(guest.must_be_as_before().is_ok()))?;
        let status = agent(&guest)?;
        ensure!(status.cost.restored >= guest.before.swapped / 100 * 99, "{status:?}");
        Ok(())
    })
}

fn write_protection_leaves_markers_under_a_guest() -> Result<()> {
    if let Some(why) = memory_agent::KernelOffer::of_this_host().why_not(memory_agent::ProbeKind::UffdMarker) {
        eprintln!("not tried: {why}");
        return Ok(());
    }
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let mut guest = ColdGuest::with(&sandbox, &["--agent-budget", "50", "--probe", "uffd-marker"])?;
        let status = after_another_look(&guest)?;
        ensure!(status.probe == "uffd-marker", "{status:?}");
        let api = guest.machine.api.to_string_lossy().into_owned();
        let shown = sandbox.start("pages", &["pages", "--json", "--from-agent", "--api-socket", &api])?;
        ensure!(shown.wait()?.code() == Some(0), "pages failed");
        let pages: thermocline::control::PagesReport = serde_json::from_str(&shown.stdout.lines().join(""))?;
        ensure!(pages.counts == guest.before, "{:?} instead of {:?}", pages.counts, guest.before);
        // The guest works on with its pages protected, and finds them as it left them.
        guest.machine.ctl(&["resume"])?;
        guest.machine.must_go_on()
    })
}

fn a_machine_can_be_without_an_agent() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut machine = sandbox.boot_with(&["--agent-budget", "0"], &Workload::default())?;
    ensure!(machine.status()?.agent.is_none(), "{:?}", machine.status()?);
    let api = machine.api.to_string_lossy().into_owned();
    let shown = sandbox.start("pages", &["pages", "--from-agent", "--api-socket", &api])?;
    let ended = shown.wait()?;
    let said = ended.sentence(1)?;
    ensure!(said.contains("no budget"), "{said}");
    machine.must_go_on()
}

fn impossible_agents_are_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for arguments in
        [["--agent-budget", "101"], ["--agent-budget", "-1"], ["--agent-budget", "NaN"], ["--probe", "guess"]]
    {
        let refused = sandbox.start("run", &[&["run"][..], &arguments].concat())?;
        let ended = refused.wait()?;
        ensure!(ended.code() == Some(2), "{arguments:?}: {ended:?}");
    }
    Ok(())
}
