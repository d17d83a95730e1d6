//! What tests and benchmarks share: what they may do to the host, and what they set up on it. All of it is taken down when it
//! is dropped.
//!
//! | to read about | open |
//! |---|---|
//! | whether the host may be used, and saying that a test is skipped | `host.rs` |
//! | who else moves pages in and out | `disturbance.rs` |
//! | two hosts on one machine, and their guests' network | `network.rs` |
//! | a tap by which a guest reaches this host | `host_tap.rs` |
//! | taps, and frames that go through them | `tap.rs` |
//! | who talks to a guest over them | `echo.rs` |
//! | a file system of one's own | `mount.rs` |
//! | a control group of one's own | `group.rs` |
//!
//! Processes and consoles are not here: tests keep all that was said, for when one fails, and benchmarks when it was said.

pub mod disturbance;
pub mod echo;
pub mod group;
pub mod host;
pub mod host_tap;
pub mod mount;
pub mod network;
mod sys;
pub mod tap;
