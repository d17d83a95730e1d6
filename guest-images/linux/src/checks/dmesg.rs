//! The kernel's messages of priority err or worse, and how many warnings there are.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

use super::tried;
use crate::{Outcome, news};

/// Priorities up to this one are errors (`LOGLEVEL_ERR`, include/linux/kern_levels.h).
const ERR: u8 = 3;
const WARNING: u8 = 4;
/// The longest record (`PRINTK_MESSAGE_MAX`).
const RECORD_BYTES: usize = 8192;

/// Needs no argument.
pub(super) fn check(_: &str) -> Outcome {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(|e| e.to_string())?;
    let mut log = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg").map_err(tried("/dev/kmsg"))?;
    let (mut errors, mut warnings) = (0_u32, 0_u32);
    let mut record = vec![0; RECORD_BYTES];
    loop {
        let read = match log.read(&mut record) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            // Records were overwritten meanwhile: the next read goes on with those that are left.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => continue,
            Err(e) => return Err(format!("/dev/kmsg: {e}")),
        };
        match parse(&String::from_utf8_lossy(&record[..read])) {
            Some((priority, text)) if priority <= ERR => {
                errors += 1;
                news("dmesg", &format!("{priority} {text}"));
            }
            Some((WARNING, _)) => warnings += 1,
            _ => {}
        }
    }
    Ok(format!("errors={errors} warnings={warnings}"))
}

/// Priority and text of a record, `PRIORITY,SEQUENCE,TIME,FLAGS;TEXT` (Documentation/ABI/testing/dev-kmsg).
fn parse(record: &str) -> Option<(u8, &str)> {
    let (head, text) = record.split_once(';')?;
    let number: u32 = head.split(',').next()?.parse().ok()?;
    // Above the lowest three bits is who said it.
    Some(((number & 7) as u8, text.lines().next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        assert_eq!(parse("3,12,345,-;it burns\n SUBSYSTEM=acpi\n"), Some((3, "it burns")));
        assert_eq!(parse("14,12,345,-,x=y;user says; so\n"), Some((6, "user says; so")));
        assert_eq!(parse("none"), None);
    }
}
