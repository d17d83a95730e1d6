//! Everything of a machine but its RAM, as it travels and as it is kept.

use serde::{Deserialize, Serialize};

use crate::arch::x86_64::state::{Time, VcpuState, VmState};
use crate::devices::table;
use crate::record::{Record, RecordError, Records, Saved};

/// The part that KVM's own devices are.
pub(super) const VM: &str = "kvm";

/// The part that the clocks are.
pub(super) const TIME: &str = "time";

/// The part that a vCPU is.
pub(super) fn vcpu(index: usize) -> String {
    format!("vcpu{index}")
}

/// Everything of a machine but its RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// Whether the guest is to run once it is restored.
    pub running: bool,
    /// One record a part.
    pub records: Records,
}

impl MachineState {
    /// The same for people: what each part holds by name, in place of its bytes.
    ///
    /// # Errors
    /// When a part is not known here.
    pub fn for_people(&self) -> Result<serde_json::Value, RecordError> {
        let parts: Result<Vec<_>, RecordError> = self.records.0.iter().map(part_for_people).collect();
        Ok(serde_json::json!({ "running": self.running, "parts": parts? }))
    }
}

fn part_for_people(record: &Record) -> Result<serde_json::Value, RecordError> {
    let Record { id, kind, version, .. } = record;
    let state = match kind.as_str() {
        VmState::KIND => record.show::<VmState>()?,
        VcpuState::KIND => record.show::<VcpuState>()?,
        Time::KIND => record.show::<Time>()?,
        _ => table::show(record)?,
    };
    Ok(serde_json::json!({ "id": id, "kind": kind, "version": version, "state": state }))
}
