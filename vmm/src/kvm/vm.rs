//! One VM: memory slots, in-kernel interrupt controllers and timer, dirty log.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use memory_agent::PageRange;

use super::irq::MessageRoutes;
use super::sys::VmWithRam;
use super::{KvmError, convert};
use crate::arch::x86_64::layout::KVM_PAGES;
use crate::arch::x86_64::state::VmState;
use crate::ram::{GuestRam, PageSet};

/// `KVM_SET_IDENTITY_MAP_ADDR` and `KVM_SET_TSS_ADDR` (Documentation/virt/kvm/api.rst): one page, and the three behind it.
const IDENTITY_MAP_ADDRESS: u64 = KVM_PAGES.start;
const TSS_ADDRESS: usize = KVM_PAGES.start as usize + 0x1000;

/// Has KVM give no guest performance counters, which AMD's processors have without saying so in CPUID. Linux before 5.18 cannot.
fn disable_counters(kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
    if kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()).max(0) as u32 & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&cap).map_err(KvmError::call("KVM_ENABLE_CAP of KVM_CAP_PMU_CAPABILITY"))
}

/// A VM with its RAM.
#[derive(Clone, Debug)]
pub struct Vm {
    kvm: Arc<Kvm>,
    inner: Arc<VmWithRam>,
    message_routes: Arc<MessageRoutes>,
}

impl Vm {
    /// Creates a VM with memory slots over `ram`, an in-kernel irqchip and a PIT.
    ///
    /// # Errors
    /// When `/dev/kvm` is not there or refuses one of the steps.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Open)?;
        let fd = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        if kvm.check_extension(Cap::SetTssAddr) {
            fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
        }
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        disable_counters(&kvm, &fd)?;
        fd.create_irq_chip().map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;
        fd.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .map_err(KvmError::call("KVM_CREATE_PIT2"))?;
        let inner = VmWithRam::new(fd, ram).map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        Ok(Self { kvm: Arc::new(kvm), inner: Arc::new(inner), message_routes: Arc::default() })
    }

    /// The KVM device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's file.
    pub fn fd(&self) -> &VmFd {
        self.inner.fd()
    }

    pub(super) fn message_routes(&self) -> &MessageRoutes {
        &self.message_routes
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.inner.ram()
    }

    /// Starts logging the guest's writes, all pages clean.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), KvmError> {
        self.inner.set_slots(true).map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Stops logging.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), KvmError> {
        self.inner.set_slots(false).map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// The pages that the guest has written since the last call, which are clean again now.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take_dirty_log(&self) -> Result<PageSet, KvmError> {
        let mut set = PageSet::new(self.ram().pages());
        for part in self.ram().layout().parts() {
            let words = self
                .fd()
                .get_dirty_log(part.region as u32, part.pages.byte_count() as usize)
                .map_err(KvmError::call("KVM_GET_DIRTY_LOG"))?;
            set.insert_words(part.pages.start, &words);
        }
        Ok(set)
    }

    /// Reads interrupt controllers and timer. The vCPUs are paused.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<VmState, KvmError> {
        Ok(VmState {
            pics: [
                self.chip(KVM_IRQCHIP_PIC_MASTER, convert::pic_from_kvm)?,
                self.chip(KVM_IRQCHIP_PIC_SLAVE, convert::pic_from_kvm)?,
            ],
            io_apic: self.chip(KVM_IRQCHIP_IOAPIC, convert::io_apic_from_kvm)?,
            pit: (&self.fd().get_pit2().map_err(KvmError::call("KVM_GET_PIT2"))?).into(),
        })
    }

    fn chip<T>(&self, chip_id: u32, convert: impl FnOnce(&kvm_irqchip) -> Option<T>) -> Result<T, KvmError> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.fd().get_irqchip(&mut chip).map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
        let short = || KvmError::call("KVM_GET_IRQCHIP")(kvm_ioctls::Error::new(libc::ENODATA));
        convert(&chip).ok_or_else(short)
    }

    /// Writes interrupt controllers and timer. The local APICs are what they are to be already: what waits in the I/O APIC goes to them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        let [master, slave] = &state.pics;
        for chip in [
            convert::pic_to_kvm(KVM_IRQCHIP_PIC_MASTER, master),
            convert::pic_to_kvm(KVM_IRQCHIP_PIC_SLAVE, slave),
            convert::io_apic_to_kvm(&state.io_apic),
        ] {
            self.fd().set_irqchip(&chip).map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
        }
        self.fd().set_pit2(&kvm_pit_state2::from(&state.pit)).map_err(KvmError::call("KVM_SET_PIT2"))
    }
}
