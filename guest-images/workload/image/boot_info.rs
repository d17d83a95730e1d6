//! What the loader passed: memory map and command line. Copied first, as the loader chose where it lies.

use core::ptr;

use crate::entry;
use crate::extents::{Extent, Extents};

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const COMMAND_LINE: usize = 1024;

/// The boot information, out of the loader's memory.
pub struct BootInfo {
    /// Ranges of RAM.
    pub ram: Extents,
    text: [u8; COMMAND_LINE],
    text_len: usize,
}

/// Why there is none.
#[derive(Debug, Clone, Copy)]
pub enum BootInfoError {
    /// The loader did not pass a PVH start info with a memory map.
    NotPvh,
    /// More RAM ranges than fit.
    TooManyRanges,
}

impl core::fmt::Display for BootInfoError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NotPvh => "the loader did not pass a PVH start info of version 1 with a memory map",
            Self::TooManyRanges => "the memory map has more than 16 ranges of RAM",
        })
    }
}

fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the loader's tables lie in the first 4 GiB, which are mapped; any bits make a valid `T` (integers only).
    unsafe { ptr::read_unaligned(address as *const T) }
}

impl BootInfo {
    /// Reads `hvm_start_info` as Xen's public/arch-x86/hvm/start_info.h has it.
    pub fn read() -> Result<Self, BootInfoError> {
        let info = entry::start_info();
        let (magic, version): (u32, u32) = (read(info), read(info + 4));
        let (command_line, map): (u64, u64) = (read(info + 24), read(info + 40));
        let entries: u32 = read(info + 48);
        if magic != MAGIC || version < 1 || map == 0 {
            return Err(BootInfoError::NotPvh);
        }
        let mut ram = Extents::default();
        for index in 0..u64::from(entries) {
            let entry = map + index * 24;
            if read::<u32>(entry + 16) == RAM {
                let extent = Extent { start: read(entry), len: read(entry + 8) };
                ram.push(extent).map_err(|_| BootInfoError::TooManyRanges)?;
            }
        }
        let (mut text, mut text_len) = ([0; COMMAND_LINE], 0);
        if command_line != 0 {
            for byte in &mut text {
                *byte = read(command_line + text_len as u64);
                if *byte == 0 {
                    break;
                }
                text_len += 1;
            }
        }
        Ok(Self { ram, text, text_len })
    }

    /// The command line; one that is not text is taken for an option nobody knows.
    pub fn command_line(&self) -> &str {
        self.text.get(..self.text_len).and_then(|text| str::from_utf8(text).ok()).unwrap_or("?")
    }
}
