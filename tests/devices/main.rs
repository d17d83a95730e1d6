//! The embedded guest drives the devices of a machine.

mod answers;
mod disk;
mod memory;
mod net;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    memory::add(&mut trials);
    disk::add(&mut trials);
    net::add(&mut trials);
    trials.run()
}
