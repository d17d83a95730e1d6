//! Stock Linux guests: their distribution's own kernel and drivers on our machine, beside QEMU with the same files.
//!
//! A boot takes long where the processor is emulated: few boots, each of which tells much.

mod devices;
mod ends;
mod migrate;
mod peer;
mod stream;

fn main() -> std::process::ExitCode {
    let mut trials = thermocline_tests::Trials::default();
    peer::add(&mut trials);
    devices::add(&mut trials);
    ends::add(&mut trials);
    stream::add(&mut trials);
    migrate::add(&mut trials);
    trials.run()
}
