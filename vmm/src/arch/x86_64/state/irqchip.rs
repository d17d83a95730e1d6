//! Interrupt controllers and timer that KVM has in the kernel.

use serde::{Deserialize, Serialize};

/// `struct kvm_pic_state`: an i8259.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pic {
    /// Lines as they were, for edges.
    pub last_irr: u8,
    /// Requests.
    pub irr: u8,
    /// Masked lines.
    pub imr: u8,
    /// In service.
    pub isr: u8,
    /// The line of highest priority.
    pub priority_add: u8,
    /// Vector of line 0.
    pub irq_base: u8,
    /// Whether a read gives ISR rather than IRR.
    pub read_reg_select: u8,
    /// Poll command.
    pub poll: u8,
    /// Special mask mode.
    pub special_mask: u8,
    /// Which initialization command word comes next.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: u8,
    /// With rotation.
    pub rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// Four initialization command words.
    pub init4: u8,
    /// Level-triggered lines.
    pub elcr: u8,
    /// Lines that may be.
    pub elcr_mask: u8,
}

/// `struct kvm_ioapic_state`: an 82093AA.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    /// Guest physical address.
    pub base_address: u64,
    /// Selected register.
    pub ioregsel: u32,
    /// Its APIC id.
    pub id: u32,
    /// Requests.
    pub irr: u32,
    /// Redirection table.
    pub redirtbl: [u64; 24],
}

/// `struct kvm_pit_state2`: an i8254.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    /// Its counters.
    pub channels: [PitChannel; 3],
    /// `KVM_PIT_FLAGS_*`.
    pub flags: u32,
}

/// `struct kvm_pit_channel_state`: a counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannel {
    /// Where it begins again; 0x10000 for 0.
    pub count: u32,
    /// What was latched.
    pub latched_count: u16,
    /// Whether and how a count is latched.
    pub count_latched: u8,
    /// Whether the status is latched.
    pub status_latched: u8,
    /// What was latched of it.
    pub status: u8,
    /// Which byte is read next.
    pub read_state: u8,
    /// Which byte is written next.
    pub write_state: u8,
    /// The low byte that was written.
    pub write_latch: u8,
    /// Which bytes are read and written.
    pub rw_mode: u8,
    /// Its mode.
    pub mode: u8,
    /// Whether it counts in decimal.
    pub bcd: u8,
    /// Its gate.
    pub gate: u8,
    /// When it was loaded, nanoseconds of the host's monotonic clock.
    pub count_load_time: i64,
}
