//! What a machine's clocks say at one moment.

use serde::{Deserialize, Serialize};

use crate::bounded::at_most;
use crate::record::Saved;

/// Most vCPUs of a machine.
const MAX_VCPUS: usize = 256;

/// kvmclock, wall-clock time and time stamp counters, all of the same moment, at which the guest did not run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    /// kvmclock, nanoseconds (`KVM_GET_CLOCK`).
    pub clock_ns: u64,
    /// The host's wall-clock time, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// `IA32_TIME_STAMP_COUNTER` of each vCPU.
    #[serde(deserialize_with = "at_most::<_, _, MAX_VCPUS>")]
    pub tscs: Vec<u64>,
}

impl Saved for Time {
    const KIND: &'static str = "time-x86_64";
    const VERSION: u16 = 1;
}
