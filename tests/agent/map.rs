//! What `map` and `watch` tell, and that they change nothing.

use std::io::Read;

use anyhow::{Context, Result, ensure};
use memory_agent::{Counts, Residency};
use rustix::process::Signal;
use serde_json::Value;
use thermocline_tests::agent::{ColdGuest, prints, start, start_on};
use thermocline_tests::process::{Standard, TIMEOUT};
use thermocline_tests::swap::undisturbed;
use thermocline_tests::terminal::Terminal;
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], map_tells_the_truth_and_changes_nothing);
    trial!(trials, [Kvm, Root, Zram], a_map_for_people_has_a_picture_and_sums);
    trial!(trials, [Kvm, Root, Zram], watch_tells_what_changes);
    trial!(trials, [Kvm, Root, Zram], watch_draws_over_itself_on_a_terminal);
}

/// The one object that `map --json` prints.
fn object(pid: u32) -> Result<Value> {
    let lines = prints(&["map"], pid, &["--name", "guest-ram", "--json"])?;
    let [line] = lines.as_slice() else { anyhow::bail!("not one line but {}", lines.len()) };
    Ok(serde_json::from_str(line)?)
}

fn map_tells_the_truth_and_changes_nothing() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let before = guest.truth()?;
        let map = object(guest.pid())?;
        let after = guest.truth()?;
        ensure!(before == after, "asking changed {before:?} to {after:?}");

        ensure!(map["pid"] == guest.pid() && map["exact"] == true, "{}: {}", map["pid"], map["exact"]);
        let memory = &map["memories"][0];
        ensure!(memory["name"].as_str().context("a name")?.contains("guest-ram"), "{}", memory["name"]);
        ensure!(memory["file_offset"] == 0 && memory["pages"] == guest.pages(), "{}", memory["pages"]);
        let runs: Residency = serde_json::from_value(memory["runs"].clone())?;
        ensure!(runs == before, "it is {before:?} and was told as {runs:?}");
        let counts: Counts = serde_json::from_value(memory["counts"].clone())?;
        ensure!(counts == before.counts(), "{counts:?}");
        // Somewhere in that process.
        let address = memory["address"].as_u64().context("an address")?;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.pid()))?;
        ensure!(maps.contains(&format!("{address:x}-")), "nothing is mapped at {address:#x}");
        Ok(())
    })
}

fn a_map_for_people_has_a_picture_and_sums() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let drawing = sandbox.path("map.svg");
        let path = drawing.to_str().context("a path")?;
        let lines = prints(&["map"], guest.pid(), &["--svg", path, "--runs"])?;
        for (state, count) in
            [("resident", guest.before.resident), ("swapped", guest.before.swapped), ("hole", guest.before.hole)]
        {
            let told = lines.iter().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                words.len() > 2 && words[0] == state && words[1] == count.to_string()
            });
            ensure!(told, "no line tells of {count} {state} pages: {lines:?}");
        }
        let picture = lines.iter().filter(|line| line.starts_with(['█', '░', '▒', '·']) && !line.contains(' '));
        ensure!(picture.count() == 4, "no picture: {lines:?}");
        ensure!(lines.iter().any(|line| line.starts_with("probe ")), "no probe: {lines:?}");
        let runs = lines.iter().filter(|line| line.ends_with("  swapped")).count();
        ensure!(runs == guest.truth()?.runs().filter(|run| run.state == memory_agent::PageState::Swapped).count());

        let svg = std::fs::read_to_string(&drawing)?;
        ensure!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "no drawing: {svg:.100}");
        ensure!(svg.contains(&format!("swapped: {} pages", guest.before.swapped)), "{svg:.100}");
        Ok(())
    })
}

fn watch_tells_what_changes() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let watch = start(&["watch"], guest.pid(), &["--json", "--interval", "50ms"])?;
        let counts = |line: &str| -> Option<(Counts, i64)> {
            let look: Value = serde_json::from_str(line).ok()?;
            Some((serde_json::from_value(look["counts"].clone()).ok()?, look["change"]["resident"].as_i64()?))
        };
        let (at, first) = watch.stdout.wait_for(0, TIMEOUT, counts)?;
        ensure!(first == (guest.before, 0), "{first:?} instead of {:?}", guest.before);
        guest.read()?;
        let all = guest.before.resident + guest.before.swapped;
        let (_, last) = watch
            .stdout
            .wait_for(at + 1, TIMEOUT, |line| counts(line).filter(|(counts, _)| counts.resident == all))
            .context("it does not see that all is resident")?;
        ensure!(last.1 >= 0, "{last:?}");
        watch.signal(Signal::INT)?;
        let ended = watch.wait()?;
        ensure!(ended.code() == Some(0) && ended.stderr.is_empty(), "{ended:?}");

        let changes =
            watch.stdout.lines().iter().filter_map(|line| counts(line)).map(|(_, change)| change).sum::<i64>();
        ensure!(changes >= guest.before.swapped.cast_signed(), "all changes together are {changes}");
        // The process's end is an end as well.
        let watch = start(&["watch"], guest.pid(), &["--interval", "50ms"])?;
        watch.stdout.wait_for(0, TIMEOUT, |line| line.contains("resident").then_some(()))?;
        guest.machine.process.kill();
        let said = thermocline_tests::agent::sentence(&watch.wait()?, 0)?;
        ensure!(said.contains("has ended"), "{said}");
        Ok(())
    })
}

fn watch_draws_over_itself_on_a_terminal() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = ColdGuest::new(&sandbox)?;
    let terminal = Terminal::new()?;
    let standard = Standard::Terminal(terminal.for_program()?);
    let watch = start_on(standard, &["watch"], guest.pid(), &["--interval", "50ms"])?;
    let (mut seen, mut bytes) = (Vec::new(), [0; 4096]);
    // A legend a look; the second one goes back up over the first.
    loop {
        let length = (&terminal.person).read(&mut bytes).context("it draws nothing")?;
        seen.extend_from_slice(&bytes[..length]);
        let text = String::from_utf8_lossy(&seen);
        if text.matches("░ swapped").count() >= 3 {
            ensure!(text.matches("\x1b[J").count() >= 2, "it does not draw over itself: {text:?}");
            ensure!(text.contains("█") && text.contains("resident"), "no picture: {text:?}");
            break;
        }
    }
    watch.signal(Signal::INT)?;
    ensure!(watch.wait()?.code() == Some(0), "it failed");
    Ok(())
}
