//! Small guests of a few instructions, for tests of what KVM does.

use std::sync::Arc;

use kvm_bindings::{kvm_mp_state, kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use super::{KvmError, Told, Vcpus, Vm};
use crate::arch::x86_64::cpuid::CpuModel;
use crate::devices::{Bus, RegisterAccess};
use crate::ram::GuestRam;

/// Where the first vCPU's instructions are; each further one's are a page behind.
pub(super) const CODE: u64 = 0x1000;
/// Where nothing is but what a test's device answers.
pub(super) const DEVICE: std::ops::Range<u64> = 0xd000_0000..0xd000_2000;
/// As [`DEVICE`], a port.
pub(super) const PORT: u16 = 0x80;

/// A VM and a vCPU for each of these pieces of code, paused: flat 32-bit segments, no paging, registers as given. `None`, with a note, where
/// there is no KVM.
pub(super) fn guest(code: &[(&[u8], kvm_regs)], device: Option<Arc<dyn RegisterAccess>>) -> Option<(Vm, Vcpus)> {
    let vm = Vm::new(Arc::new(GuestRam::new(16 << 20).unwrap()));
    let vm = vm.inspect_err(|e| command_line::note(format_args!("not run: {e}"))).ok()?;
    let mut bus = Bus::default();
    if let Some(device) = device {
        let id = "device0".try_into().unwrap();
        bus.add_memory(DEVICE, &id, Arc::clone(&device)).unwrap();
        bus.add_ports(u64::from(PORT)..u64::from(PORT) + 1, &id, device).unwrap();
    }
    let vcpus = Vcpus::new(&vm, &bus, code.len() as u8, Told::Model(CpuModel::Host)).unwrap();
    for (index, (code, regs)) in code.iter().enumerate() {
        let at = CODE + index as u64 * 0x1000;
        vm.ram().memory().write_slice(code, GuestAddress(at)).unwrap();
        let started = vcpus.with_fd(index, |fd| {
            let mut sregs = fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
            let flat =
                |type_| kvm_segment { limit: u32::MAX, type_, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
            sregs.cs = kvm_segment { selector: 0x8, ..flat(0xb) };
            let data = kvm_segment { selector: 0x10, ..flat(0x3) };
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            sregs.cr0 = 0x11;
            fd.set_sregs(&sregs).map_err(KvmError::call("KVM_SET_SREGS"))?;
            fd.set_regs(&kvm_regs { rip: at, rflags: 2, ..*regs }).map_err(KvmError::call("KVM_SET_REGS"))?;
            fd.set_mp_state(kvm_mp_state::default()).map_err(KvmError::call("KVM_SET_MP_STATE"))
        });
        started.unwrap();
    }
    Some((vm, vcpus))
}
