//! The memory that a subcommand works with, and what it has to leave out.

use memory_agent::{ByteSize, LeftOut, ProcessMemory, SharedMemory};
use serde::{Deserialize, Serialize};

use super::output::say;

/// All memory of a process that was asked for.
#[derive(Debug)]
pub(crate) struct Opened {
    /// What can be worked with, the largest piece first.
    pub(crate) memories: Vec<ProcessMemory>,
    /// What cannot, which has been said.
    pub(crate) left_out: Vec<Omission>,
}

/// Memory that is left out, in JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Omission {
    /// The file's name.
    name: String,
    /// Where the process has it.
    address: u64,
    /// How much of it is mapped.
    bytes: u64,
    /// Why, for people.
    why: String,
}

/// What a subcommand prints in JSON, with what it is not about.
#[derive(Serialize)]
pub(crate) struct Object<'a, T> {
    #[serde(flatten)]
    result: &'a T,
    left_out: &'a [Omission],
}

impl Opened {
    /// Says what is left out.
    pub(crate) fn new(found: SharedMemory) -> Self {
        for LeftOut { name, address, bytes, why } in &found.left_out {
            say(format!("left out {name} ({} at {address:#x}): {why}", ByteSize(*bytes)));
        }
        let omission = |left: LeftOut| Omission {
            name: left.name,
            address: left.address,
            bytes: left.bytes,
            why: left.why.to_string(),
        };
        Self { memories: found.memories, left_out: found.left_out.into_iter().map(omission).collect() }
    }

    /// A result in JSON.
    pub(crate) fn object<'a, T: Serialize>(&'a self, result: &'a T) -> Object<'a, T> {
        Object { result, left_out: &self.left_out }
    }
}
