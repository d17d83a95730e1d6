//! The KVM calls whose contract the compiler cannot check.
#![allow(unsafe_code, reason = "memory slots and extended state are handed to the kernel by address")]

use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_sregs2,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use crate::ram::GuestRam;

// Calls that kvm-ioctls does not have for x86 (Linux, include/uapi/linux/kvm.h).
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

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

fn done(returned: std::os::raw::c_int) -> Result<(), kvm_ioctls::Error> {
    if returned == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()) }
}

/// Segment, table and control registers, and page directory pointers: Linux 5.14 and later (`KVM_CAP_SREGS2`).
pub(super) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, kvm_ioctls::Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one structure of this type, which is of integers.
    done(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// As [`get_sregs2`].
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel reads one structure of this type.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// The attribute that is a vCPU's TSC offset, at the address of `offset`.
fn tsc_offset_at(offset: &mut u64) -> kvm_device_attr {
    let addr = std::ptr::from_mut(offset) as u64;
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr, flags: 0 }
}

/// What is added to the host's time stamp counter, scaled, for this vCPU (Documentation/virt/kvm/devices/vcpu.rst,
/// `KVM_VCPU_TSC_OFFSET`); `None` on kernels before 5.16, which do not say.
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = tsc_offset_at(&mut offset);
    // SAFETY: the kernel only looks at the attribute's number.
    done(unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) }).ok()?;
    // SAFETY: the kernel writes 64 bits at the address, which are `offset`, alive until behind the call.
    done(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) }).ok()?;
    Some(offset)
}

/// As [`tsc_offset`].
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = tsc_offset_at(&mut offset);
    // SAFETY: the kernel reads 64 bits at the address, which are `offset`, alive until behind the call.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}
