//! The queues of virtio-vsock.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::vsock(data));
