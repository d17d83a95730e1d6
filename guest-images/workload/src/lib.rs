//! The embedded guest: a bare-metal workload that checks its own memory.
//!
//! [`ELF`] is a kernel with a PVH entry that this VMM and stock QEMU both boot. It is given [`Options`] as its command
//! line, fills its pages with a known [`pattern`], checks and rewrites them at a given rate, and says on the first
//! serial port how that goes ([`Line`]); [`Command`]s are typed there. It needs no disk, no firmware and no memory
//! beyond 2 MiB, its working set and its cold pages, so that every page it did not touch stays a hole.
//!
//! ```
//! use workload_guest::{ELF, Options};
//!
//! let options: Options = "working-set=1MiB,rate=2000".parse()?;
//! assert_eq!(options.working_set, 1 << 20);
//! // A machine's kernel, and its command line.
//! println!("{} bytes, {options}", ELF.len());
//! # Ok::<(), workload_guest::OptionsError>(())
//! ```
//!
//! The modules that the image and the host must agree on are compiled into both; see the README for the rest.

pub mod block;
pub mod command;
pub mod device_report;
pub mod extents;
pub mod frame;
pub mod job;
pub mod layout;
pub mod line;
pub mod options;
pub mod pattern;
pub mod report;

pub use command::Command;
pub use extents::{Extent, Extents};
pub use layout::Layout;
pub use line::Line;
pub use options::{Options, OptionsError};

/// The guest: a statically linked ELF file for x86-64 with a PVH entry note, loaded at 1 MiB.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/workload.elf"));
