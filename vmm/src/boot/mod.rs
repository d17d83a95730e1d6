//! What boots, and how it gets into guest RAM.

pub mod pvh;

use std::fs::File;
use std::io::{self, Cursor, Read, Seek};
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use vm_memory::GuestAddress;

use crate::ram::GuestRam;
use workload_guest::Options;

/// Where Linux's boot protocol has its magic (Documentation/arch/x86/boot.rst).
const BZ_MAGIC: Range<usize> = 0x202..0x206;

/// What a machine boots, as given with `--kernel`.
#[derive(Clone, Debug, PartialEq)]
pub enum Kernel {
    /// The workload that is embedded in this program, with its options.
    Workload(Options),
    /// An ELF with a PVH entry point, from a file.
    PvhElf(PathBuf),
}

/// Why nothing can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The workload's options are wrong.
    #[error("the workload's options: {0}")]
    Options(String),
    /// The kernel file cannot be read.
    #[error("kernel {path}: {cause}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// The file is a Linux bzImage.
    #[error("kernel {path} is a bzImage, which cannot be booted yet; give an ELF with a PVH note, such as a Linux vmlinux built with CONFIG_PVH", path = path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
    },
    /// The file is no ELF.
    #[error("kernel {path} is no ELF file; give an ELF with a PVH note, such as a Linux vmlinux built with CONFIG_PVH", path = path.display())]
    NotElf {
        /// The file.
        path: PathBuf,
    },
    /// The image cannot be loaded.
    #[error("the kernel cannot be loaded: {0}")]
    Load(String),
    /// The image has no PVH note.
    #[error(
        "the kernel has no PVH entry point; give an ELF with a PVH note, such as a Linux vmlinux built with CONFIG_PVH"
    )]
    NoPvhEntry,
    /// The command line does not fit.
    #[error("the kernel command line has {length} bytes, {limit} are possible")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The most there can be.
        limit: usize,
    },
    /// RAM is too small for what is loaded at boot.
    #[error("the machine's memory is too small to boot in: {0}")]
    Memory(String),
}

impl FromStr for Kernel {
    type Err = BootError;

    /// `workload`, `workload:OPTIONS`, or a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let options = match text.split_once(':') {
            Some(("workload", options)) => options,
            None if text == "workload" => "",
            _ => return Ok(Self::PvhElf(text.into())),
        };
        options.parse().map(Self::Workload).map_err(|e: workload_guest::OptionsError| BootError::Options(e.to_string()))
    }
}

/// Where a loaded kernel begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address of the first instruction.
    pub address: GuestAddress,
    /// Guest physical address of PVH's start info.
    pub start_info: GuestAddress,
}

/// Puts the kernel with its command line and memory map into RAM.
///
/// # Errors
/// When the image cannot be read, is of another kind or does not fit.
pub fn load(kernel: &Kernel, ram: &GuestRam, cpus: u8) -> Result<Entry, BootError> {
    match kernel {
        Kernel::Workload(options) => {
            let options = Options { cpus: u32::from(cpus), ..*options };
            pvh::load(ram, &mut Cursor::new(workload_guest::ELF), &options.to_string())
        }
        Kernel::PvhElf(path) => {
            let open = |cause| BootError::Open { path: path.clone(), cause };
            let mut file = File::open(path).map_err(open)?;
            let mut start = Vec::new();
            file.by_ref().take(BZ_MAGIC.end as u64).read_to_end(&mut start).map_err(open)?;
            file.rewind().map_err(open)?;
            if start.get(BZ_MAGIC) == Some(b"HdrS") {
                return Err(BootError::BzImage { path: path.clone() });
            }
            if !start.starts_with(b"\x7fELF") {
                return Err(BootError::NotElf { path: path.clone() });
            }
            pvh::load(ram, &mut file, "")
        }
    }
}
