//! The first bytes each side sends: who it is and what it speaks.

use std::io::{Read, Write};

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{VERSION, WireError};

/// What a Thermocline stream begins with.
pub const MAGIC: [u8; 8] = *b"THRMCLNE";

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Preamble {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    reserved2: U32,
}

/// Sends our preamble.
///
/// # Errors
/// When the connection fails.
pub fn send(link: &mut impl Write) -> Result<(), WireError> {
    let preamble = Preamble { magic: MAGIC, version: U16::new(VERSION), reserved: U16::ZERO, reserved2: U32::ZERO };
    link.write_all(preamble.as_bytes())?;
    Ok(link.flush()?)
}

/// Receives the other side's preamble and checks it.
///
/// # Errors
/// When the other side is another program or speaks another version.
pub fn receive(link: &mut impl Read) -> Result<(), WireError> {
    let mut bytes = [0; size_of::<Preamble>()];
    let mut have = 0;
    while have < bytes.len() {
        // Another program may send less than this and wait: what differs is told as soon as it differs.
        match link.read(&mut bytes[have..])? {
            0 if have == 0 => return Err(WireError::Closed),
            0 => return Err(not_thermocline(&bytes[..have])),
            n => have += n,
        }
        let magic = have.min(MAGIC.len());
        if bytes[..magic] != MAGIC[..magic] {
            return Err(not_thermocline(&bytes[..have]));
        }
    }
    let preamble = Preamble::read_from_bytes(&bytes).map_err(|_| not_thermocline(&bytes))?;
    if preamble.version.get() != VERSION {
        return Err(WireError::Version { theirs: preamble.version.get(), ours: VERSION });
    }
    Ok(())
}

fn not_thermocline(bytes: &[u8]) -> WireError {
    WireError::NotThermocline { began: format!("\"{}\"", bytes.escape_ascii()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_preamble_is_accepted() {
        let mut bytes = Vec::new();
        send(&mut bytes).unwrap();
        receive(&mut bytes.as_slice()).unwrap();
    }

    #[test]
    fn another_program_and_another_version_are_told_apart() {
        let e = receive(&mut &b"SSH-2.0-OpenSSH_9.2\r\n"[..]).unwrap_err();
        assert!(matches!(&e, WireError::NotThermocline { began } if began.contains("SSH-2.0")), "{e}");
        let mut bytes = Vec::new();
        send(&mut bytes).unwrap();
        bytes[8] = 99;
        assert!(matches!(receive(&mut bytes.as_slice()), Err(WireError::Version { theirs: 99, ours: VERSION })));
        assert!(matches!(receive(&mut &b""[..]), Err(WireError::Closed)));
        assert!(matches!(receive(&mut &b"THR"[..]), Err(WireError::NotThermocline { .. })));
    }
}
