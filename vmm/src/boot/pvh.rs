//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc): an ELF entered in 32-bit protected mode with a start-info
//! structure. Stock QEMU and Cloud Hypervisor enter the same images the same way.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use memory_agent::ByteSize;
use vm_memory::{Bytes, GuestAddress};

use super::elf::Elf;
use super::source::Source;
use super::{BootError, Extras, memory_map};
use crate::arch::x86_64::layout::ACPI_TABLES;
use crate::ram::GuestRam;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6800);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// Linux takes up to 2,047 bytes and says so nowhere; the workload and firmwares have limits of their own.
const COMMAND_LINE_LIMIT: usize = 4095;
/// An initramfs is below this: what bzImages of Linux say of theirs.
const INITRAMFS_LAST: u64 = 0x7fff_ffff;
/// `XEN_HVM_START_MAGIC_VALUE`, xen/include/public/arch-x86/hvm/start_info.h.
const START_MAGIC: u32 = 0x336e_c578;

/// An ELF with a PVH entry point.
#[derive(Debug)]
pub(super) struct PvhElf {
    source: Source,
    elf: Elf,
    entry: u32,
}

impl PvhElf {
    /// Takes one that has been looked at, if it has an entry point.
    pub(super) fn new(source: Source, elf: Elf) -> Result<Self, BootError> {
        let none = || BootError::NotAKernel {
            path: source.path(),
            kind: "an ELF without a PVH entry point (CONFIG_PVH)".into(),
        };
        let entry = elf.pvh_entry.ok_or_else(none)?;
        Ok(Self { source, elf, entry })
    }

    /// Whether it is Linux.
    pub(super) fn is_linux(&self) -> bool {
        self.elf.is_linux
    }

    /// Loads it with all that comes along; gives where to enter.
    pub(super) fn load(&self, ram: &GuestRam, extras: &Extras<'_>) -> Result<PvhEntry, BootError> {
        let ends = self.elf.segments.iter().map(|segment| segment.address.saturating_add(segment.memory));
        let needs = ends.max().unwrap_or(0);
        let has = ram.layout().regions().first().map_or(0, |region| region.length);
        if needs > has {
            return Err(BootError::Memory { needs: ByteSize(needs), has: ByteSize(has) });
        }
        for segment in &self.elf.segments {
            super::must_be_above_tables(segment.address, segment.address + segment.memory)?;
        }
        extras.write_command_line(ram, COMMAND_LINE_LIMIT)?;
        let initramfs = extras.load_initramfs(ram, needs, INITRAMFS_LAST)?;
        let failed = |cause| BootError::Load { what: "the kernel", cause };
        for segment in &self.elf.segments {
            let length = segment.file.end - segment.file.start;
            let read = |at, buffer: &mut [u8]| self.source.read_exact_at(buffer, segment.file.start + at);
            ram.load(segment.address, length, read).map_err(failed)?;
            ram.clear(segment.address + length, segment.memory - length).map_err(failed)?;
        }

        let map: Vec<_> = memory_map::memory_map(ram.layout())
            .into_iter()
            .map(|entry| hvm_memmap_table_entry {
                addr: entry.start,
                size: entry.length,
                type_: entry.usage as u32,
                reserved: 0,
            })
            .collect();
        let mut start_info = hvm_start_info {
            magic: START_MAGIC,
            version: 1,
            cmdline_paddr: super::COMMAND_LINE.0,
            rsdp_paddr: ACPI_TABLES.start,
            memmap_paddr: MEMORY_MAP.0,
            memmap_entries: map.len() as u32,
            ..Default::default()
        };
        let memory = ram.memory();
        if let Some(initramfs) = initramfs {
            (start_info.nr_modules, start_info.modlist_paddr) = (1, MODULES.0);
            let module = hvm_modlist_entry { paddr: initramfs.start, size: initramfs.length, ..Default::default() };
            memory.write_obj(module, MODULES).map_err(super::structures)?;
        }
        for (entry, place) in map.into_iter().zip((MEMORY_MAP.0..).step_by(size_of::<hvm_memmap_table_entry>())) {
            memory.write_obj(entry, GuestAddress(place)).map_err(super::structures)?;
        }
        memory.write_obj(start_info, START_INFO).map_err(super::structures)?;
        Ok(PvhEntry { address: self.entry.into() })
    }
}

/// Where protected mode is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PvhEntry {
    address: u64,
}

impl PvhEntry {
    /// Sets the registers that PVH prescribes at entry: flat 32-bit segments, protection on, paging off, `ebx` at the
    /// start info.
    pub(super) fn set_registers(self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        let flat = |type_| kvm_segment { limit: u32::MAX, type_, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x8, ..flat(0xb) };
        let data = kvm_segment { selector: 0x10, ..flat(0x3) };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: 0x18, ..Default::default() };
        sregs.cr0 = 0x11; // PE and ET
        sregs.cr4 = 0;
        sregs.efer = 0;
        *regs = kvm_regs { rip: self.address, rbx: START_INFO.0, rflags: 2, ..Default::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::file;
    use super::*;

    fn kernel(address: u64) -> PvhElf {
        let bytes = file(address, b"code", &[(b"Xen\0", 18, &[0, 0, 0x20, 0])]);
        let source = Source::Embedded(bytes.leak());
        let elf = Elf::read(&source).unwrap();
        PvhElf::new(source, elf).unwrap()
    }

    #[test]
    fn it_is_loaded_with_what_it_is_told() {
        let ram = GuestRam::new(16 << 20).unwrap();
        // What a kernel before this one has left.
        ram.land_pages(crate::ram::RamPage(0x200), &[0xa5; 4 * 4096]).unwrap();
        let initramfs = Source::Embedded(b"archive");
        let extras = Extras { command_line: "quiet", initramfs: Some(&initramfs) };
        assert_eq!(kernel(0x20_0000).load(&ram, &extras).unwrap().address, 0x20_0000);
        let mut code = [1; 4 + 5000 + 1];
        ram.memory().read_slice(&mut code, GuestAddress(0x20_0000)).unwrap();
        assert!(code.starts_with(b"code\0") && code[4..5004].iter().all(|byte| *byte == 0) && code[5004] == 0xa5);
        let info: hvm_start_info = ram.memory().read_obj(START_INFO).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules, info.rsdp_paddr), (START_MAGIC, 1, 1, 0xe_0000));
        let module: hvm_modlist_entry = ram.memory().read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), ((16 << 20) - 4096, 7));
        let map: [hvm_memmap_table_entry; 2] =
            [0, 24].map(|at| ram.memory().read_obj(GuestAddress(info.memmap_paddr + at)).unwrap());
        assert_eq!((map[0].addr, map[0].size, map[0].type_), (0, 0xa_0000, 1));
        assert_eq!((map[1].addr, map[1].size, map[1].type_), (0xe_0000, 0x2_0000, 2));
        assert_eq!(info.memmap_entries, 5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let extras = Extras { command_line: "", initramfs: None };
        assert!(matches!(kernel(0x7000).load(&ram, &extras), Err(BootError::TooLow { .. })));
        assert!(matches!(kernel(0xf_f000).load(&ram, &extras), Err(BootError::TooLow { .. })));
        assert!(matches!(kernel(16 << 20).load(&ram, &extras), Err(BootError::Memory { .. })));
        assert!(matches!(kernel(1 << 63).load(&ram, &extras), Err(BootError::Memory { .. })));
    }

    #[test]
    fn one_without_an_entry_point_is_refused() {
        let source = Source::Embedded(file(0x20_0000, b"code", &[]).leak());
        let elf = Elf::read(&source).unwrap();
        let refused = PvhElf::new(source, elf).unwrap_err().to_string();
        assert!(refused.contains("CONFIG_PVH"), "{refused}");
    }
}
