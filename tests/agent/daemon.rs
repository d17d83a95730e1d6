//! The agent in the background.

use anyhow::{Context, Result, ensure};
use memory_agent::Counts;
use rustix::process::Signal;
use serde_json::Value;
use thermocline_tests::agent::{ColdGuest, sentence, start};
use thermocline_tests::console::eventually;
use thermocline_tests::process::TIMEOUT;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], the_daemon_tells_what_is_and_what_it_costs);
    trial!(trials, [Kvm, Root, Zram], the_daemon_restores_what_readers_swap_in);
    trial!(trials, [Kvm, Root, Zram], the_daemon_ends_with_its_process);
}

/// A line that tells of all memory: the counts, and the whole object.
fn known(line: &str) -> Option<(Counts, Value)> {
    let object: Value = serde_json::from_str(line).ok()?;
    Some((serde_json::from_value(object["counts"].clone()).ok()?, object))
}

/// The value of a metric in the text format.
fn metric(text: &str, name: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {name} in {text}"))?.parse()?)
}

fn the_daemon_tells_what_is_and_what_it_costs() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let pid = guest.pid();
        let metrics = sandbox.path("memory.prom");
        let path = metrics.to_str().context("a path")?;
        let more = ["--interval", "100ms", "--budget", "20", "--json", "--metrics", path];
        let daemon = start(&["daemon"], pid, &more)?;
        let (at, (counts, object)) = daemon.stdout.wait_for(0, TIMEOUT, known)?;
        ensure!(counts == guest.before, "{counts:?} instead of {:?}", guest.before);
        ensure!(object["pid"] == pid && object["probe"].is_string(), "{object}");
        ensure!(object["cost"]["pages"].as_u64() >= Some(guest.pages()), "{object}");
        let percent = object["cpu_percent"].as_f64().context("a cost")?;
        // A slice that takes longer than the one before is rested for only afterwards.
        ensure!(percent > 0.0 && percent < 60.0, "{percent} % of a core with a budget of 20 %");

        daemon.stdout.wait_for(at + 2, TIMEOUT, known)?;
        let text = std::fs::read_to_string(&metrics)?;
        for (state, count) in
            [("hole", guest.before.hole), ("resident", guest.before.resident), ("swapped", guest.before.swapped)]
        {
            let name = format!("memory_agent_pages{{pid=\"{pid}\",state=\"{state}\"}}");
            ensure!(metric(&text, &name)? == count as f64, "{state}: {text}");
        }
        let of = |name: &str| metric(&text, &format!("memory_agent_{name}{{pid=\"{pid}\"}}"));
        ensure!(of("rounds_total")? >= 1.0 && of("cpu_seconds_total")? > 0.0, "{text}");
        ensure!(of("swapped_in_pages_total")? == 0.0 && of("restored_pages_total")? == 0.0, "{text}");
        ensure!(of("map_age_seconds")? < 30.0, "{text}");

        daemon.signal(Signal::TERM)?;
        let ended = daemon.wait()?;
        ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");
        ensure!(!metrics.exists(), "what was true of a process then is still told");
        guest.must_be_as_before()
    })
}

fn the_daemon_restores_what_readers_swap_in() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let more = ["--interval", "100ms", "--budget", "100", "--json"];
        let daemon = start(&["daemon"], guest.pid(), &more)?;
        daemon.stdout.wait_for(0, TIMEOUT, known)?;
        guest.read()?;
        let most = guest.before.swapped;
        let almost = most / 100 * 99;
        eventually("what was read is cold again", || Ok(guest.counts()?.swapped >= almost))?;
        let from = daemon.stdout.len();
        let restored = |line: &str| known(line).and_then(|(_, object)| object["cost"]["restored"].as_u64());
        let (_, pages) = daemon.stdout.wait_for(from, TIMEOUT, restored)?;
        ensure!(pages >= almost, "{pages} of {most} restored");
        daemon.signal(Signal::INT)?;
        ensure!(daemon.wait()?.code() == Some(0), "it failed");

        // Left in memory when asked to.
        let swapped = guest.counts()?.swapped;
        let daemon = start(&["daemon"], guest.pid(), &[&more[..], &["--no-restore"]].concat())?;
        let (at, _) = daemon.stdout.wait_for(0, TIMEOUT, known)?;
        guest.read()?;
        let almost = swapped / 100 * 99;
        let swapped_in =
            |line: &str| known(line).filter(|(_, object)| object["cost"]["swapped_in"].as_u64() >= Some(almost));
        let (_, (_, object)) = daemon.stdout.wait_for(at, TIMEOUT, swapped_in).context("it does not see them")?;
        ensure!(object["cost"]["restored"] == 0, "{object}");
        ensure!(guest.counts()?.swapped <= swapped - almost, "somebody restores: {:?}", guest.counts()?);
        Ok(())
    })
}

fn the_daemon_ends_with_its_process() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = ColdGuest::new(&sandbox)?;
    let daemon = start(&["daemon"], guest.pid(), &["--interval", "100ms", "--budget", "20"])?;
    daemon.stdout.wait_for(0, TIMEOUT, |line| line.contains("resident ").then_some(()))?;
    guest.machine.process.kill();
    let said = sentence(&daemon.wait()?, 0)?;
    ensure!(said == format!("process {} has ended", guest.pid()), "{said}");
    Ok(())
}
