//! A machine saved and restored, on this machine's KVM.

use memory_agent::ByteSize;

use super::state::{VM, vcpu};
use super::{Builder, Machine, MachineState};
use crate::arch::x86_64::cpuid::CpuModel;
use crate::arch::x86_64::state::{VcpuState, VmState};
use crate::devices::host::Backends;
use crate::devices::table;
use crate::record::{Record, Saved};

/// Offset of the local APIC's requested vectors and of its spurious vector (Intel SDM, volume 3, table 11-1).
const REQUESTED: usize = 0x200;
const SPURIOUS: usize = 0xf0;

fn machine() -> Option<Machine> {
    let devices = table::standard().unwrap();
    let made = Builder::new(Backends::default()).new_machine(ByteSize::mib(16), 1, CpuModel::Host, &devices);
    made.inspect_err(|e| command_line::note(format_args!("not run: {e}"))).ok()
}

/// Changes what one part of the state says.
fn alter<T: Saved>(state: &mut MachineState, id: &str, change: impl FnOnce(&mut T)) {
    let record = state.records.0.iter_mut().find(|record| record.id.as_str() == id).unwrap();
    let mut part = record.read().unwrap();
    change(&mut part);
    *record = Record::of(id, &part).unwrap();
}

fn read<T: Saved>(state: &MachineState, id: &str) -> T {
    state.records.by_part().unwrap().read(id).unwrap()
}

#[test]
fn an_interrupt_that_waits_in_the_io_apic_arrives() {
    const VECTOR: usize = 0x85;
    let Some(source) = machine() else { return };
    let mut state = source.save().unwrap();
    // Enabled by software.
    alter(&mut state, &vcpu(0), |vcpu: &mut VcpuState| vcpu.lapic.0[SPURIOUS + 1] |= 1);
    // Line 10: this vector to the first vCPU, an edge, not masked, requested and not delivered yet.
    alter(&mut state, VM, |vm: &mut VmState| {
        vm.io_apic.redirtbl[10] = VECTOR as u64;
        vm.io_apic.irr |= 1 << 10;
    });
    let destination = machine().unwrap();
    destination.restore(&state).unwrap();
    let there: VcpuState = read(&destination.save().unwrap(), &vcpu(0));
    assert_eq!(there.lapic.0[REQUESTED + VECTOR / 32 * 16 + VECTOR % 32 / 8] >> (VECTOR % 8) & 1, 1, "it is lost");
}
