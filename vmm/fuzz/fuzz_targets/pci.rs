//! PCI configuration space and the registers behind BARs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| thermocline::fuzzing::pci(data));
