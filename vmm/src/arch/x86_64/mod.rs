//! x86-64: what a guest is told of its processor, and what is saved of one. Nothing here knows KVM.

pub mod cpuid;
pub mod layout;
pub mod msrs;
pub mod state;

use serde::{Deserialize, Serialize};

use crate::bounded::at_most;
use cpuid::CpuidEntry;
use msrs::Msr;

/// The most CPUID entries of a processor: `KVM_MAX_CPUID_ENTRIES` of Linux 5.11 and later.
const MAX_CPUID: usize = 256;

/// Most sets of features in MSRs.
const MAX_FEATURES: usize = 16;

/// The processor that a guest has been told it runs on. Fixed for its life, on whichever host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// What CPUID tells the first vCPU; [`cpuid::for_vcpu`] makes the others' of it.
    #[serde(deserialize_with = "at_most::<_, _, MAX_CPUID>")]
    pub cpuid: Vec<CpuidEntry>,
    /// What MSRs tell it of features: those of [`msrs::FEATURES`] that it has.
    #[serde(deserialize_with = "at_most::<_, _, MAX_FEATURES>")]
    pub features: Vec<Msr>,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
}

impl Processor {
    /// Why this processor cannot be on a host whose KVM can tell a guest of `cpuid` and `features`: one line a reason.
    pub fn incompatibilities(&self, cpuid: &[CpuidEntry], features: &[Msr]) -> Vec<String> {
        let mut reasons = cpuid::incompatibilities(&self.cpuid, cpuid);
        reasons.extend(msrs::incompatibilities(&self.features, features));
        reasons
    }
}
