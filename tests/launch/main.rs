//! Starting, controlling and ending one machine.

mod agent;
mod console;
mod control;
mod ends;
mod output;
mod refusals;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    ends::add(&mut trials);
    console::add(&mut trials);
    control::add(&mut trials);
    output::add(&mut trials);
    refusals::add(&mut trials);
    agent::add(&mut trials);
    trials.run()
}
