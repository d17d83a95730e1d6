//! What asking about pages and paging them out costs on this host, in ns a page: run as root with
//! `cargo run --release -p memory-agent --example asking_costs`. Takes 1 GiB of memory and some zram.
#![allow(unsafe_code, reason = "maps memory and advises the kernel about it, to compare")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::ptr;
use std::time::{Duration, Instant};

use memory_agent::{Mapping, PAGE_SIZE, PageCache, PageCacheBySeek, Probe, ScopedZram, counts_of, page_out};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};

const PAGES: u64 = 1 << 18;
const WINDOW: u64 = 4096;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Memory {
    file: File,
    base: *mut u64,
}

impl Memory {
    /// Fills pages with numbers that compress badly.
    fn write(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            for i in 0..512 {
                let word = (page * 512 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                // SAFETY: page is below PAGES, which is what is mapped, for the whole run.
                unsafe { self.base.add((page * 512 + i) as usize).write_volatile(word ^ word >> 29) };
            }
        }
    }

    fn punch(&self, pages: impl Iterator<Item = u64>) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for page in pages {
            fallocate(&self.file, flags, page * PAGE_SIZE, PAGE_SIZE)?;
        }
        Ok(())
    }
}

fn best_of_five(mut what: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        what()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn per_page(time: Duration, pages: u64) -> f64 {
    time.as_nanos() as f64 / pages as f64
}

fn report(what: &str, mapping: &Mapping<'_>) -> Result<()> {
    let whole = |probe: &dyn Probe| {
        best_of_five(|| {
            black_box(probe.residency(mapping, 0..PAGES)?);
            Ok(())
        })
    };
    let in_windows = best_of_five(|| {
        for start in (0..PAGES).step_by(WINDOW as usize) {
            black_box(PageCache.residency(mapping, start..start + WINDOW)?);
        }
        Ok(())
    })?;
    let counting = best_of_five(|| {
        black_box(counts_of(mapping)?);
        Ok(())
    })?;
    println!(
        "{what:32} page-cache {:6.1}, in windows {:6.1}, by seek {:6.1}; counts_of {:.0} us in all",
        per_page(whole(&PageCache)?, PAGES),
        per_page(in_windows, PAGES),
        per_page(whole(&PageCacheBySeek)?, PAGES),
        counting.as_secs_f64() * 1e6,
    );
    Ok(())
}

/// Pages everything out, every other window by the bare system call.
fn paging_out(memory: &Memory, mapping: &Mapping<'_>) -> Result<()> {
    let (mut bare, mut ours) = (Duration::ZERO, Duration::ZERO);
    for start in (0..PAGES).step_by(WINDOW as usize) {
        let clock = Instant::now();
        if (start / WINDOW).is_multiple_of(2) {
            let address = memory.base.wrapping_add((start * 512) as usize).cast();
            // SAFETY: this advice never changes what memory reads as.
            unsafe { madvise(address, (WINDOW * PAGE_SIZE) as usize, Advice::LinuxPageOut) }?;
            bare += clock.elapsed();
        } else {
            page_out(mapping, &[start..start + WINDOW])?;
            ours += clock.elapsed();
        }
    }
    let (ours, bare) = (per_page(ours, PAGES / 2), per_page(bare, PAGES / 2));
    println!("{:32} page_out {ours:.0}, MADV_PAGEOUT alone {bare:.0}", "paging out");
    page_out(mapping, &[0..PAGES])?;
    Ok(())
}

fn main() -> Result<()> {
    let zram = ScopedZram::new(2 * PAGES * PAGE_SIZE)?;
    let file = File::from(memfd_create("asking-costs", MemfdFlags::CLOEXEC)?);
    file.set_len(PAGES * PAGE_SIZE)?;
    let (protection, length) = (ProtFlags::READ | ProtFlags::WRITE, (PAGES * PAGE_SIZE) as usize);
    // SAFETY: a new mapping at a place of the kernel's choice, kept until the program ends.
    let base = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0) }?;
    let memory = Memory { file, base: base.cast() };
    let mapping = Mapping::new(memory.file.as_fd(), 0, base.addr(), PAGES * PAGE_SIZE)?;

    report("holes", &mapping)?;
    memory.write(0..PAGES);
    report("resident", &mapping)?;
    paging_out(&memory, &mapping)?;
    report("swapped", &mapping)?;
    let in_eights = || (0..PAGES).filter(|page| page / 8 % 2 == 0);
    memory.write(in_eights());
    report("8 resident, 8 swapped", &mapping)?;
    memory.punch(in_eights())?;
    report("8 holes, 8 swapped", &mapping)?;
    memory.write(0..PAGES);
    page_out(&mapping, &[0..PAGES])?;
    memory.punch((0..PAGES).step_by(2))?;
    report("1 hole, 1 swapped", &mapping)?;
    drop(memory);
    zram.close()?;
    Ok(())
}
