//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc): an ELF entered in 32-bit protected mode with a start-info
//! structure. Stock QEMU and Cloud Hypervisor enter the same images the same way.

use std::io::{Read, Seek};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::{BootError, Entry};
use crate::arch::x86_64::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::ram::GuestRam;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
const COMMAND_LINE_LIMIT: usize = 4096;

/// `XEN_HVM_START_MAGIC_VALUE`, xen/include/public/arch-x86/hvm/start_info.h.
const START_MAGIC: u32 = 0x336e_c578;
/// `E820_RAM`.
const E820_RAM: u32 = 1;

/// Loads the ELF in `image`, the command line and a memory map.
pub(super) fn load<F: Read + Seek + ReadVolatile>(
    ram: &GuestRam,
    image: &mut F,
    command_line: &str,
) -> Result<Entry, BootError> {
    let memory = ram.memory();
    let loaded = Elf::load(memory, None, image, None).map_err(|e| BootError::Load(e.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(address) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };
    if command_line.len() >= COMMAND_LINE_LIMIT {
        return Err(BootError::CommandLine { length: command_line.len(), limit: COMMAND_LINE_LIMIT - 1 });
    }
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, COMMAND_LINE).map_err(|e| BootError::Memory(e.to_string()))?;

    let map = memory_map(ram);
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, START_INFO);
    params.set_sections(&map, MEMORY_MAP);
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|e| BootError::Memory(e.to_string()))?;
    Ok(Entry { address, start_info: START_INFO })
}

fn memory_map(ram: &GuestRam) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, end: u64| hvm_memmap_table_entry { addr, size: end - addr, type_: E820_RAM, reserved: 0 };
    let mut map = Vec::new();
    for region in ram.layout().regions() {
        let end = region.start + region.length;
        if region.start == 0 {
            map.push(entry(0, end.min(LOW_RAM_END)));
            if end > HIGH_RAM_START {
                map.push(entry(HIGH_RAM_START, end));
            }
        } else {
            map.push(entry(region.start, end));
        }
    }
    map
}

/// Sets the registers that PVH prescribes at entry: flat 32-bit segments, protection on, paging off, `ebx` at the start
/// info.
pub(crate) fn set_entry_registers(entry: Entry, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let flat = |type_| kvm_segment { limit: u32::MAX, type_, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x8, ..flat(0xb) };
    let data = kvm_segment { selector: 0x10, ..flat(0x3) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: 0x18, ..Default::default() };
    sregs.cr0 = 0x11; // PE and ET
    sregs.cr4 = 0;
    sregs.efer = 0;
    *regs = kvm_regs { rip: entry.address.0, rbx: entry.start_info.0, rflags: 2, ..Default::default() };
}
