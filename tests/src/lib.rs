//! What the trials of `launch/`, `migrate/`, `faults/` and `agent/` are made of: whole processes, driven as people
//! drive them, over consoles, sockets, signals and the wire.
//!
//! | to read about | open |
//! |---|---|
//! | running trials, and saying which cannot run here | `trials.rs`, `host.rs` |
//! | the binary under test | `binary.rs` |
//! | a process: output, signals, its end | `process.rs`, `stop.rs` |
//! | what the guest says and is told | `console.rs` |
//! | a machine: process, console, API socket | `machine.rs` |
//! | a stock Linux guest, here or on QEMU | `linux.rs` |
//! | the other end of a Linux guest's stream of bytes | `stream_peer.rs` |
//! | a disk of its, and whether all on it is right | `disk.rs` |
//! | `memory-agent` beside a machine | `agent.rs` |
//! | one migration, as its command line shows it | `migration.rs` |
//! | which side runs the guest | `owner.rs` |
//! | pages of a machine as the host sees them | `residency.rs`, `swap.rs` |
//! | faults on the wire | `wire_frame.rs`, `proxy.rs`, `peer.rs` |
//! | two hosts, and what may be done to this one | the crate `harness` |
//! | a person's terminal | `terminal.rs` |

pub mod agent;
pub mod binary;
pub mod console;
pub mod cutter;
pub mod disk;
pub mod group;
pub mod host;
pub mod linux;
pub mod machine;
pub mod migration;
pub mod owner;
pub mod peer;
pub mod process;
pub mod proxy;
pub mod random;
pub mod residency;
pub mod starved;
pub mod stop;
pub mod stream_peer;
pub mod swap;
pub mod terminal;
pub mod trials;
pub mod wire_frame;

pub use console::GuestConsole;
pub use host::Need;
pub use machine::{Machine, Sandbox, Workload};
pub use migration::{How, Migrated, Migration};
pub use process::Process;
pub use trials::Trials;
