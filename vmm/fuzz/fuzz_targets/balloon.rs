//! The queues of virtio-balloon.
#![no_main]

use thermocline::devices::host::Backends;
use thermocline::devices::table;
use thermocline::devices::virtio::balloon::{BalloonConfig, KIND};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let description = table::describe("balloon0", KIND).unwrap().with_config(&BalloonConfig::default());
    thermocline::fuzzing::queues_of(&description.unwrap(), &Backends::default(), data);
});
