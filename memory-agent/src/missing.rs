//! Filling memory in later: whoever touches a page that is not there yet waits until it is, and somebody is told.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use thiserror::Error;

use crate::memory::Mapping;
use crate::page_number::{FilePage, Page, PageNumber};
use crate::page_range::PageRange;
use crate::page_state::PAGE_SIZE;
use crate::sys::{SharedMap, no_huge_pages, uffd};

/// Why faults cannot be handled.
#[derive(Debug, Error)]
pub enum FaultError {
    /// This user may not, or the kernel cannot.
    #[error(
        "page faults of a guest cannot be handled here ({0}): give this user /dev/userfaultfd (chmod, setfacl), CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted(io::Error),
    /// There are no such pages.
    #[error("pages {pages:?} are not all of this mapping, which has {all}")]
    OutOfRange {
        /// Those.
        pages: Range<u64>,
        /// How many it has.
        all: u64,
    },
    /// A call failed.
    #[error("{call} failed on pages {pages:?}: {cause}")]
    System {
        /// The call.
        call: &'static str,
        /// What it was asked for.
        pages: Range<u64>,
        /// The system's reason.
        cause: io::Error,
    },
}

/// Holes that could not all be filled.
#[derive(Debug, Error)]
#[error("{cause}")]
pub struct NotFilled {
    /// So many of them, from the first on, are filled, now or before.
    pub filled: u64,
    /// Why the next one is not.
    pub cause: FaultError,
}

/// How often the kernel may say that it is busy with these addresses before it is believed to be for good.
const BUSY: u32 = 1000;

/// Hears of faults on holes of shared mappings in this process, those of the kernel on behalf of a vCPU included
/// (userfaultfd(2), mode `MISSING`). A swapped page is none of these: it comes in by itself.
///
/// Holes are filled by the kernel's `UFFDIO_COPY`, which adds exactly one page where there was none, whole, and never writes over
/// one (mm/shmem.c `shmem_mfill_atomic_pte`). A write through the file would do neither: where the kernel gives shared memory
/// huge pages it adds neighbours, of zeros, which nobody hears of any more (`shmem_allowable_huge_orders`). When this is dropped,
/// whoever waits goes on and finds what is there.
#[derive(Debug)]
pub struct MissingFaults {
    fd: OwnedFd,
}

impl MissingFaults {
    /// Opens what it takes; nothing is registered yet.
    ///
    /// # Errors
    /// [`FaultError::NotPermitted`] when this user may not handle faults of the kernel, or the kernel knows none.
    pub fn open() -> Result<Self, FaultError> {
        let fd = uffd::open_for_kernel_faults(uffd::MISSING_SHMEM).map_err(FaultError::NotPermitted)?;
        Ok(Self { fd })
    }

    /// From now on, whoever touches a hole of `mapping` waits, and the kernel makes no huge pages of it.
    ///
    /// # Errors
    /// When the kernel refuses: somebody else handles this mapping's faults already.
    pub fn register(&self, mapping: &Mapping<'_>) -> Result<Registered, FaultError> {
        let pages = 0..mapping.pages();
        let (address, length) = mapping.bytes(&pages);
        // Before Linux 6.4 khugepaged fills holes of such a mapping, too (mm/khugepaged.c `collapse_file`).
        no_huge_pages(address, length).map_err(failed("madvise(MADV_NOHUGEPAGE)", &pages))?;
        let registered = Registered { addresses: address as u64..(address + length) as u64 };
        uffd::register_missing(self.fd.as_fd(), &registered.addresses).map_err(failed("UFFDIO_REGISTER", &pages))?;
        Ok(registered)
    }

    /// A view of the file behind `mapping`, whose holes are filled without being mapped there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn landing_view(&self, mapping: &Mapping<'_>) -> Result<LandingView, FaultError> {
        let pages = 0..mapping.pages();
        let first = mapping.in_file(&pages).start;
        let length = (mapping.offset(0) + mapping.length()) as usize;
        let map = SharedMap::new(mapping.fd(), length).map_err(|cause| FaultError::System {
            call: "mmap",
            pages: pages.clone(),
            cause,
        })?;
        let end = (map.address() + length) as u64;
        let registered = Registered { addresses: end - mapping.length()..end };
        uffd::register_missing(self.fd.as_fd(), &registered.addresses).map_err(failed("UFFDIO_REGISTER", &pages))?;
        Ok(LandingView { map, registered, first })
    }

    /// Ends that for a mapping: holes read as zeros again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unregister(&self, mapping: &Registered) -> Result<(), FaultError> {
        uffd::unregister(self.fd.as_fd(), &mapping.addresses).map_err(failed("UFFDIO_UNREGISTER", &mapping.pages()))
    }

    /// Gives the host virtual addresses of what has been touched since the last call to `each`, and waits for nothing: the
    /// descriptor is readable when there is something.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn read(&self, each: impl FnMut(u64)) -> Result<(), FaultError> {
        uffd::read_faults(self.fd.as_fd(), each).map_err(failed("read", &(0..0)))
    }

    /// Fills holes with `bytes`, maps them for whoever waits, and wakes it. What is there already stays, and counts as filled.
    /// This waits for nobody who writes to another part of the file, and whoever waited does not fault again.
    ///
    /// # Errors
    /// When the pages are not all of the mapping, or the kernel has no memory.
    ///
    /// # Panics
    /// When `bytes` is not as long as the pages.
    pub fn fill(&self, mapping: &Registered, pages: &Range<u64>, bytes: &[u8]) -> Result<(), NotFilled> {
        let count = pages.page_count();
        let mut filled = 0;
        let mut busy = 0;
        let stopped = |filled, cause| NotFilled { filled, cause };
        while filled < count {
            let rest = pages.start + filled..pages.end;
            let addresses = mapping.addresses_of(&rest).map_err(|e| stopped(filled, e))?;
            match uffd::copy(self.fd.as_fd(), &addresses, &bytes[(filled * PAGE_SIZE) as usize..]) {
                Ok(()) => break,
                Err((copied @ 1.., _)) => filled += copied / PAGE_SIZE,
                Err((_, Errno::EXIST)) => {
                    self.wake(mapping, &(rest.start..rest.start + 1)).map_err(|e| stopped(filled, e))?;
                    filled += 1;
                }
                // Page tables are changing.
                Err((_, Errno::AGAIN)) if busy < BUSY => {
                    busy += 1;
                    std::thread::yield_now();
                }
                Err((_, e)) => return Err(stopped(filled, failed("UFFDIO_COPY", &rest)(e))),
            }
        }
        Ok(())
    }

    /// Fills holes with `bytes` through a view, so that the pages are in nobody's page table: they can be paged out without being
    /// taken from whoever has touched them meanwhile. What is there already stays, and counts as filled. This wakes nobody who
    /// waits for them: [`MissingFaults::wake`] does.
    ///
    /// # Errors
    /// As [`MissingFaults::fill`].
    ///
    /// # Panics
    /// When `bytes` is not as long as the pages.
    pub fn land(&self, view: &LandingView, pages: &Range<u64>, bytes: &[u8]) -> Result<(), NotFilled> {
        let result = self.fill(&view.registered, pages, bytes);
        let filled = result.as_ref().map_or_else(|e| e.filled, |()| pages.page_count());
        let landed = pages.start.run(filled).renumbered(Page::default(), view.first);
        if let Err(e) = view.map.unmap(&landed) {
            // They are where they should be, and stay in memory.
            return result.and(Err(NotFilled { filled, cause: failed("madvise(MADV_DONTNEED)", pages)(e) }));
        }
        result
    }

    /// Fills a hole with zeros and wakes whoever waits for it. What is there already stays.
    ///
    /// # Errors
    /// When the page is not of the mapping, or the kernel has no memory.
    pub fn zero(&self, mapping: &Registered, page: u64) -> Result<(), FaultError> {
        let pages = page..page.saturating_add(1);
        match uffd::zero(self.fd.as_fd(), &mapping.addresses_of(&pages)?) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => self.wake(mapping, &pages),
            // Page tables are changing; the fault is told of again.
            Err(Errno::AGAIN) => self.wake(mapping, &pages),
            Err(e) => Err(failed("UFFDIO_ZEROPAGE", &pages)(e)),
        }
    }

    /// Wakes whoever waits for these pages.
    ///
    /// # Errors
    /// When they are not all of the mapping, or the kernel refuses.
    pub fn wake(&self, mapping: &Registered, pages: &Range<u64>) -> Result<(), FaultError> {
        uffd::wake(self.fd.as_fd(), &mapping.addresses_of(pages)?).map_err(failed("UFFDIO_WAKE", pages))
    }
}

impl AsFd for MissingFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A view of a shared memory file through which holes are filled, and which nobody reads.
#[derive(Debug)]
pub struct LandingView {
    map: SharedMap,
    registered: Registered,
    /// The page of the map that is page 0 of the mapping it stands for.
    first: FilePage,
}

/// A mapping whose faults are heard of, until it is unregistered: where it is, so that nothing has to be asked while somebody
/// waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    addresses: Range<u64>,
}

impl Registered {
    fn pages(&self) -> Range<u64> {
        0..(self.addresses.end - self.addresses.start) / PAGE_SIZE
    }

    /// The page with this host virtual address, if it is of this mapping.
    pub fn page_of(&self, address: u64) -> Option<u64> {
        self.addresses.contains(&address).then(|| (address - self.addresses.start) / PAGE_SIZE)
    }

    fn addresses_of(&self, pages: &Range<u64>) -> Result<Range<u64>, FaultError> {
        let all = self.pages();
        if pages.start > pages.end || pages.end > all.end {
            return Err(FaultError::OutOfRange { pages: pages.clone(), all: all.end });
        }
        let address = |page| self.addresses.start + page * PAGE_SIZE;
        Ok(address(pages.start)..address(pages.end))
    }
}

fn failed(call: &'static str, pages: &Range<u64>) -> impl FnOnce(Errno) -> FaultError {
    let pages = pages.clone();
    move |e| FaultError::System { call, pages, cause: e.into() }
}
