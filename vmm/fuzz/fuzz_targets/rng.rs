//! The queue of virtio-rng.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::queues("virtio-rng", data));
