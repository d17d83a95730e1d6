//! `memory-agent` beside a running machine.

mod daemon;
mod guard;
mod map;
mod page_out;
mod refusals;
mod scan;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    map::add(&mut trials);
    page_out::add(&mut trials);
    scan::add(&mut trials);
    guard::add(&mut trials);
    daemon::add(&mut trials);
    refusals::add(&mut trials);
    if !std::env::args().any(|argument| argument == "--list") {
        // Outside of any trial's time; one that needs it says why there is none.
        let _ = thermocline_tests::binary::memory_agent();
    }
    trials.run()
}
