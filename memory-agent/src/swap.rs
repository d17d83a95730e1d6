//! The host's active swap devices.

use std::fs::read;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why swap devices cannot be listed.
#[derive(Debug, Error)]
pub enum SwapError {
    /// `/proc/swaps` cannot be read.
    #[error("cannot read /proc/swaps: {0}; mount /proc, and use a kernel with CONFIG_SWAP")]
    Read(io::Error),
    /// A line of `/proc/swaps` is not as `proc(5)` describes it.
    #[error("cannot understand the line {0:?} of /proc/swaps: please report it with the kernel's version")]
    Malformed(String),
}

/// What a swap device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapKind {
    /// Compressed memory.
    Zram,
    /// A block device.
    Partition,
    /// A file in a file system.
    File,
    /// Something this version does not know.
    Other,
}

/// An active swap device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapDevice {
    /// The device or file.
    pub path: PathBuf,
    /// What it is made of.
    pub kind: SwapKind,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What is occupied of it, in bytes.
    pub used_bytes: u64,
    /// Devices with higher numbers are filled first.
    pub priority: i32,
}

impl SwapDevice {
    /// Whether a page that is paged out to this device leaves memory at once, unless zswap stands before it. On others it is
    /// queued and stays in the swap cache, resident, until the kernel needs the memory.
    pub fn frees_at_once(&self) -> bool {
        self.kind == SwapKind::Zram
    }

    /// Bytes that are not occupied.
    pub fn free_bytes(&self) -> u64 {
        self.size_bytes.saturating_sub(self.used_bytes)
    }
}

/// Whether pages that are paged out leave memory at once, wherever they go.
pub(crate) fn all_frees_at_once() -> Result<bool, SwapError> {
    Ok(active()?.iter().all(SwapDevice::frees_at_once) && !zswap_is_enabled())
}

/// Whether pages go to compressed memory before they go to a swap device (Documentation/admin-guide/mm/zswap.rst). What comes
/// back from there comes by the swap cache, with what is read ahead, and what is moved on to a device waits there too.
pub fn zswap_is_enabled() -> bool {
    is_yes(Path::new("/sys/module/zswap/parameters/enabled"))
}

/// Whether a parameter of a module is set; false where there is no such module.
fn is_yes(parameter: &Path) -> bool {
    read(parameter).is_ok_and(|text| matches!(text.first(), Some(b'Y' | b'y' | b'1')))
}

/// The active swap devices, in the kernel's order.
///
/// # Errors
/// [`SwapError`] when the kernel does not tell, or tells something unknown.
pub fn active() -> Result<Vec<SwapDevice>, SwapError> {
    // Bytes: a path need not be UTF-8.
    parse(&String::from_utf8_lossy(&read("/proc/swaps").map_err(SwapError::Read)?))
}

fn parse(text: &str) -> Result<Vec<SwapDevice>, SwapError> {
    let lines = text.lines().skip(1).filter(|line| !line.trim().is_empty());
    lines.map(|line| parse_line(line).ok_or_else(|| SwapError::Malformed(line.to_owned()))).collect()
}

fn parse_line(line: &str) -> Option<SwapDevice> {
    // The path's own blanks are escaped; the last four fields never have any, so they are taken from the end.
    let mut fields = line.split_ascii_whitespace().rev();
    let priority = fields.next()?.parse().ok()?;
    let used_kib: u64 = fields.next()?.parse().ok()?;
    let size_kib: u64 = fields.next()?.parse().ok()?;
    let kind = fields.next()?;
    let path = PathBuf::from(unescape(fields.next()?));
    if fields.next().is_some() {
        return None;
    }
    let kind = match kind {
        _ if is_zram(&path) => SwapKind::Zram,
        "partition" => SwapKind::Partition,
        "file" => SwapKind::File,
        _ => SwapKind::Other,
    };
    let bytes = |kib: u64| kib.checked_mul(1024);
    Some(SwapDevice { path, kind, size_bytes: bytes(size_kib)?, used_bytes: bytes(used_kib)?, priority })
}

fn is_zram(path: &Path) -> bool {
    let name = path.strip_prefix("/dev").ok().and_then(Path::to_str);
    let number = name.and_then(|name| name.strip_prefix("zram"));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Undoes the kernel's octal escapes of blanks and backslashes (fs/seq_file.c `mangle_path`).
fn unescape(path: &str) -> String {
    let mut plain = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if byte.is_ascii() => {
                plain.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            _ => {
                plain.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

    #[test]
    fn reads_every_kind() {
        let text = format!(
            "{HEADER}/dev/zram0                              partition\t2097148\t\t12\t\t100\n\
             /dev/vda2 partition 1048572 0 -2\n/swap\\040file\\040(deleted) file 4 4 -3\n/x strange 1 0 0\n"
        );
        let devices = parse(&text).unwrap();
        let kinds: Vec<_> = devices.iter().map(|d| d.kind).collect();
        assert_eq!(kinds, [SwapKind::Zram, SwapKind::Partition, SwapKind::File, SwapKind::Other]);
        assert_eq!(devices[0].size_bytes, 2_097_148 * 1024);
        assert_eq!(devices[0].used_bytes, 12 * 1024);
        assert!(devices[0].frees_at_once() && !devices[1].frees_at_once());
        assert_eq!(devices[1].priority, -2);
        assert_eq!(devices[2].path, Path::new("/swap file (deleted)"));
        assert_eq!(devices[2].free_bytes(), 0);
    }

    #[test]
    fn a_parameter_is_yes_no_or_not_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, yes) in [("Y\n", true), ("N\n", false), ("1\n", true), ("", false)] {
            std::fs::write(file.path(), text).unwrap();
            assert_eq!(is_yes(file.path()), yes, "{text:?}");
        }
        assert!(!is_yes(Path::new("/sys/module/no_such_module/parameters/enabled")));
    }

    #[test]
    fn no_devices_is_an_empty_list() {
        assert_eq!(parse(HEADER).unwrap(), []);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for line in
            ["/dev/x partition 1 2", "/dev/x partition -1 0 0", "a b c d e f", "/x file 18446744073709551615 0 0"]
        {
            assert!(matches!(parse(&format!("{HEADER}{line}\n")), Err(SwapError::Malformed(l)) if l == line));
        }
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in "\\PC*(\n\\PC*){0,4}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_path_is_recovered(path in "/[a-z \\\\\t\nü]{0,20}", size in 0..1u64 << 40) {
            let escape = |c| match c {
                ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
                c => c.to_string(),
            };
            let escaped: String = path.chars().map(escape).collect();
            let devices = parse(&format!("{HEADER}{escaped} file {size} 0 -1\n")).unwrap();
            prop_assert_eq!(&devices[0].path, Path::new(&path));
            prop_assert_eq!(devices[0].size_bytes, size * 1024);
        }
    }
}
