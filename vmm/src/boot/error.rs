//! Why nothing can be booted.

use std::io;
use std::path::PathBuf;

use memory_agent::ByteSize;

use crate::ram::RamError;

/// What can be booted, as the end of a sentence.
const GIVE: &str = "give a 64-bit Linux bzImage (a distribution's vmlinuz), or a 64-bit ELF with a PVH entry point (a vmlinux, a firmware)";

/// Why nothing can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The workload's options are wrong.
    #[error("the workload's options: {0}")]
    Options(String),
    /// A file cannot be opened or read.
    #[error("{what} {path}: {cause}", path = path.display())]
    Open {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// Not a regular file.
    #[error("{what} {path} is {kind}; give a regular file, which can be read again when the guest reboots", path = path.display())]
    NotRegular {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file is nothing that can be booted.
    #[error("kernel {path} is {kind}; {GIVE}", path = path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        kind: String,
    },
    /// The file is cut off or damaged.
    #[error("kernel {path} is damaged: {why}; copy it again", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The file is read differently from a moment ago, or RAM takes no more.
    #[error("{what} cannot be loaded: {cause}")]
    Load {
        /// What is loaded.
        what: &'static str,
        /// What went wrong.
        cause: RamError,
    },
    /// The kernel wants to be where something else has to be.
    #[error(
        "the kernel wants to be at {start:#x} to {end:#x}, and below {free:#x} are the memory map and other tables that it is given; link it higher"
    )]
    TooLow {
        /// Its first byte.
        start: u64,
        /// The first behind it.
        end: u64,
        /// Where it could begin.
        free: u64,
    },
    /// RAM is too small for the kernel.
    #[error("the kernel needs memory up to {needs}, and the machine has {has} below 3 GiB; give it more (--memory)")]
    Memory {
        /// The first byte behind what it needs.
        needs: ByteSize,
        /// RAM in one piece from the start.
        has: ByteSize,
    },
    /// RAM is too small for the initramfs.
    #[error("initramfs {path} has {size}, and {room} is free beside the kernel; give the machine more memory (--memory) or a smaller one", path = path.display())]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Its length.
        size: ByteSize,
        /// What there is for it.
        room: ByteSize,
    },
    /// The initramfs has nothing in it.
    #[error("initramfs {path} is empty; leave it out, or give a cpio archive", path = .0.display())]
    EmptyInitramfs(PathBuf),
    /// The command line does not fit.
    #[error("the kernel command line has {length} bytes, this kernel takes {limit}; shorten it (--cmdline)")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The most there can be.
        limit: usize,
    },
    /// The command line ends where it should not.
    #[error("the kernel command line has a NUL byte at {0}, where a kernel would take it to end")]
    Nul(usize),
    /// The embedded workload has neither.
    #[error(
        "the embedded workload takes neither --initramfs nor --cmdline; its options go behind its name: --kernel workload:OPTIONS"
    )]
    OfWorkload,
    /// Boot structures cannot be written.
    #[error("boot structures cannot be written into guest memory: {0}")]
    Structures(String),
}
