//! The queues of virtio-blk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::disk(data));
