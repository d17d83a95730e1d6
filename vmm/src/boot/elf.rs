//! ELF files as kernels are (System V ABI, "ELF-64 Object File Format"): what is to be loaded where, and the notes by which
//! a kernel says how it wants to be entered. Whatever a file says of lengths is bounded by the file's own.

use std::io;
use std::ops::Range;

use super::source::Source;

/// Length of the file's header and of a program header.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// A kernel has some ten program headers.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// And some hundred bytes of notes.
const MAX_NOTES: u64 = 64 << 10;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, `public/elfnote.h`): where PVH enters.
const PHYS32_ENTRY: u32 = 18;

/// Something to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its bytes in the file.
    pub(super) file: Range<u64>,
    /// Guest physical address.
    pub(super) address: u64,
    /// Bytes in memory: behind those of the file are zeros.
    pub(super) memory: u64,
}

/// What matters of a kernel in an ELF.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Elf {
    /// In the file's order.
    pub(super) segments: Vec<Segment>,
    /// Guest physical address of the first instruction by PVH.
    pub(super) pvh_entry: Option<u32>,
    /// It has notes of Linux's own.
    pub(super) is_linux: bool,
}

/// Why an ELF is none to boot.
#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    /// Another kind.
    #[error("{0}")]
    Kind(&'static str),
    /// Cut off or damaged.
    #[error("{0}")]
    Damaged(String),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Little-endian fields of a piece of a file; those behind its end are zero.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

impl Elf {
    /// Reads headers and notes.
    pub(super) fn read(source: &Source) -> Result<Self, ElfError> {
        let header = source.read_up_to(0, HEADER)?;
        let fields = Fields(&header);
        match (header.get(4), header.get(5), fields.u16(18)) {
            (Some(2), Some(1), EM_X86_64) => {}
            (Some(1), ..) => return Err(ElfError::Kind("a 32-bit ELF")),
            _ => return Err(ElfError::Kind("an ELF for another processor")),
        }
        let (offset, size, count) = (fields.u64(32), fields.u16(54), fields.u16(56));
        if count == 0 {
            return Err(ElfError::Kind("an ELF with nothing to load, such as an object file"));
        }
        if usize::from(size) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
            return Err(ElfError::Damaged(format!(
                "it has {count} program headers of {size} bytes, where a kernel has up to {MAX_PROGRAM_HEADERS} of {PROGRAM_HEADER}"
            )));
        }
        let headers = source.read_up_to(offset, usize::from(count) * PROGRAM_HEADER)?;
        if headers.len() < usize::from(count) * PROGRAM_HEADER {
            return Err(ElfError::Damaged("its program headers are behind its end".into()));
        }
        let mut elf = Self::default();
        headers.chunks_exact(PROGRAM_HEADER).try_for_each(|header| elf.take(source, &Fields(header)))?;
        // Each byte of the file once, or a small file could take for ever.
        let bytes =
            elf.segments.iter().map(|segment| segment.file.end - segment.file.start).fold(0, u64::saturating_add);
        if bytes > source.length() {
            return Err(ElfError::Damaged("it has the same bytes loaded more than once".into()));
        }
        Ok(elf)
    }

    fn take(&mut self, source: &Source, header: &Fields<'_>) -> Result<(), ElfError> {
        let (kind, offset, address) = (header.u32(0), header.u64(8), header.u64(24));
        let (in_file, memory) = (header.u64(32), header.u64(40));
        if !matches!(kind, PT_LOAD | PT_NOTE) {
            return Ok(());
        }
        let file = offset..offset.saturating_add(in_file);
        if file.end > source.length() {
            let why =
                format!("its bytes {:#x} to {:#x} are behind its end, {:#x}", file.start, file.end, source.length());
            return Err(ElfError::Damaged(why));
        }
        if kind == PT_LOAD && memory > 0 {
            if memory < in_file || address.checked_add(memory).is_none() {
                return Err(ElfError::Damaged(format!(
                    "a segment at {address:#x} is larger in the file than in memory"
                )));
            }
            self.segments.push(Segment { file, address, memory });
        } else if kind == PT_NOTE {
            self.take_notes(&source.read_up_to(file.start, in_file.min(MAX_NOTES) as usize)?);
        }
        Ok(())
    }

    /// Notes are a header of lengths of name and content, and a type; then both, each to a multiple of four.
    fn take_notes(&mut self, mut notes: &[u8]) {
        while notes.len() >= 12 {
            let fields = Fields(notes);
            let (name_length, length, kind) = (fields.u32(0) as usize, fields.u32(4) as usize, fields.u32(8));
            let content_at = 12 + name_length.next_multiple_of(4);
            match notes.get(12..12 + name_length) {
                Some(b"Xen\0") if kind == PHYS32_ENTRY && length >= 4 => self.pvh_entry = Some(fields.u32(content_at)),
                Some(b"Linux\0") => self.is_linux = true,
                _ => {}
            }
            notes = notes.get(content_at + length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaked(bytes: Vec<u8>) -> Source {
        Source::Embedded(bytes.leak())
    }

    /// A file with a segment of `code` at `address` and notes.
    pub(crate) fn file(address: u64, code: &[u8], notes: &[(&[u8], u32, &[u8])]) -> Vec<u8> {
        let mut note_bytes = Vec::new();
        for (name, kind, content) in notes {
            for word in [name.len() as u32, content.len() as u32, *kind] {
                note_bytes.extend(word.to_le_bytes());
            }
            for part in [name, content] {
                note_bytes.extend(*part);
                note_bytes.resize(note_bytes.len().next_multiple_of(4), 0);
            }
        }
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(HEADER, 0);
        bytes[18] = EM_X86_64 as u8;
        bytes[32] = HEADER as u8;
        (bytes[54], bytes[56]) = (PROGRAM_HEADER as u8, 2);
        let first = (HEADER + 2 * PROGRAM_HEADER) as u64;
        let second = first + code.len() as u64;
        for (kind, offset, length, memory) in [
            (PT_LOAD, first, code.len() as u64, code.len() as u64 + 5000),
            (PT_NOTE, second, note_bytes.len() as u64, 0),
        ] {
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 4]);
            for field in [offset, address, address, length, memory, 0] {
                bytes.extend(field.to_le_bytes());
            }
        }
        bytes.extend(code);
        bytes.extend(note_bytes);
        bytes
    }

    #[test]
    fn segments_and_notes_are_found() {
        let notes: [(&[u8], u32, &[u8]); 3] =
            [(b"GNU\0", 3, &[1; 7]), (b"Linux\0", 0x100, &[0; 4]), (b"Xen\0", 18, &[0, 0, 0x10, 0])];
        let elf = Elf::read(&leaked(file(0x10_0000, b"code", &notes))).unwrap();
        assert_eq!(elf.pvh_entry, Some(0x10_0000));
        assert!(elf.is_linux);
        assert_eq!(elf.segments, [Segment { file: 176..180, address: 0x10_0000, memory: 5004 }]);
    }

    #[test]
    fn the_embedded_workload_is_one() {
        let elf = Elf::read(&Source::Embedded(workload_guest::ELF)).unwrap();
        assert!(elf.pvh_entry.is_some() && !elf.is_linux && !elf.segments.is_empty());
    }

    #[test]
    fn what_is_damaged_is_named() {
        let good = file(0x10_0000, b"code", &[]);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            Elf::read(&leaked(bad)).unwrap_err().to_string()
        };
        assert!(with(4, &[1]).contains("32-bit"));
        assert!(with(18, &[183]).contains("another processor"));
        assert!(with(56, &[0, 0]).contains("nothing to load"));
        assert!(with(56, &[0xff, 0xff]).contains("65535 program headers"));
        assert!(with(32, &[0xff; 8]).contains("behind its end"));
        assert!(with(64 + 32, &[0xff; 8]).contains("behind its end"));
        assert!(with(64 + 40, &[1, 0]).contains("larger in the file"));
        assert!(with(64 + 24, &[0xff; 8]).contains("larger in the file"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_load_more_than_there_is(
            changes in prop::collection::vec((0_usize..400, any::<u8>()), 0..20),
            cut in 0_usize..400,
        ) {
            let mut bytes = file(0x10_0000, b"code", &[(b"Xen\0", 18, &[0, 0, 0x10, 0])]);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(cut);
            let length = bytes.len() as u64;
            if let Ok(elf) = Elf::read(&leaked(bytes)) {
                for segment in elf.segments {
                    prop_assert!(segment.file.end <= length && segment.memory >= segment.file.end - segment.file.start);
                }
            }
        }
    }
}
