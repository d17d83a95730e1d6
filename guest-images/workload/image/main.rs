//! The guest image: boots by PVH, drops to ring 3 at once and does everything there.
//!
//! Ring 3 is where hypervisors without hardware support run guests natively; ring 0 keeps only what cannot be done
//! elsewhere: the way in, the halt, and handing exceptions back. The page tables let ring 3 reach all of memory, so it
//! drives UART, local APIC and its own page tables itself. All of it runs on a machine with one address space, where
//! virtual is physical; that is what the `SAFETY` lines lean on.
#![no_std]
#![no_main]

mod apic;
mod arena;
mod bars;
mod boot_info;
mod clock;
mod console;
mod control;
mod devices;
mod entry;
mod memory;
mod mmio;
mod pages;
mod pci;
mod port;
mod power;
mod rust_runtime;
mod segments;
mod serial;
mod sleep;
mod smp;
mod tables;
mod traps;
mod tsc;
mod virtio;
mod worker;
mod workload;

// Shared with the host library, which uses parts that the image does not.
#[allow(dead_code)]
#[path = "../src/block.rs"]
mod block;
#[allow(dead_code)]
#[path = "../src/command.rs"]
mod command;
#[allow(dead_code)]
#[path = "../src/device_report.rs"]
mod device_report;
#[allow(dead_code)]
#[path = "../src/extents.rs"]
mod extents;
#[allow(dead_code)]
#[path = "../src/frame.rs"]
mod frame;
#[allow(dead_code)]
#[path = "../src/job.rs"]
mod job;
#[allow(dead_code)]
#[path = "../src/layout.rs"]
mod layout;
#[allow(dead_code)]
#[path = "../src/options.rs"]
mod options;
#[allow(dead_code)]
#[path = "../src/pattern.rs"]
mod pattern;
#[allow(dead_code)]
#[path = "../src/report.rs"]
mod report;
