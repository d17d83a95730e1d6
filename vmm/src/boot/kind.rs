//! What a file is that is no kernel: most often something else of the same distribution.

/// Files by how they begin, and what people call them.
const BEGINNINGS: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "gzip data, perhaps a compressed kernel: unpack it first (zcat)"),
    (b"\x28\xb5\x2f\xfd", "zstd data, perhaps a compressed kernel: unpack it first (zstdcat)"),
    (b"\xfd7zXZ\0", "xz data, perhaps a compressed kernel: unpack it first (xzcat)"),
    (b"070701", "a cpio archive, perhaps an initramfs, which is given with --initramfs"),
    (b"070702", "a cpio archive, perhaps an initramfs, which is given with --initramfs"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"MZ", "an EFI program"),
    (b"#!", "a script"),
    (b"!<arch>\n", "a package or a library"),
];

/// Where a disk's master boot record has its signature.
const BOOT_SIGNATURE: usize = 510;

/// What a file that begins like this is called.
pub(super) fn name(start: &[u8]) -> &'static str {
    if start.is_empty() {
        return "empty";
    }
    if let Some((_, name)) = BEGINNINGS.iter().find(|(beginning, _)| start.starts_with(beginning)) {
        return name;
    }
    if start.get(BOOT_SIGNATURE..BOOT_SIGNATURE + 2) == Some(b"\x55\xaa") {
        return "a disk image with a boot sector";
    }
    "neither a bzImage (no HdrS at 0x202) nor an ELF file"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_called_what_they_are() {
        assert_eq!(name(b""), "empty");
        assert!(name(b"\x1f\x8b\x08").contains("zcat"));
        assert!(name(b"MZ and more").contains("EFI"));
        assert!(name(b"any text").contains("neither"));
        let mut disk = [0; 512];
        disk[510..].copy_from_slice(b"\x55\xaa");
        assert!(name(&disk).contains("disk"));
    }
}
