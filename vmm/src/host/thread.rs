//! Threads that are started while a guest depends on this process.

use std::io;
use std::thread::Builder;

use vm_memory::MmapRegion;

/// As many mappings as a thread gets: its stack and its signal stack, and what guards each.
const MAPPINGS: usize = 4;
/// Some pages.
const SIZE: usize = 64 << 10;

/// A thread of this name, to be spawned at once, unless the host has no memory for one.
///
/// The standard library ends the process when a thread that has been created gets no memory for its signal stack
/// (library/std/src/sys/pal/unix/stack_overflow.rs, `make_handler`). As much is taken and given back here, so that a host that
/// refuses memory refuses the thread, as a rule, which whoever starts it can bear.
///
/// # Errors
/// When there is no memory.
pub(crate) fn thread(name: &str) -> io::Result<Builder> {
    let room: Result<Vec<_>, _> = (0..MAPPINGS).map(|_| MmapRegion::<()>::new(SIZE)).collect();
    room.map_err(|e| io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for a thread: {e}")))?;
    Ok(Builder::new().name(name.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_name() {
        let named = thread("example").unwrap().spawn(|| std::thread::current().name() == Some("example")).unwrap();
        assert!(named.join().unwrap());
    }
}
