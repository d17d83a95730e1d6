//! What boots, and how it gets into guest RAM.
//!
//! | to read about | open |
//! |---|---|
//! | Linux's bzImage, by the 64-bit boot protocol | `bzimage.rs` |
//! | ELF kernels and firmware, by PVH | `pvh.rs`, and `elf.rs` for their headers |
//! | command line and initramfs | `extras.rs` |
//! | the memory map | `memory_map.rs` |
//! | the ACPI tables | `acpi/` |
//! | what a file is that is none of it | `kind.rs` |

mod acpi;
mod bzimage;
mod elf;
mod error;
mod extras;
mod kind;
mod memory_map;
mod pvh;
mod source;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use bzimage::{BzImage, LongModeEntry};
use elf::{Elf, ElfError};
pub use error::BootError;
use extras::{COMMAND_LINE, Extras};
use kvm_bindings::{kvm_regs, kvm_sregs};
use pvh::{PvhElf, PvhEntry};
use source::Source;

use crate::arch::x86_64::layout::HIGH_RAM_START;
use crate::ram::GuestRam;
use workload_guest::Options;

/// The command line of a kernel from a file, unless somebody gives one: nothing is ever added to what is given.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0";

/// How much of a file says what it is.
const START: usize = 0x400;

/// What a machine boots, as given with `--kernel`.
#[derive(Clone, Debug, PartialEq)]
pub enum Kernel {
    /// The workload that is embedded in this program, with its options.
    Workload(Options),
    /// From a file, whose kind the file says.
    File(PathBuf),
}

impl FromStr for Kernel {
    type Err = BootError;

    /// `workload`, `workload:OPTIONS`, or a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let options = match text.split_once(':') {
            Some(("workload", options)) => options,
            None if text == "workload" => "",
            _ => return Ok(Self::File(text.into())),
        };
        options.parse().map(Self::Workload).map_err(|e: workload_guest::OptionsError| BootError::Options(e.to_string()))
    }
}

/// What a machine boots, as the user describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Payload {
    /// The kernel.
    pub kernel: Kernel,
    /// An archive for it.
    pub initramfs: Option<PathBuf>,
    /// Its command line; [`DEFAULT_COMMAND_LINE`] when there is none.
    pub command_line: Option<String>,
}

/// A kernel that has been looked at.
#[derive(Debug)]
enum Image {
    Workload(PvhElf, Options),
    BzImage(BzImage),
    PvhElf(PvhElf),
}

/// What boots, opened and looked at, so that it can be loaded as often as the guest reboots, whatever becomes of the files'
/// names meanwhile.
#[derive(Debug)]
pub struct Bootable {
    image: Image,
    initramfs: Option<Source>,
    command_line: String,
}

impl Bootable {
    /// Opens what `payload` names.
    ///
    /// # Errors
    /// When it cannot be opened, or is nothing that boots.
    pub fn open(payload: &Payload) -> Result<Self, BootError> {
        let initramfs = payload.initramfs.as_deref().map(|path| Source::open("initramfs", path)).transpose()?;
        let image = match &payload.kernel {
            Kernel::Workload(_) if initramfs.is_some() || payload.command_line.is_some() => {
                return Err(BootError::OfWorkload);
            }
            Kernel::Workload(options) => Image::Workload(pvh_elf(Source::Embedded(workload_guest::ELF))?, *options),
            Kernel::File(path) => look_at(path)?,
        };
        let command_line = payload.command_line.clone().unwrap_or_else(|| DEFAULT_COMMAND_LINE.into());
        Ok(Self { image, initramfs, command_line })
    }

    /// Whether it is Linux.
    pub fn is_linux(&self) -> bool {
        match &self.image {
            Image::Workload(..) => false,
            Image::BzImage(_) => true,
            Image::PvhElf(elf) => elf.is_linux(),
        }
    }

    /// Puts kernel, command line, initramfs, memory map and tables into RAM.
    ///
    /// # Errors
    /// When something cannot be read or does not fit.
    pub fn load(&self, ram: &GuestRam, cpus: u8) -> Result<Entry, BootError> {
        acpi::write(ram, cpus)?;
        let extras = Extras { command_line: &self.command_line, initramfs: self.initramfs.as_ref() };
        match &self.image {
            Image::Workload(elf, options) => {
                let command_line = Options { cpus: u32::from(cpus), ..*options }.to_string();
                elf.load(ram, &Extras { command_line: &command_line, initramfs: None }).map(Entry::Pvh)
            }
            Image::BzImage(image) => image.load(ram, &extras).map(Entry::LongMode),
            Image::PvhElf(elf) => elf.load(ram, &extras).map(Entry::Pvh),
        }
    }
}

/// What kind of kernel a file is.
fn look_at(path: &Path) -> Result<Image, BootError> {
    let source = Source::open("kernel", path)?;
    let open = |cause| BootError::Open { what: "kernel", path: path.into(), cause };
    let start = source.read_up_to(0, START).map_err(open)?;
    if BzImage::is(&start) {
        return BzImage::new(source).map(Image::BzImage);
    }
    if start.starts_with(b"\x7fELF") {
        return pvh_elf(source).map(Image::PvhElf);
    }
    Err(BootError::NotAKernel { path: path.into(), kind: kind::name(&start).into() })
}

fn pvh_elf(source: Source) -> Result<PvhElf, BootError> {
    let elf = Elf::read(&source).map_err(|e| match e {
        ElfError::Kind(kind) => BootError::NotAKernel { path: source.path(), kind: kind.into() },
        ElfError::Damaged(why) => BootError::Damaged { path: source.path(), why },
        ElfError::Read(cause) => BootError::Open { what: "kernel", path: source.path(), cause },
    })?;
    PvhElf::new(source, elf)
}

/// How a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// By PVH.
    #[allow(private_interfaces, reason = "made and used here alone")]
    Pvh(PvhEntry),
    /// By Linux's 64-bit boot protocol.
    #[allow(private_interfaces, reason = "made and used here alone")]
    LongMode(LongModeEntry),
}

impl Entry {
    /// Sets the registers that its protocol prescribes.
    pub(crate) fn set_registers(self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        match self {
            Self::Pvh(entry) => entry.set_registers(regs, sregs),
            Self::LongMode(entry) => entry.set_registers(regs, sregs),
        }
    }
}

/// Whatever a kernel is given lies below 1 MiB.
fn must_be_above_tables(start: u64, end: u64) -> Result<(), BootError> {
    if start < HIGH_RAM_START { Err(BootError::TooLow { start, end, free: HIGH_RAM_START }) } else { Ok(()) }
}

fn structures(e: vm_memory::GuestMemoryError) -> BootError {
    BootError::Structures(e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(name: &str, bytes: &[u8]) -> Result<Bootable, BootError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Bootable::open(&Payload { kernel: Kernel::File(path), initramfs: None, command_line: None })
    }

    #[test]
    fn the_file_says_what_kind_it_is() {
        let bz_image = opened("vmlinuz", &bzimage::tests::file(5000, 1 << 20)).unwrap();
        assert!(matches!(bz_image.image, Image::BzImage(_)) && bz_image.is_linux());
        let elf = opened("firmware", &elf::tests::file(0x10_0000, b"code", &[(b"Xen\0", 18, &[0; 4])])).unwrap();
        assert!(matches!(elf.image, Image::PvhElf(_)) && !elf.is_linux());
        let vmlinux = elf::tests::file(0x10_0000, b"code", &[(b"Xen\0", 18, &[0; 4]), (b"Linux\0", 257, &[0; 4])]);
        assert!(opened("vmlinux", &vmlinux).unwrap().is_linux());
    }

    #[test]
    fn what_does_not_boot_is_named() {
        let why = |bytes: &[u8]| opened("kernel", bytes).unwrap_err().to_string();
        assert!(why(b"").contains("is empty"));
        assert!(why(b"\x7fELF").contains("ELF for another processor"));
        assert!(why(b"\x1f\x8b").contains("gzip"));
    }

    #[test]
    fn what_is_no_regular_file_is_not_waited_for() {
        for (path, kind) in [("/dev/zero", "a device"), ("/proc", "a folder")] {
            let payload = Payload { kernel: Kernel::File(path.into()), initramfs: None, command_line: None };
            let refused = Bootable::open(&payload).unwrap_err().to_string();
            assert!(refused.contains(kind), "{refused}");
        }
        let nowhere = Payload {
            kernel: "workload".parse().unwrap(),
            initramfs: Some("/no/such/archive".into()),
            command_line: None,
        };
        assert!(Bootable::open(&nowhere).unwrap_err().to_string().contains("initramfs /no/such/archive"));
    }

    #[test]
    fn the_workload_has_options_of_its_own() {
        let kernel: Kernel = "workload".parse().unwrap();
        let payload = Payload { kernel, initramfs: None, command_line: Some("quiet".into()) };
        assert!(matches!(Bootable::open(&payload), Err(BootError::OfWorkload)));
    }
}
