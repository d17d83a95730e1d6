//! The KVM calls whose contract the compiler cannot check.
#![allow(unsafe_code, reason = "memory slots and extended state are handed to the kernel by address")]

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, Xsave, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::ram::GuestRam;

/// A VM together with the RAM that its memory slots point into, so that the RAM cannot go first.
#[derive(Debug)]
pub(super) struct VmWithRam {
    fd: VmFd,
    ram: Arc<GuestRam>,
}

impl VmWithRam {
    pub(super) fn new(fd: VmFd, ram: Arc<GuestRam>) -> Result<Self, kvm_ioctls::Error> {
        let vm = Self { fd, ram };
        vm.set_slots(false)?;
        Ok(vm)
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Sets every memory slot, one a region, with dirty logging on or off.
    pub(super) fn set_slots(&self, log_dirty: bool) -> Result<(), kvm_ioctls::Error> {
        for (slot, region) in self.ram.layout().regions().iter().enumerate() {
            let Some(userspace_addr) = self.ram.host_address(slot) else { continue };
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start,
                memory_size: region.length,
                userspace_addr,
            };
            // SAFETY: the address and length are those of a live shared mapping that `self.ram` owns. The VM's file is
            // a field declared before it, so it is closed first; vCPU files keep the kernel's VM alive past that, and
            // `Vm` keeps this struct behind an `Arc` that every vCPU holds.
            unsafe { self.fd.set_user_memory_region(region)? };
        }
        Ok(())
    }
}

/// Number of 32-bit words of extended state that KVM writes behind the first 4 KiB; `None` on kernels before 5.17,
/// whose extended state always fits.
fn extra_words(vm: &VmFd) -> Option<usize> {
    let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).ok().filter(|size| *size > 0)?;
    Some(size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4))
}

/// Reads a vCPU's extended state (x87, SSE, AVX and what else XCR0 has) as 32-bit words.
pub(super) fn get_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let Some(extra) = extra_words(vm) else { return Ok(vcpu.get_xsave()?.region.to_vec()) };
    let mut xsave = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 asks for, and nobody in this process enables features with
    // arch_prctl, which alone could change that.
    unsafe { vcpu.get_xsave2(&mut xsave)? };
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

/// How many words of extended state this kernel takes.
pub(super) fn xsave_words(vm: &VmFd) -> usize {
    size_of::<kvm_xsave>() / 4 + extra_words(vm).unwrap_or(0)
}

/// Writes a vCPU's extended state. What `words` has beyond [`xsave_words`] is left out; what it lacks is zero.
pub(super) fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), kvm_ioctls::Error> {
    let mut header = kvm_xsave::default();
    let split = words.len().min(header.region.len());
    header.region[..split].copy_from_slice(&words[..split]);
    let mut xsave = Xsave::new(extra_words(vm).unwrap_or(0)).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(&words[split..]) {
        *to = *from;
    }
    // SAFETY: only the fixed part is replaced; the length of the flexible array stays what `new` allocated.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = header.region;
    // SAFETY: as in `get_xsave`: the buffer has the size that the kernel reads.
    unsafe { vcpu.set_xsave2(&xsave) }
}
