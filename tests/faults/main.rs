//! What breaks: the other side, the connection, what comes over it. In each case exactly one side runs the guest, both
//! sides say what happened in one line with a code of its own, and nothing of the guest is lost.

mod crashes;
mod disks;
mod garbage;
mod hostile_state;
mod refusals;
mod silence;
mod strangers;
mod stream;
mod switchover;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    refusals::add(&mut trials);
    stream::add(&mut trials);
    switchover::add(&mut trials);
    crashes::add(&mut trials);
    disks::add(&mut trials);
    garbage::add(&mut trials);
    hostile_state::add(&mut trials);
    silence::add(&mut trials);
    strangers::add(&mut trials);
    trials.run()
}
