//! The queues of virtio-console.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::queues("virtio-console", data));
