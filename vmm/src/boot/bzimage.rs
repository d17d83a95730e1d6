//! Linux's bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst): entered in long mode with all of
//! low memory mapped one to one, and with what the guest is told in `struct boot_params`.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use memory_agent::ByteSize;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::source::Source;
use super::{BootError, Extras, memory_map};
use crate::arch::x86_64::layout::ACPI_TABLES;
use crate::ram::GuestRam;

/// Where the setup header is in the file.
const SETUP_HEADER: u64 = 0x1f1;
/// `HdrS`, at 0x202.
const MAGIC: u32 = 0x5372_6448;
/// The least version of the protocol: `xloadflags` came with it, in Linux 3.8.
const LEAST_VERSION: u16 = 0x020c;
/// `LOADED_HIGH` in `loadflags`: a bzImage and not a zImage.
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64` in `xloadflags`: it can be entered in long mode.
const KERNEL_64: u16 = 1;
/// `type_of_loader` of one that has no number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: normal.
const VIDEO_NORMAL: u16 = 0xffff;
/// The 64-bit entry, behind where the kernel is loaded.
const ENTRY_64: u64 = 0x200;

/// Boot structures, in conventional memory below the command line.
const GDT: GuestAddress = GuestAddress(0x500);
const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);

/// A bzImage whose header has been looked at.
#[derive(Debug)]
pub(super) struct BzImage {
    source: Source,
    header: setup_header,
}

impl BzImage {
    /// Whether a file that begins like this, with 0x206 bytes at least, is one.
    pub(super) fn is(start: &[u8]) -> bool {
        start.get(0x202..0x206) == Some(&MAGIC.to_le_bytes())
    }

    /// Looks at the header.
    pub(super) fn new(source: Source) -> Result<Self, BootError> {
        let path = source.path();
        let mut header = setup_header::default();
        let damaged = |why: String| BootError::Damaged { path: path.clone(), why };
        let bytes = source.read_up_to(SETUP_HEADER, size_of::<setup_header>());
        let bytes = bytes.map_err(|cause| BootError::Open { what: "kernel", path: path.clone(), cause })?;
        if bytes.len() < size_of::<setup_header>() {
            return Err(damaged("it ends in its setup header".into()));
        }
        header.as_mut_slice().copy_from_slice(&bytes);
        let (version, loaded, flags) = (header.version, header.loadflags, header.xloadflags);
        let not_a_kernel = |kind: String| BootError::NotAKernel { path: path.clone(), kind };
        if version < LEAST_VERSION {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(not_a_kernel(format!(
                "a Linux kernel with boot protocol {major}.{minor:02}, before 2.12 of Linux 3.8"
            )));
        }
        if loaded & LOADED_HIGH == 0 {
            return Err(not_a_kernel("a zImage, which is loaded below 1 MiB".into()));
        }
        if flags & KERNEL_64 == 0 {
            return Err(not_a_kernel("a 32-bit Linux kernel".into()));
        }
        let image = Self { source, header };
        let (has, says) = (image.source.length(), image.code_offset() + u64::from(header.syssize) * 16);
        // What signs it comes behind.
        if has.next_multiple_of(16) < says.next_multiple_of(16) || has <= image.code_offset() {
            return Err(damaged(format!("it has {has} bytes, and its header says {says}")));
        }
        Ok(image)
    }

    /// Where the file's protected-mode part begins: behind the boot sector and the setup code.
    fn code_offset(&self) -> u64 {
        let sectors = match self.header.setup_sects {
            0 => 4,
            sectors => u64::from(sectors),
        };
        (sectors + 1) * 512
    }

    /// The longest command line, without the byte that ends it.
    fn command_line_limit(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// Loads it with all that comes along; gives where to enter.
    pub(super) fn load(&self, ram: &GuestRam, extras: &Extras<'_>) -> Result<LongModeEntry, BootError> {
        let start = self.header.pref_address;
        let length = self.source.length() - self.code_offset();
        let needs = start.saturating_add(u64::from(self.header.init_size).max(length));
        let has = ram.layout().regions().first().map_or(0, |region| region.length);
        if needs > has {
            return Err(BootError::Memory { needs: ByteSize(needs), has: ByteSize(has) });
        }
        super::must_be_above_tables(start, needs)?;
        extras.write_command_line(ram, self.command_line_limit())?;
        let initramfs = extras.load_initramfs(ram, needs, u64::from(self.header.initrd_addr_max))?;
        let read = |at, buffer: &mut [u8]| self.source.read_exact_at(buffer, self.code_offset() + at);
        ram.load(start, length, read).map_err(|cause| BootError::Load { what: "the kernel", cause })?;

        let mut params = boot_params { hdr: self.header, acpi_rsdp_addr: ACPI_TABLES.start, ..Default::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.vid_mode = VIDEO_NORMAL;
        params.hdr.code32_start = start as u32;
        params.hdr.cmd_line_ptr = super::COMMAND_LINE.0 as u32;
        if let Some(initramfs) = initramfs {
            params.hdr.ramdisk_image = initramfs.start as u32;
            params.hdr.ramdisk_size = initramfs.length as u32;
        }
        let map = memory_map::memory_map(ram.layout());
        params.e820_entries = map.len() as u8;
        for (to, entry) in params.e820_table.iter_mut().zip(&map) {
            *to = boot_e820_entry { addr: entry.start, size: entry.length, r#type: entry.usage as u32 };
        }
        ram.memory().write_obj(params, BOOT_PARAMS).map_err(super::structures)?;
        write_page_tables(ram)?;
        let gdt: Vec<u8> = SEGMENTS.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
        ram.memory().write_slice(&gdt, GDT).map_err(super::structures)?;
        Ok(LongModeEntry { address: start + ENTRY_64 })
    }
}

/// Where long mode is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LongModeEntry {
    address: u64,
}

/// Descriptors of the protocol's `__BOOT_CS`, 0x10, and `__BOOT_DS`, 0x18: flat, code for 64 bits.
const SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Present, writable, accessed; in the last level dirty and large, too.
const TABLE: u64 = 0x23;
const LARGE_PAGE: u64 = 0xe3;

/// The first GiB one to one. Kernel, parameters and command line are there; Linux maps what else it needs by itself.
fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    let memory = ram.memory();
    let directory: Vec<u8> = (0..512_u64).flat_map(|index| (index << 21 | LARGE_PAGE).to_le_bytes()).collect();
    memory.write_slice(&directory, PAGE_DIRECTORY).map_err(super::structures)?;
    for (table, next) in [(PML4, PDPT), (PDPT, PAGE_DIRECTORY)] {
        let mut page = [0; 4096];
        page[..8].copy_from_slice(&(next.0 | TABLE).to_le_bytes());
        memory.write_slice(&page, table).map_err(super::structures)?;
    }
    Ok(())
}

impl LongModeEntry {
    /// Sets the registers that the protocol prescribes: `rsi` at the parameters, long mode, interrupts off.
    pub(super) fn set_registers(self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        let segment = |type_| kvm_segment { limit: u32::MAX, type_, present: 1, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x10, l: 1, ..segment(0xb) };
        let data = kvm_segment { selector: 0x18, db: 1, ..segment(0x3) };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: 0x20, ..Default::default() };
        sregs.gdt = kvm_dtable { base: GDT.0, limit: size_of_val(&SEGMENTS) as u16 - 1, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr3 = PML4.0;
        sregs.cr4 = 0x20; // PAE
        sregs.cr0 = 0x8000_0011; // PG, ET and PE
        sregs.efer = 0x500; // LME and LMA
        *regs = kvm_regs { rip: self.address, rsi: BOOT_PARAMS.0, rflags: 2, ..Default::default() };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A kernel of `length` bytes of code that says it needs `init_size`, to be loaded at 2 MiB.
    pub(crate) fn file(length: usize, init_size: u32) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 2,
            syssize: length.div_ceil(16) as u32,
            header: MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: KERNEL_64,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 2047,
            pref_address: 2 << 20,
            init_size,
            ..Default::default()
        };
        let mut bytes = vec![0; 3 * 512];
        bytes[SETUP_HEADER as usize..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        bytes.extend((0..length).map(|at| (at % 251) as u8));
        bytes
    }

    fn source(bytes: Vec<u8>) -> Source {
        Source::Embedded(bytes.leak())
    }

    /// The same with bytes changed.
    fn with(at: usize, bytes: &[u8]) -> Result<BzImage, BootError> {
        let mut file = file(5000, 1 << 20);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        BzImage::new(source(file))
    }

    #[test]
    fn what_is_another_kind_is_named() {
        assert!(with(0, &[0]).is_ok());
        let why = |at, bytes: &[u8]| with(at, bytes).unwrap_err().to_string();
        assert!(why(0x206, &[0x0b, 0x02]).contains("2.11"));
        assert!(why(0x211, &[0]).contains("zImage"));
        assert!(why(0x236, &[0, 0]).contains("32-bit"));
        assert!(why(0x1f4, &[0xff; 4]).contains("damaged"));
        let cut = |length: usize| BzImage::new(source(file(5000, 1 << 20)[..length].to_vec())).unwrap_err().to_string();
        assert!(cut(0x210).contains("ends in its setup header"));
        assert!(cut(6000).contains("6000 bytes"));
    }

    #[test]
    fn it_is_loaded_with_what_it_is_told() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let image = BzImage::new(source(file(5000, 8 << 20))).unwrap();
        let initramfs = Source::Embedded(b"070701 an archive");
        let extras = Extras { command_line: "console=ttyS0", initramfs: Some(&initramfs) };
        let entry = image.load(&ram, &extras).unwrap();
        assert_eq!(entry.address, (2 << 20) + 0x200);
        let params: boot_params = ram.memory().read_obj(BOOT_PARAMS).unwrap();
        let header = params.hdr;
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        let archive = (32 << 20) - 4096;
        assert_eq!(({ header.ramdisk_image }, { header.ramdisk_size }), (archive, 17));
        let mut found = [0; 6];
        ram.memory().read_slice(&mut found, GuestAddress(archive.into())).unwrap();
        assert_eq!(&found, b"070701");
        let mut line = [1; 14];
        ram.memory().read_slice(&mut line, GuestAddress({ header.cmd_line_ptr }.into())).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let code: [u8; 2] = ram.memory().read_obj(GuestAddress((2 << 20) + 0x200)).unwrap();
        assert_eq!(code, [(0x200 % 251) as u8, (0x201 % 251) as u8]);
        assert_eq!(params.e820_entries, 5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let image = |init_size| BzImage::new(source(file(5000, init_size))).unwrap();
        let extras = Extras { command_line: "", initramfs: None };
        let refused = image(15 << 20).load(&ram, &extras).unwrap_err().to_string();
        assert!(refused.contains("17 MiB") && refused.contains("16 MiB"), "{refused}");
        assert!(image(u32::MAX).load(&ram, &extras).is_err());
        let long = "x".repeat(2048);
        let extras = Extras { command_line: &long, initramfs: None };
        let refused = image(1 << 20).load(&ram, &extras).unwrap_err().to_string();
        assert!(refused.contains("2048") && refused.contains("2047"), "{refused}");
        let large = Source::Embedded(vec![0; 14 << 20].leak());
        let extras = Extras { command_line: "", initramfs: Some(&large) };
        let refused = image(1 << 20).load(&ram, &extras).unwrap_err().to_string();
        assert!(refused.contains("14 MiB") && refused.contains("13 MiB"), "{refused}");
    }
}
