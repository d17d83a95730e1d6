//! What comes along with a kernel, whichever protocol enters it: its command line and its initramfs.

use memory_agent::{ByteSize, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::source::Source;
use super::{BootError, structures};
use crate::ram::{GuestRam, RamRegion};

/// Where the command line is.
pub(super) const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);

/// What comes along with a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extras<'a> {
    /// As the guest sees it.
    pub(super) command_line: &'a str,
    /// An archive, if there is one.
    pub(super) initramfs: Option<&'a Source>,
}

impl Extras<'_> {
    /// Writes the command line, of up to `limit` bytes.
    pub(super) fn write_command_line(&self, ram: &GuestRam, limit: usize) -> Result<(), BootError> {
        let line = self.command_line.as_bytes();
        if line.len() > limit {
            return Err(BootError::CommandLine { length: line.len(), limit });
        }
        if let Some(at) = line.iter().position(|byte| *byte == 0) {
            return Err(BootError::Nul(at));
        }
        ram.memory().write_slice(&[line, &[0]].concat(), COMMAND_LINE).map_err(structures)
    }

    /// Puts the initramfs as high as it may be, behind what the kernel needs and at `last` at most; gives where it is.
    pub(super) fn load_initramfs(
        &self,
        ram: &GuestRam,
        kernel_end: u64,
        last: u64,
    ) -> Result<Option<RamRegion>, BootError> {
        let Some(source) = self.initramfs else { return Ok(None) };
        let length = source.length();
        if length == 0 {
            return Err(BootError::EmptyInitramfs(source.path()));
        }
        let low = ram.layout().regions().first().map_or(0, |region| region.length);
        let end = low.min(last.saturating_add(1));
        let start = end.saturating_sub(length) / PAGE_SIZE * PAGE_SIZE;
        if start < kernel_end {
            let room = ByteSize(end.saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE)));
            return Err(BootError::Initramfs { path: source.path(), size: ByteSize(length), room });
        }
        let read = |at, buffer: &mut [u8]| source.read_exact_at(buffer, at);
        ram.load(start, length, read).map_err(|cause| BootError::Load { what: "the initramfs", cause })?;
        Ok(Some(RamRegion { start, length }))
    }
}
