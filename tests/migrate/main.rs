//! Migrations that succeed, or are given up by whoever asked for them.

mod arrives;
mod cold;
mod devices;
mod disks;
mod downtime;
mod given_up;
mod lazy;
mod net;
mod resource;
mod soak;
mod two_hosts;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    arrives::add(&mut trials);
    cold::add(&mut trials);
    devices::add(&mut trials);
    disks::add(&mut trials);
    downtime::add(&mut trials);
    given_up::add(&mut trials);
    lazy::add(&mut trials);
    net::add(&mut trials);
    resource::add(&mut trials);
    soak::add(&mut trials);
    two_hosts::add(&mut trials);
    trials.run()
}
