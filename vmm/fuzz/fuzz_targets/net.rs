//! The queues of virtio-net.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::net(data));
