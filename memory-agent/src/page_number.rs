//! Numbers of pages, a type for each way to count them.

use std::fmt::{Debug, Display};
use std::hash::Hash;
use std::ops::{Add, AddAssign, Range, Sub};

/// A page's number in one way to count pages: those of a mapping, of a file, or of what a user of this crate has. Numbers of
/// different ways are different types, so that they cannot be mixed; [`page_number!`](crate::page_number) makes one.
pub trait PageNumber:
    Copy
    + Debug
    + Default
    + Display
    + Hash
    + Ord
    + Send
    + Sync
    + Add<u64, Output = Self>
    + AddAssign<u64>
    + Sub<Output = u64>
    + 'static
{
    /// The page with this number.
    fn new(number: u64) -> Self;

    /// Its number.
    fn number(self) -> u64;

    /// So many pages from this one on.
    fn run(self, pages: u64) -> Range<Self> {
        self..Self::new(self.number().saturating_add(pages))
    }

    /// The pages with these numbers.
    fn range(numbers: Range<u64>) -> Range<Self> {
        Self::new(numbers.start)..Self::new(numbers.end)
    }
}

/// Makes a type for page numbers: a `u64` that only numbers of its own kind can be compared with and subtracted from. It is
/// printed and serialized as the number alone.
///
/// ```
/// use memory_agent::{PageNumber, PageRange, page_number};
///
/// page_number! {
///     /// A page of a disk image.
///     pub struct ImagePage;
/// }
///
/// let pages = ImagePage(3)..ImagePage(5);
/// assert_eq!(pages.page_count(), 2);
/// assert_eq!(ImagePage(3) + 2, pages.end);
/// assert_eq!(format!("{pages:?}"), "3..5");
/// ```
///
/// ```compile_fail
/// # memory_agent::page_number! { pub struct ImagePage; }
/// # memory_agent::page_number! { pub struct RamPage; }
/// assert!(ImagePage(3) < RamPage(4));
/// ```
#[macro_export]
macro_rules! page_number {
    ($(#[$attribute:meta])* $visibility:vis struct $name:ident;) => {
        $(#[$attribute])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, ::serde::Serialize, ::serde::Deserialize,
        )]
        #[serde(transparent)]
        #[repr(transparent)]
        $visibility struct $name(pub u64);

        impl $crate::PageNumber for $name {
            #[inline]
            fn new(number: u64) -> Self {
                Self(number)
            }

            #[inline]
            fn number(self) -> u64 {
                self.0
            }
        }

        impl ::std::ops::Add<u64> for $name {
            type Output = Self;

            #[inline]
            fn add(self, pages: u64) -> Self {
                Self(self.0 + pages)
            }
        }

        impl ::std::ops::AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, pages: u64) {
                self.0 += pages;
            }
        }

        impl ::std::ops::Sub for $name {
            type Output = u64;

            #[inline]
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl ::std::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                // As in sentences: ranges of pages are printed by this.
                ::std::fmt::Display::fmt(&self.0, f)
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                ::std::fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

page_number! {
    /// A page of a shared memory file: page 0 is the file's first. [`Mapping`](crate::Mapping) knows which page of a mapping it is.
    pub struct FilePage;
}

/// A page of a target: page 0 is the first of its mapping.
pub type Page = u64;

impl PageNumber for u64 {
    fn new(number: u64) -> Self {
        number
    }

    fn number(self) -> u64 {
        self
    }
}
