//! Where everything but RAM lies in a guest's address space: the one place for addresses, ports and interrupt lines that
//! devices, the boot protocols and the ACPI tables must agree on. RAM itself is in [`RamLayout`](crate::ram::RamLayout),
//! and none of it lies between 3 and 4 GiB.

use std::ops::Range;

/// Conventional memory ends here, where a PC has video memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// RAM goes on here, behind video memory and BIOS.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// ACPI tables, the RSDP first: in the range that a guest without EFI searches for it (ACPI 6.5, section 5.2.5.1). There is
/// RAM, but the memory map does not give it to the guest.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;

/// Memory of PCI devices, for 32-bit BARs. A guest may move them inside it.
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of PCI bus 0 (PCI Express Base Specification, section 7.2.2): 32 devices of 8 functions of 4 KiB.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// Address and data port of PCI configuration (PCI Local Bus Specification 3.0, section 3.2.2.3.2).
pub const PCI_CONFIG_PORTS: Range<u64> = 0xcf8..0xd00;

/// Registers of the I/O APIC, KVM's in-kernel one.
pub const IO_APIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// Every processor's local APIC, where MSIs go too.
pub const LOCAL_APIC: Range<u64> = 0xfee0_0000..0xfee0_1000;

/// Four pages that KVM needs on Intel processors for real mode: one for the identity map, three for a task state segment.
pub const KVM_PAGES: Range<u64> = 0xfffb_c000..0xfffc_0000;

/// Interrupt lines of the PICs and the I/O APIC: the GSIs below this, line `n` at pin `n`. MSIs have routes from here on.
pub const IRQCHIP_LINES: u32 = 24;
/// Interrupt line of the first serial port.
pub const COM1_LINE: u32 = 4;
/// Interrupt line of the power button.
pub const POWER_BUTTON_LINE: u32 = 5;

/// Command and status port of the i8042 keyboard controller, of which there is the reset line alone.
pub const KEYBOARD_PORTS: Range<u64> = 0x64..0x65;
/// The first serial port.
pub const COM1_PORTS: Range<u64> = 0x3f8..0x400;
/// The port at which a kernel says that it has panicked, where QEMU's machines have it.
pub const PANIC_PORTS: Range<u64> = 0x505..0x506;
/// ACPI's PM1a control register, where QEMU's machines have it; the tables do not name it.
pub const PM1A_CONTROL_PORTS: Range<u64> = 0x604..0x606;
/// ACPI's sleep control and sleep status registers, a byte each (ACPI 6.5, sections 4.8.4.1 and 4.8.4.2).
pub const SLEEP_PORTS: Range<u64> = 0x608..0x60a;
/// ACPI's reset register, a byte (ACPI 6.5, section 4.8.4.6).
pub const RESET_PORTS: Range<u64> = 0x60a..0x60b;
/// What is written there for a reset.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` in the sleep control register for S5, off.
pub const SLEEP_TYPE_OFF: u8 = 5;
