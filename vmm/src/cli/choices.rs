//! Choices as they are written on the command line.

use clap::ValueEnum;

use crate::arch::x86_64::cpuid::{CpuModel, Level};
use crate::migration::plan::ColdPolicy;
use crate::migration::source::Switchover;

/// [`CpuModel`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Cpu {
    /// All that this host has and a guest can have: it can go where there is as much.
    Host,
    /// What every 64-bit processor has.
    #[value(name = Level::V1.name())]
    V1,
    /// Processors from 2008 on: SSE4.2, POPCNT.
    #[value(name = Level::V2.name())]
    V2,
    /// From 2013 on: AVX2, BMI, FMA, AES.
    #[value(name = Level::V3.name())]
    V3,
    /// From 2017 on: AVX-512.
    #[value(name = Level::V4.name())]
    V4,
}

impl From<Cpu> for CpuModel {
    fn from(choice: Cpu) -> Self {
        match choice {
            Cpu::Host => Self::Host,
            Cpu::V1 => Self::Level(Level::V1),
            Cpu::V2 => Self::Level(Level::V2),
            Cpu::V3 => Self::Level(Level::V3),
            Cpu::V4 => Self::Level(Level::V4),
        }
    }
}

/// [`ColdPolicy`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Cold {
    /// Read a window at a time, sent, and paged out again before the next: the source never grows by more than a window.
    Paced,
    /// Read like all others, and left in memory on both sides.
    Eager,
    /// Left where they are until the guest runs at the destination: they come when it touches them, and at a bounded rate.
    Lazy,
}

impl From<Cold> for ColdPolicy {
    fn from(choice: Cold) -> Self {
        match choice {
            Cold::Paced => Self::Paced,
            Cold::Eager => Self::Eager,
            Cold::Lazy => Self::Lazy,
        }
    }
}

impl From<ColdPolicy> for Cold {
    fn from(policy: ColdPolicy) -> Self {
        match policy {
            ColdPolicy::Paced => Self::Paced,
            ColdPolicy::Eager => Self::Eager,
            ColdPolicy::Lazy => Self::Lazy,
        }
    }
}

/// [`Switchover`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum When {
    /// Once so little is left that it is paused for a moment only.
    Converged,
    /// After one round: what the guest has written meanwhile comes by post-copy. For guests that write faster than the link carries.
    Now,
}

impl From<When> for Switchover {
    fn from(choice: When) -> Self {
        match choice {
            When::Converged => Self::Converged,
            When::Now => Self::Now,
        }
    }
}

impl From<Switchover> for When {
    fn from(switchover: Switchover) -> Self {
        match switchover {
            Switchover::Converged => Self::Converged,
            Switchover::Now => Self::Now,
        }
    }
}
