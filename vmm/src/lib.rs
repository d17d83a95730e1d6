#![doc = include_str!("../README.md")]
#![warn(clippy::print_stdout, clippy::print_stderr)]

use command_line::Program;

pub mod arch;
pub mod boot;
pub mod bounded;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod dump;
pub mod exit;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod host;
pub mod incoming;
pub mod key_value;
pub mod kvm;
mod log_limit;
pub mod machine;
pub mod migration;
pub mod monitor;
pub mod ram;

/// This program, by the name that stands in front of what it says.
pub(crate) const PROGRAM: Program = Program::new("thermocline");
pub mod record;
pub mod stopwatch;
