//! The control queue (VIRTIO 1.2, 5.1.6.5): commands, each with an answer of one byte.

use super::features::{CTRL_GUEST_OFFLOADS, GUEST_ANNOUNCE, MQ};
use super::link::Link;
use crate::devices::virtio::{Activation, Chain, DeviceFault, QueueLock};

const OK: u8 = 0;
const ERR: u8 = 1;
/// Class and command.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
const MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
const GUEST_OFFLOADS_SET: [u8; 2] = [5, 0];
/// Most bytes of a command with what belongs to it.
const MOST: usize = 10;

/// Carries out the commands that are there.
pub(super) fn serve(
    queue: &mut QueueLock<'_>,
    activation: &Activation,
    link: &Link,
    pairs: u16,
) -> Result<(), DeviceFault> {
    while let Some(chain) = queue.pop()? {
        let written = answer(&chain, activation, link, pairs).map_err(|e| queue.fault(e.to_string()))?;
        queue.push(chain.head, written)?;
    }
    queue.notify()
}

/// Carries out one command and writes the answer, if there is a place for it; the number of bytes written.
fn answer(chain: &Chain, activation: &Activation, link: &Link, pairs: u16) -> Result<u32, vm_memory::GuestMemoryError> {
    if chain.writable.is_empty() {
        return Ok(0);
    }
    let mut bytes = [0; MOST];
    let length = chain.readable.read(&activation.ram, &mut bytes)?;
    let is_whole = chain.readable.len() <= MOST as u64;
    let is_done = is_whole && carry_out(&bytes[..length], activation, link, pairs).is_some();
    Ok(chain.writable.write(&activation.ram, &[if is_done { OK } else { ERR }])? as u32)
}

/// Carries out a command. None if it was not offered, or makes no sense.
fn carry_out(command: &[u8], activation: &Activation, link: &Link, pairs: u16) -> Option<()> {
    let (command, data) = command.split_first_chunk::<2>()?;
    match *command {
        MQ_VQ_PAIRS_SET if activation.has(MQ) => {
            let wanted = u16::from_le_bytes(data.try_into().ok()?);
            (1..=pairs).contains(&wanted).then(|| link.set_pairs(wanted))
        }
        ANNOUNCE_ACK if activation.has(GUEST_ANNOUNCE) && data.is_empty() => {
            link.end_announcement();
            Some(())
        }
        GUEST_OFFLOADS_SET if activation.has(CTRL_GUEST_OFFLOADS) => {
            link.set_offloads(u64::from_le_bytes(data.try_into().ok()?)).then_some(())
        }
        _ => None,
    }
}
