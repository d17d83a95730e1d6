//! Paging out what is asked for, and nothing else.

use anyhow::{Result, ensure};
use memory_agent::{PAGE_SIZE, PageOutReport, PageState};
use thermocline_tests::agent::{ColdGuest, fails, prints, run, sentence};
use thermocline_tests::residency::must_be_near;
use thermocline_tests::swap::undisturbed;
use thermocline_tests::trials::unless_the_emulator_fails;
use thermocline_tests::{Sandbox, Trials, trial};

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Kvm, Root, Zram], a_range_is_paged_out_and_nothing_else);
    trial!(trials, [Kvm, Root, Zram], everything_is_paged_out);
    trial!(trials, [Kvm, Root, Zram], ranges_beyond_the_memory_are_refused);
    trial!(trials, [Kvm, Root, Zram], idle_pages_are_paged_out_or_it_says_why_not);
}

fn page_out(pid: u32, arguments: &[&str]) -> Result<PageOutReport> {
    let mut arguments = arguments.to_vec();
    arguments.push("--json");
    Ok(serde_json::from_str(&prints(&["page-out"], pid, &arguments)?.concat())?)
}

fn a_range_is_paged_out_and_nothing_else() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let before = guest.truth()?;
        // The longest warm part, without its ends.
        let warm = before.ranges_of(PageState::Resident).max_by_key(|range| range.end - range.start);
        let warm = warm.filter(|range| range.end - range.start > 2048);
        let Some(warm) = warm else { anyhow::bail!("nothing is warm: {before:?}") };
        let wanted = [warm.start + 10..warm.start + 600, warm.start + 1000..warm.end - 10];
        let texts = wanted
            .clone()
            .map(|range| format!("{:#x}+{}", range.start * PAGE_SIZE, (range.end - range.start) * PAGE_SIZE));
        let report = page_out(guest.pid(), &["--range", &texts[0], "--range", &texts[1]])?;

        let asked: u64 = wanted.iter().map(|range| range.end - range.start).sum();
        ensure!(report.asked == asked && report.swapped + report.left == asked, "{report:?}, asked for {asked}");
        let after = guest.truth()?;
        let swapped: u64 = wanted.iter().map(|range| after.counts_in(range.clone()).swapped).sum();
        must_be_near("swapped of these", swapped, asked, 1)?;
        ensure!(swapped == report.swapped, "{report:?}, and {swapped} are swapped");
        let touched: u64 = before.ranges_where(&after, |a, b| a != b).map(|range| range.end - range.start).sum();
        ensure!(touched == swapped, "{touched} pages have changed, and {swapped} should have");

        // Once more: there is nothing left to do, which is no failure.
        let again = page_out(guest.pid(), &["--range", &texts[0]])?;
        must_be_near("resident of these", again.asked, 0, 1)
    })
}

fn everything_is_paged_out() -> Result<()> {
    undisturbed(|| {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let lines = prints(&["page-out"], guest.pid(), &["--all"])?;
        ensure!(lines.len() == 1 && lines[0].starts_with("paged out "), "{lines:?}");
        let now = guest.truth()?.counts();
        must_be_near("resident", now.resident, 0, 1)?;
        ensure!(now.hole == guest.before.hole, "{now:?} from {:?}", guest.before);
        Ok(())
    })
}

fn ranges_beyond_the_memory_are_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let guest = ColdGuest::new(&sandbox)?;
    let end = guest.pages() * PAGE_SIZE;
    let said = fails(2, &["page-out"], guest.pid(), &["--range", &format!("{}+8192", end - 4096)])?;
    ensure!(said.contains(&format!("{end:#x}")), "{said}");
    for wrong in ["1+4096", "4096", "0+0"] {
        let (ended, _) = run(&["page-out"], guest.pid(), &["--range", wrong])?;
        ensure!(ended.code() == Some(2), "{wrong}: {ended:?}");
    }
    ensure!(guest.truth()?.counts() == guest.before, "something was paged out");
    Ok(())
}

fn idle_pages_are_paged_out_or_it_says_why_not() -> Result<()> {
    let attempt = || {
        let sandbox = Sandbox::new()?;
        let guest = ColdGuest::new(&sandbox)?;
        let (ended, lines) = run(&["page-out"], guest.pid(), &["--idle", "300ms"])?;
        let now = guest.truth()?.counts();
        if std::path::Path::new("/sys/kernel/mm/page_idle/bitmap").exists() {
            ensure!(ended.code() == Some(0) && lines.len() == 1, "{ended:?}");
            // The guest is paused: all of it is idle, but for huge pages.
            ensure!(now.resident < guest.before.resident / 2, "{now:?} from {:?}", guest.before);
        } else {
            let said = sentence(&ended, 1)?;
            ensure!(said.contains("CONFIG_IDLE_PAGE_TRACKING") && said.contains("--all"), "{said}");
            ensure!(now == guest.before, "{now:?} from {:?}", guest.before);
        }
        Ok(())
    };
    undisturbed(|| unless_the_emulator_fails(attempt))
}
