//! Frames on the wire, read by what `docs/protocol.md` says and without the code that writes them: a preamble of 24
//! bytes, then headers of 24 bytes with their payloads.

use std::io::Read;

use anyhow::{Result, ensure};
use thermocline::migration::wire::Message;

/// Bytes of a preamble.
const PREAMBLE: usize = 24;
/// Bytes of a header: magic, kind, version, sequence, length, two checksums.
pub const HEADER: usize = 24;
/// No frame is longer.
const MOST: usize = 16 << 20;

/// One frame, or the preamble.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What it is: `preamble`, `pages`, or a message's name.
    pub name: &'static str,
    /// All its bytes.
    pub bytes: Vec<u8>,
}

/// Reads what one side sends, frame by frame.
#[derive(Debug)]
pub struct Frames<R> {
    from: R,
    begun: bool,
}

impl<R: Read> Frames<R> {
    /// From the beginning.
    pub fn new(from: R) -> Self {
        Self { from, begun: false }
    }

    /// The next frame.
    ///
    /// # Errors
    /// At the end of the stream, or when this is none.
    pub fn next_frame(&mut self) -> Result<Frame> {
        if !self.begun {
            let mut bytes = vec![0; PREAMBLE];
            self.from.read_exact(&mut bytes)?;
            self.begun = true;
            return Ok(Frame { name: "preamble", bytes });
        }
        let mut bytes = vec![0; HEADER];
        self.from.read_exact(&mut bytes)?;
        ensure!(bytes.starts_with(b"TCLF"), "no frame begins with {:?}", &bytes[..4]);
        let kind = u16::from_le_bytes([bytes[4], bytes[5]]);
        let length = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
        ensure!(length <= MOST, "a frame of {length} bytes");
        bytes.resize(HEADER + length, 0);
        self.from.read_exact(&mut bytes[HEADER..])?;
        let name = match kind {
            1 => postcard::from_bytes::<Message>(&bytes[HEADER..])?.name(),
            2 => "pages",
            other => anyhow::bail!("kind {other}"),
        };
        Ok(Frame { name, bytes })
    }
}
