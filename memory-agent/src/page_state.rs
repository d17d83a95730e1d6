//! What a page of a shared memory file can be.

use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

/// Bytes in a page. [`Mapping::new`](crate::Mapping::new) refuses a host whose pages are larger.
pub const PAGE_SIZE: u64 = 4096;

/// Where the content of one page of a shared memory file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageState {
    /// Never written, or discarded: reads as zeros, occupies nothing. Allocated but unwritten pages
    /// (`fallocate`) count as holes, as they do for `SEEK_DATA`.
    Hole,
    /// In memory, mapped by the process or not; a page that is still in the swap cache on its way out
    /// (or was just read ahead) is in memory too.
    Resident,
    /// On a swap device, and not in memory.
    Swapped,
}

/// Whether a page, or any bytes, hold nothing but zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most pages differ from zero in their first bytes.
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

/// How many pages are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Counts {
    /// Pages that are holes.
    pub hole: u64,
    /// Pages that are in memory.
    pub resident: u64,
    /// Pages that are swapped out.
    pub swapped: u64,
}

impl Counts {
    /// Pages in all states together.
    pub fn total(&self) -> u64 {
        self.hole + self.resident + self.swapped
    }

    /// Pages in `state`.
    pub fn of(&self, state: PageState) -> u64 {
        match state {
            PageState::Hole => self.hole,
            PageState::Resident => self.resident,
            PageState::Swapped => self.swapped,
        }
    }

    /// The state that most pages are in.
    pub(crate) fn most(&self) -> PageState {
        match () {
            () if self.hole >= self.resident && self.hole >= self.swapped => PageState::Hole,
            () if self.resident >= self.swapped => PageState::Resident,
            () => PageState::Swapped,
        }
    }

    pub(crate) fn count(&mut self, state: PageState, pages: u64) {
        match state {
            PageState::Hole => self.hole += pages,
            PageState::Resident => self.resident += pages,
            PageState::Swapped => self.swapped += pages,
        }
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.hole += other.hole;
        self.resident += other.resident;
        self.swapped += other.swapped;
    }
}
