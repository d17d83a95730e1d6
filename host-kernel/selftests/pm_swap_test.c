// SPDX-License-Identifier: GPL-2.0
/*
 * What /proc/PID/pagemap and PAGEMAP_SCAN say about shared memory that is in swap, and that saying it breaks nothing.
 *
 * Runs on stock and patched kernels and finds out which it is on. Needs root and a swap device (zram will do).
 * Prints TAP. Build: gcc -static -O2 -Wall -pthread -o pm_swap_test pm_swap_test.c
 *
 *   pm_swap_test [--expect-stock | --expect-marker] [--expect-exact] [--soak SECONDS] [--only NAME]
 *
 * Exit status: 0 when nothing failed, 1 otherwise.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/shm.h>
#include <sys/swap.h>
#include <sys/wait.h>

#include "pm_swap.h"

/* --- userfaultfd ------------------------------------------------------------------------------------------------ */

struct writer {
	char *at;
	uint64_t page, generation;
	volatile bool done;
};

static void *writer_main(void *arg)
{
	struct writer *w = arg;

	stamp(w->at, w->page, w->generation);
	w->done = true;
	return NULL;
}

/* Writes to a page in a thread. Gives the flags of the fault that userfaultfd reported first, or -1 for none. */
static long write_and_watch(int fd, struct memory *m, size_t page, uint64_t generation)
{
	struct writer w = { .at = m->at + page * PAGE, .page = page, .generation = generation };
	long flags = -1;
	pthread_t thread;

	pthread_create(&thread, NULL, writer_main, &w);
	while (!w.done) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		struct uffd_msg msg;

		if (poll(&p, 1, 20) <= 0 || read(fd, &msg, sizeof(msg)) != sizeof(msg))
			continue;
		if (msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		if (flags < 0)
			flags = msg.arg.pagefault.flags;
		if (msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
			uffd_protect(fd, w.at, PAGE, false);
		} else if (msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) {
			struct uffdio_continue c = { .range = { (uintptr_t)w.at, PAGE } };

			ioctl(fd, UFFDIO_CONTINUE, &c);
		} else {
			struct uffdio_zeropage z = { .range = { (uintptr_t)w.at, PAGE } };

			ioctl(fd, UFFDIO_ZEROPAGE, &z);
		}
	}
	pthread_join(thread, NULL);
	return flags;
}

/* --- Tests ------------------------------------------------------------------------------------------------------ */

#define SWAPPED_HERE(m, page) (!kernel.marker || (entry_of(&(m), page) & PM_SWAP))

static int test_present_swapped_hole(void)
{
	struct memory m = memory_new(4096);

	for (size_t i = 0; i < m.pages; i++)
		if (i % 4 != 3)
			stamp(m.at + i * PAGE, i, 1);
	for (size_t i = 0; i < m.pages; i += 4)
		PROPAGATE(page_out(&m, i, 1));
	PROPAGATE(page_out(&m, 1024, 512));
	PROPAGATE(entries_agree(&m, kernel.marker));
	PROPAGATE(agree(&m));
	for (size_t i = 0; i < m.pages; i++)
		CHECK(stamped(m.at + i * PAGE, i, i % 4 != 3));
	PROPAGATE(agree(&m));
	memory_drop(&m);
	return PASS;
}

static int test_fault(void)
{
	struct memory m = memory_new(512);

	write_pages(&m, 0, 512, 1);
	PROPAGATE(page_out(&m, 0, 512));
	CHECK(SWAPPED_HERE(m, 100) && SWAPPED_HERE(m, 300));
	CHECK(stamped(m.at + 100 * PAGE, 100, 1));
	stamp(m.at + 300 * PAGE, 300, 2);
	CHECK(entry_of(&m, 100) & PM_PRESENT);
	CHECK(entry_of(&m, 300) & PM_PRESENT);
	CHECK(!(entry_of(&m, 100) & PM_SWAP));
	PROPAGATE(agree(&m));
	PROPAGATE(page_out(&m, 0, 512));
	CHECK(stamped(m.at + 300 * PAGE, 300, 2));
	CHECK(content_is(&m, 0, 300, 1) && content_is(&m, 301, 211, 1));
	memory_drop(&m);
	return PASS;
}

/* What comes back by another way than a fault leaves the entry behind: a hint. The exact query knows. */
static int test_pread(void)
{
	struct memory m = memory_new(64);
	char page[PAGE];

	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(pread(m.fd, page, PAGE, 10 * PAGE) == PAGE && stamped(page, 10, 1));
	CHECK(oracle_of(&m, 10) == RESIDENT);
	CHECK(SWAPPED_HERE(m, 10));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 10, 1, 1));
	CHECK(entry_of(&m, 10) & PM_PRESENT);
	memory_drop(&m);
	return PASS;
}

static int test_second_mapping(void)
{
	struct memory m = memory_new(64);
	char *other;

	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	other = map_aligned(m.fd, 64 * PAGE, MAP_SHARED);
	/* A fresh mapping has no entries, and no page table. */
	CHECK(entry_state(entry(other + 5 * PAGE)) == HOLE);
	PROPAGATE(agree_at(m.fd, other, 0, 64));
	for (size_t i = 0; i < 64; i += 2)
		CHECK(stamped(other + i * PAGE, i, 1));
	CHECK(entry(other + 4 * PAGE) & PM_PRESENT);
	CHECK(SWAPPED_HERE(m, 4));
	PROPAGATE(agree(&m));
	PROPAGATE(agree_at(m.fd, other, 0, 64));
	stamp(other + 4 * PAGE, 4, 2);
	CHECK(stamped(m.at + 4 * PAGE, 4, 2));
	CHECK(content_is(&m, 5, 59, 1));
	munmap(other, 64 * PAGE);
	memory_drop(&m);
	return PASS;
}

static int gone_test(int how)
{
	struct memory m = memory_new(64);

	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(SWAPPED_HERE(m, 20));
	if (how == 0)
		CHECK(!fallocate(m.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 16 * PAGE, 16 * PAGE));
	else if (how == 1)
		CHECK(!madvise(m.at + 16 * PAGE, 16 * PAGE, MADV_REMOVE));
	else
		CHECK(!ftruncate(m.fd, 16 * PAGE) && !ftruncate(m.fd, 64 * PAGE));
	for (size_t i = 16; i < 32; i++) {
		CHECK(oracle_of(&m, i) == HOLE);
		CHECK(entry_state(entry_of(&m, i)) == HOLE, "page %zu: %#llx", i, (long long)entry_of(&m, i));
	}
	PROPAGATE(entries_agree(&m, kernel.marker));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 16, 1));
	CHECK(content_is(&m, 16, 16, 0));
	memory_drop(&m);
	return PASS;
}

static int test_punch_hole(void) { return gone_test(0); }
static int test_madv_remove(void) { return gone_test(1); }
static int test_ftruncate(void) { return gone_test(2); }

static int test_madv_dontneed(void)
{
	struct memory m = memory_new(64);

	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 32));
	CHECK(!madvise(m.at, 64 * PAGE, MADV_DONTNEED));
	CHECK(entry_state(entry_of(&m, 3)) == HOLE);
	CHECK(entry_state(entry_of(&m, 40)) == HOLE);
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 64, 1));
	memory_drop(&m);
	return PASS;
}

static int test_mremap(void)
{
	for (int huge = 0; huge < 2; huge++) {
		/* A page table moves whole, or entry by entry. */
		struct memory m = memory_new(1024);
		char *room = map_aligned(-1, 1024 * PAGE, MAP_PRIVATE | MAP_ANONYMOUS);
		char *to = huge ? room : room + 3 * PAGE;
		size_t pages = huge ? 1024 : 512;
		char *at;

		write_pages(&m, 0, 1024, 2);
		PROPAGATE(page_out(&m, 0, 1024));
		at = mremap(m.at, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		CHECK(at == to);
		for (size_t i = 0; i < pages; i++)
			CHECK(!kernel.marker || entry_state(entry(at + i * PAGE)) == (i % 2 ? HOLE : SWAPPED));
		PROPAGATE(agree_at(m.fd, at, 0, pages));
		for (size_t i = 0; i < pages; i++)
			CHECK(stamped(at + i * PAGE, i, i % 2 == 0));
		munmap(room, 1024 * PAGE);
		munmap(m.at, 1024 * PAGE);
		close(m.fd);
	}
	return PASS;
}

static int test_mprotect(void)
{
	struct memory m = memory_new(512);

	write_pages(&m, 0, 512, 2);
	PROPAGATE(page_out(&m, 0, 256));
	CHECK(!mprotect(m.at, 512 * PAGE, PROT_READ));
	PROPAGATE(entries_agree(&m, kernel.marker));
	CHECK(!mprotect(m.at, 512 * PAGE, PROT_NONE));
	PROPAGATE(entries_agree(&m, false));
	CHECK(!mprotect(m.at, 512 * PAGE, PROT_READ | PROT_WRITE));
	PROPAGATE(entries_agree(&m, kernel.marker));
	PROPAGATE(agree(&m));
	for (size_t i = 0; i < 512; i++)
		CHECK(stamped(m.at + i * PAGE, i, i % 2 == 0));
	stamp(m.at, 0, 2);
	CHECK(content_is(&m, 0, 1, 2));
	memory_drop(&m);
	return PASS;
}

static int test_fork(void)
{
	struct memory m = memory_new(64);
	int status;
	pid_t child;

	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	child = fork();
	if (!child) {
		pagemap = open("/proc/self/pagemap", O_RDONLY);
		if (agree(&m) != PASS)
			_exit(1);
		if (!content_is(&m, 0, 32, 1))
			_exit(2);
		stamp(m.at + 40 * PAGE, 40, 2);
		if (agree(&m) != PASS)
			_exit(3);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
	CHECK(SWAPPED_HERE(m, 50));
	CHECK(SWAPPED_HERE(m, 40));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 40, 1, 2) && content_is(&m, 0, 40, 1) && content_is(&m, 41, 23, 1));
	memory_drop(&m);
	return PASS;
}

/* Write protection is armed first, then the page goes: both must be there, and a write must be reported. */
static int test_uffd_wp_then_pageout(void)
{
	struct memory m = memory_new(64);
	int fd;

	SKIP_UNLESS(kernel.wp);
	fd = uffd_open(FEATURE_WP_SHMEM);
	write_pages(&m, 0, 64, 1);
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_WP), "%s", strerror(errno));
	CHECK(!uffd_protect(fd, m.at, 64 * PAGE, true));
	PROPAGATE(page_out(&m, 0, 64));
	for (size_t i = 0; i < 64; i++)
		CHECK((entry_of(&m, i) & PM_UFFD_WP) && SWAPPED_HERE(m, i));
	PROPAGATE(agree(&m));
	CHECK(write_and_watch(fd, &m, 7, 2) & UFFD_PAGEFAULT_FLAG_WP);
	CHECK(content_is(&m, 7, 1, 2));
	/* Read in first, then written: still protected. */
	CHECK(content_is(&m, 8, 1, 1));
	CHECK(entry_of(&m, 8) & PM_UFFD_WP);
	CHECK(write_and_watch(fd, &m, 8, 2) & UFFD_PAGEFAULT_FLAG_WP);
	/* Lifted while out: gone, but still out. */
	CHECK(!uffd_protect(fd, m.at + 20 * PAGE, 10 * PAGE, false));
	CHECK(!(entry_of(&m, 20) & PM_UFFD_WP) && SWAPPED_HERE(m, 20));
	CHECK(write_and_watch(fd, &m, 20, 2) == -1);
	/* And armed again. */
	CHECK(!uffd_protect(fd, m.at + 21 * PAGE, PAGE, true));
	CHECK((entry_of(&m, 21) & PM_UFFD_WP) && SWAPPED_HERE(m, 21));
	CHECK(write_and_watch(fd, &m, 21, 2) & UFFD_PAGEFAULT_FLAG_WP);
	CHECK(!mprotect(m.at + 30 * PAGE, 10 * PAGE, PROT_READ));
	CHECK(!mprotect(m.at + 30 * PAGE, 10 * PAGE, PROT_READ | PROT_WRITE));
	CHECK((entry_of(&m, 30) & PM_UFFD_WP) && SWAPPED_HERE(m, 30));
	CHECK(write_and_watch(fd, &m, 30, 2) & UFFD_PAGEFAULT_FLAG_WP);
	/* Markers survive a closed userfaultfd no longer than the next touch. */
	close(fd);
	CHECK(content_is(&m, 40, 24, 1));
	stamp(m.at + 41 * PAGE, 41, 2);
	memory_drop(&m);
	return PASS;
}

static int test_pageout_then_uffd_wp(void)
{
	struct memory m = memory_new(64);
	int fd;

	SKIP_UNLESS(kernel.wp);
	fd = uffd_open(FEATURE_WP_SHMEM);
	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_WP));
	CHECK(!uffd_protect(fd, m.at, 64 * PAGE, true));
	for (size_t i = 0; i < 64; i++)
		CHECK((entry_of(&m, i) & PM_UFFD_WP) && SWAPPED_HERE(m, i));
	for (size_t i = 0; i < 64; i += 2)
		CHECK(write_and_watch(fd, &m, i, 2) & UFFD_PAGEFAULT_FLAG_WP, "page %zu", i);
	for (size_t i = 0; i < 64; i++)
		CHECK(content_is(&m, i, 1, i % 2 ? 1 : 2));
	for (size_t i = 1; i < 64; i += 2)
		CHECK(write_and_watch(fd, &m, i, 2) & UFFD_PAGEFAULT_FLAG_WP, "page %zu", i);
	PROPAGATE(agree(&m));
	close(fd);
	memory_drop(&m);
	return PASS;
}

/* Punching a hole forgets the page-out, not the protection. */
static int test_uffd_wp_punch(void)
{
	struct memory m = memory_new(64);
	int fd;

	SKIP_UNLESS(kernel.wp);
	fd = uffd_open(FEATURE_WP_SHMEM);
	write_pages(&m, 0, 64, 1);
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_WP));
	CHECK(!uffd_protect(fd, m.at, 64 * PAGE, true));
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(!fallocate(m.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 32 * PAGE));
	CHECK(entry_of(&m, 5) & PM_UFFD_WP);
	CHECK(!kernel.marker || !(entry_of(&m, 5) & PM_SWAP));
	CHECK(SWAPPED_HERE(m, 40));
	PROPAGATE(agree(&m));
	CHECK(write_and_watch(fd, &m, 5, 2) & UFFD_PAGEFAULT_FLAG_WP);
	CHECK(content_is(&m, 6, 26, 0) && content_is(&m, 32, 32, 1));
	CHECK(!madvise(m.at, 64 * PAGE, MADV_DONTNEED));
	CHECK(content_is(&m, 32, 32, 1));
	close(fd);
	memory_drop(&m);
	return PASS;
}

/* A hole that is protected in advance is not swapped. */
static int test_uffd_wp_hole(void)
{
	struct memory m = memory_new(64);
	int fd;

	SKIP_UNLESS(kernel.wp);
	SKIP_UNLESS(kernel.marker);
	fd = uffd_open(FEATURE_WP_SHMEM);
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_WP));
	CHECK(!uffd_protect(fd, m.at, 64 * PAGE, true));
	for (size_t i = 0; i < 64; i++)
		CHECK((entry_of(&m, i) & (PM_UFFD_WP | PM_SWAP | PM_PRESENT)) == PM_UFFD_WP);
	if (kernel.scan) {
		struct region r[4];

		CHECK(scan(m.at, 64 * PAGE, 0, IS_SWAPPED, 0, IS_SWAPPED, r, 4, NULL) == 0);
	}
	PROPAGATE(agree(&m));
	CHECK(write_and_watch(fd, &m, 3, 1) & UFFD_PAGEFAULT_FLAG_WP);
	close(fd);
	memory_drop(&m);
	return PASS;
}

/* Arms a range through PAGEMAP_SCAN, writes some, and finds exactly those written: `armed_out` is what is tried. */
static int async_round(struct memory *m, bool out_first, bool whole)
{
	struct region r[64];
	bool written[64] = {};
	long n;

	write_pages(m, 0, 64, 1);
	if (out_first)
		PROPAGATE(page_out(m, 0, 64));
	/* With a vector or without: two ways through the kernel's code. */
	n = whole ? scan(m->at, 64 * PAGE, SCAN_WP, IS_WRITTEN, 0, IS_WRITTEN, NULL, 0, NULL) :
		    scan(m->at, 64 * PAGE, SCAN_WP, 0, 0, IS_WRITTEN | IS_SWAPPED, r, 64, NULL);
	CHECK(n >= 0, "%s", strerror(errno));
	if (!out_first)
		PROPAGATE(page_out(m, 0, 64));
	for (size_t i = 0; i < 64; i++)
		CHECK((entry_of(m, i) & PM_UFFD_WP) && (!kernel.marker || (entry_of(m, i) & PM_SWAP)), "page %zu", i);
	n = scan(m->at, 64 * PAGE, 0, IS_WRITTEN, 0, IS_WRITTEN, r, 64, NULL);
	CHECK(n == 0, "%ld", n);
	for (size_t i = 0; i < 64; i += 3)
		stamp(m->at + i * PAGE, i, 2);
	CHECK(content_is(m, 1, 1, 1));
	n = scan(m->at, 64 * PAGE, 0, IS_WRITTEN, 0, IS_WRITTEN, r, 64, NULL);
	CHECK(n > 0);
	for (long k = 0; k < n; k++)
		for (uint64_t a = r[k].start; a < r[k].end; a += PAGE)
			written[(a - (uintptr_t)m->at) / PAGE] = true;
	for (size_t i = 0; i < 64; i++)
		CHECK(written[i] == (i % 3 == 0), "page %zu", i);
	/* Out and in again, those written and those not. */
	PROPAGATE(page_out(m, 0, 64));
	for (size_t i = 0; i < 64; i++) {
		CHECK(!!(entry_of(m, i) & PM_UFFD_WP) == !written[i], "page %zu", i);
		CHECK(!kernel.marker || (entry_of(m, i) & PM_SWAP), "page %zu", i);
		CHECK(content_is(m, i, 1, written[i] ? 2 : 1));
	}
	PROPAGATE(agree(m));
	return PASS;
}

static int test_uffd_wp_async(void)
{
	SKIP_UNLESS(kernel.wp_async);
	for (int way = 0; way < 4; way++) {
		struct memory m = memory_new(64);
		int fd = uffd_open(FEATURE_WP_SHMEM | FEATURE_WP_ASYNC);

		CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_WP), "%s", strerror(errno));
		PROPAGATE(async_round(&m, way & 1, way & 2));
		close(fd);
		CHECK(stamped(m.at, 0, 2));
		memory_drop(&m);
	}
	return PASS;
}

static int test_uffd_missing(void)
{
	struct memory m = memory_new(64);
	int fd = uffd_open(0);
	struct uffdio_copy copy = { .len = PAGE };

	if (fd < 0)
		return because(SKIP, "no userfaultfd");
	write_pages(&m, 0, 32, 1);
	PROPAGATE(page_out(&m, 0, 32));
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_MISSING));
	CHECK(write_and_watch(fd, &m, 3, 2) == -1);
	CHECK(write_and_watch(fd, &m, 40, 2) >= 0);
	copy.dst = (uintptr_t)m.at + 5 * PAGE;
	copy.src = (uintptr_t)m.at + 3 * PAGE;
	CHECK(ioctl(fd, UFFDIO_COPY, &copy) < 0 && errno == EEXIST);
	CHECK(content_is(&m, 4, 28, 1) && content_is(&m, 3, 1, 2) && content_is(&m, 40, 1, 2));
	PROPAGATE(agree(&m));
	close(fd);
	memory_drop(&m);
	return PASS;
}

static int test_uffd_minor(void)
{
	struct memory m = memory_new(64);
	int fd = uffd_open(UFFD_FEATURE_MINOR_SHMEM);

	if (fd < 0)
		return because(SKIP, "no minor faults");
	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_MINOR));
	CHECK(write_and_watch(fd, &m, 3, 2) & UFFD_PAGEFAULT_FLAG_MINOR);
	CHECK(entry_of(&m, 3) & PM_PRESENT);
	PROPAGATE(agree(&m));
	close(fd);
	CHECK(content_is(&m, 4, 60, 1) && content_is(&m, 3, 1, 2));
	memory_drop(&m);
	return PASS;
}

static int test_uffd_poison(void)
{
	struct memory m = memory_new(64);
	struct poison_arg arg = {};
	int fd, status;
	pid_t child;

	SKIP_UNLESS(kernel.poison);
	fd = uffd_open(0);
	write_pages(&m, 0, 64, 1);
	PROPAGATE(page_out(&m, 0, 64));
	CHECK(!uffd_register(fd, m.at, 64 * PAGE, UFFDIO_REGISTER_MODE_MISSING));
	arg.range.start = (uintptr_t)m.at + 3 * PAGE;
	arg.range.len = PAGE;
	CHECK(!ioctl(fd, POISON, &arg), "%s", strerror(errno));
	/* The child has no page tables of its own to begin with, so it is the parent that is asked. */
	CHECK(process_vm_readv(getpid(), &(struct iovec){ (char[8]){}, 8 }, 1,
			       &(struct iovec){ m.at + 3 * PAGE, 8 }, 1, 0) < 0);
	child = fork();
	if (!child)
		_exit(content_is(&m, 3, 1, 1) ? 0 : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(content_is(&m, 4, 60, 1));
	close(fd);
	memory_drop(&m);
	return PASS;
}

static sigjmp_buf after_bus;
static volatile sig_atomic_t bus_expected;

static void on_bus(int signal)
{
	(void)signal;
	/* One that was not expected tells of the poison in advance, to whoever asked for that. */
	if (bus_expected)
		siglongjmp(after_bus, 1);
}

static bool gives_sigbus(const char *at)
{
	bool given = true;

	if (!sigsetjmp(after_bus, 1)) {
		bus_expected = 1;
		(void)*(const volatile char *)at;
		given = false;
	}
	bus_expected = 0;
	return given;
}

/* What a privileged reader sees: the swap type and offset of a page that is out, and of a marker its bits. */
#define ENTRY_FRAME(m, page) (entry_of(&(m), page) & ((1ULL << 55) - 1))

/*
 * Memory that failed: a page that came back to a marked entry, one that another mapping brought back, and so is still
 * marked here, and one that was never out. Nobody may read them, and all around them stays as it was.
 */
static int hwpoison_test(struct memory *m, char *other)
{
	static const size_t bad[] = { 10, 30, 50 };
	char page[PAGE];

	write_pages(m, 0, 64, 1);
	PROPAGATE(page_out(m, 0, 40));
	CHECK(stamped(m->at + 10 * PAGE, 10, 1) && stamped(m->at + 12 * PAGE, 12, 1));
	CHECK(stamped(other + 30 * PAGE, 30, 1));
	for (size_t i = 0; i < 3; i++) {
		char *at = bad[i] == 30 ? other : m->at;

		if (madvise(at + bad[i] * PAGE, PAGE, MADV_HWPOISON)) {
			if (!i && (errno == EINVAL || errno == EPERM || errno == ENOSYS))
				return because(SKIP, "MADV_HWPOISON: %s", strerror(errno));
			CHECK(false, "page %zu: %s", bad[i], strerror(errno));
		}
	}
	for (size_t i = 0; i < 3; i++) {
		size_t b = bad[i];

		CHECK(!(entry_of(m, b) & PM_PRESENT), "page %zu", b);
		/* Poison looks like a swap entry to pagemap, and not like one of a page that can come back. */
		CHECK(b == 30 || ENTRY_FRAME(*m, b) != ENTRY_FRAME(*m, 20), "page %zu", b);
		CHECK(gives_sigbus(m->at + b * PAGE), "page %zu", b);
		CHECK(gives_sigbus(other + b * PAGE), "page %zu", b);
		CHECK(pread(m->fd, page, PAGE, b * PAGE) < 0 && errno == EIO, "page %zu", b);
	}
	PROPAGATE(agree(m));
	for (size_t i = 0; i < 40; i++)
		CHECK(i % 10 == 0 || i == 12 || !kernel.marker || entry_state(entry_of(m, i)) == SWAPPED, "page %zu", i);
	CHECK(entry_of(m, 12) & entry_of(m, 49) & entry_of(m, 51) & PM_PRESENT);
	for (size_t i = 0; i < 64; i++)
		CHECK(i == 10 || i == 30 || i == 50 || stamped(m->at + i * PAGE, i, 1), "page %zu", i);
	/* Protection and paging out pass over it. What the other mapping has as well would not go out. */
	CHECK(!madvise(other, 64 * PAGE, MADV_DONTNEED));
	CHECK(!mprotect(m->at, 64 * PAGE, PROT_READ) && !mprotect(m->at, 64 * PAGE, PROT_READ | PROT_WRITE));
	for (size_t i = 0; i < 40; i += 10)
		PROPAGATE(page_out(m, i + 1, 9));
	CHECK(SWAPPED_HERE(*m, 9) && SWAPPED_HERE(*m, 11) && gives_sigbus(m->at + 10 * PAGE));
	/* A hole is whole again, once this page table has forgotten: a hole leaves poison in it. */
	CHECK(!fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 64 * PAGE));
	PROPAGATE(agree(m));
	CHECK(!madvise(m->at, 64 * PAGE, MADV_DONTNEED));
	PROPAGATE(entries_agree(m, kernel.marker));
	PROPAGATE(agree(m));
	CHECK(!gives_sigbus(m->at + 10 * PAGE) && content_is(m, 0, 64, 0));
	return PASS;
}

static int test_hwpoison(void)
{
	struct memory m = memory_new(64);
	char *other = map_aligned(m.fd, 64 * PAGE, MAP_SHARED);
	struct sigaction action = { .sa_handler = on_bus }, before;
	int result;

	sigaction(SIGBUS, &action, &before);
	result = hwpoison_test(&m, other);
	sigaction(SIGBUS, &before, NULL);
	munmap(other, 64 * PAGE);
	memory_drop(&m);
	return result;
}

/* Pages that are in use for a moment, in a CPU's batch say, are asked for again. */
static int collapse(char *at)
{
	int result;

	for (int i = 0; i < 100; i++) {
		result = madvise(at, HUGE_PAGE, MADV_COLLAPSE);
		if (!result || errno != EAGAIN)
			break;
		usleep(10000);
	}
	return result;
}

static int test_madv_collapse(void)
{
	struct memory m = memory_new(1024);

	write_pages(&m, 0, 1024, 1);
	for (size_t i = 100; i < 120; i++)
		PROPAGATE(page_out(&m, i, 1));
	if (collapse(m.at)) {
		if (errno == EINVAL)
			return because(SKIP, "no MADV_COLLAPSE of shmem");
		CHECK(false, "%s", strerror(errno));
	}
	CHECK(entry_of(&m, 110) & PM_PRESENT);
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 1024, 1));
	/* Out as a whole, and back. What leaves no page table entry leaves no mark: the exact query still knows. */
	PROPAGATE(page_out(&m, 0, 1024));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 600, 1));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 600, 424, 1));
	memory_drop(&m);
	return PASS;
}

/*
 * A huge page in the page cache, page table entries beside it that hold nothing but marks: the collapse of the second
 * mapping's page table must not stop at them.
 */
static int test_madv_collapse_marked_table(void)
{
	struct memory m = memory_new(512);
	char *other;

	write_pages(&m, 0, 512, 1);
	PROPAGATE(page_out(&m, 0, 512));
	CHECK(SWAPPED_HERE(m, 17));
	other = map_aligned(m.fd, HUGE_PAGE, MAP_SHARED);
	for (size_t i = 0; i < 512; i++)
		CHECK(stamped(other + i * PAGE, i, 1));
	/* Pages are in memory, and m's page table is all marks. */
	if (collapse(other))
		return because(errno == EINVAL ? SKIP : FAIL, "MADV_COLLAPSE: %s", strerror(errno));
	CHECK(!collapse(m.at), "%s", strerror(errno));
	CHECK(entry_of(&m, 17) & PM_PRESENT);
	CHECK(content_is(&m, 0, 512, 1));
	PROPAGATE(agree(&m));
	munmap(other, HUGE_PAGE);
	memory_drop(&m);
	return PASS;
}

static int test_swapoff(void)
{
	struct memory m = memory_new(512);

	if (!swap_device[0] || geteuid())
		return because(SKIP, "not the one swap device, or not root");
	write_pages(&m, 0, 512, 1);
	PROPAGATE(page_out(&m, 0, 512));
	CHECK(!swapoff(swap_device), "%s", strerror(errno));
	CHECK(oracle_of(&m, 77) == RESIDENT);
	CHECK(SWAPPED_HERE(m, 77));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 256, 1));
	/* Without swap nothing goes out, and nothing may look as if it had. */
	CHECK(!madvise(m.at, 256 * PAGE, MADV_PAGEOUT));
	for (size_t i = 0; i < 256; i++)
		CHECK(!(entry_of(&m, i) & PM_SWAP), "page %zu", i);
	PROPAGATE(agree(&m));
	CHECK(!swapon(swap_device, 0), "%s", strerror(errno));
	CHECK(content_is(&m, 0, 512, 1));
	memory_drop(&m);
	return PASS;
}

static int test_zero_pages(void)
{
	struct memory m = memory_new(64);

	for (size_t i = 0; i < 64; i++)
		((volatile char *)m.at)[i * PAGE] = 0;
	PROPAGATE(page_out(&m, 0, 64));
	for (size_t i = 0; i < 64; i++)
		CHECK(oracle_of(&m, i) == SWAPPED && SWAPPED_HERE(m, i));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 64, 0));
	memory_drop(&m);
	return PASS;
}

/* Pages that were read and never written are dropped, not swapped: holes again, without a mark. */
static int test_clean_pages(void)
{
	struct memory m = memory_new(64);

	CHECK(content_is(&m, 0, 64, 0));
	CHECK(oracle_of(&m, 9) == RESIDENT);
	PROPAGATE(page_out(&m, 0, 64));
	PROPAGATE(entries_agree(&m, kernel.marker));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 64, 0));
	memory_drop(&m);
	return PASS;
}

/* Fallocated and never written is a hole to SEEK_DATA, and to the exact query. */
static int test_fallocate(void)
{
	struct memory m = memory_new(64);

	CHECK(!fallocate(m.fd, 0, 0, 64 * PAGE));
	PROPAGATE(agree(&m));
	write_pages(&m, 0, 32, 1);
	PROPAGATE(agree(&m));
	PROPAGATE(page_out(&m, 0, 64));
	PROPAGATE(agree(&m));
	CHECK(content_is(&m, 0, 32, 1) && content_is(&m, 32, 32, 0));
	memory_drop(&m);
	return PASS;
}

/*
 * What somebody holds is unmapped by reclaim, and stays in memory: nothing may look as if it had gone. Half of the pages
 * are held, one way or another, and the others go. What is let go goes too.
 */
static int held_test(struct memory *m, bool (*hold)(struct memory *, size_t), void (*let_go)(void))
{
	size_t half = m->pages / 2;

	write_pages(m, 0, m->pages, 1);
	if (!hold(m, half))
		return because(errno == ENOSYS ? SKIP : FAIL, "cannot be held: %s", strerror(errno));
	/* Each pass finds them mapped again. */
	for (int pass = 0; pass < 3; pass++) {
		CHECK(!madvise(m->at, half * PAGE, MADV_PAGEOUT));
		for (size_t i = 0; i < half; i++)
			CHECK(oracle_of(m, i) == RESIDENT && !(entry_of(m, i) & PM_SWAP), "page %zu, pass %d: %#llx", i, pass,
			      (long long)entry_of(m, i));
		PROPAGATE(agree(m));
		CHECK(content_is(m, 0, half, 1));
	}
	PROPAGATE(page_out(m, half, half));
	for (size_t i = half; i < m->pages; i++)
		CHECK(SWAPPED_HERE(*m, i), "page %zu", i);
	let_go();
	PROPAGATE(page_out(m, 0, half));
	PROPAGATE(entries_agree(m, kernel.marker));
	PROPAGATE(agree(m));
	CHECK(content_is(m, 0, m->pages, 1));
	return PASS;
}

static int holder[2];

static bool hold_pinned(struct memory *m, size_t pages)
{
	struct iovec range = { m->at, pages * PAGE };

	return (holder[0] = pin(&range, 1)) >= 0;
}

static void let_go_pinned(void)
{
	unpin(holder[0]);
}

/* Pages in a pipe are referenced, and not pinned. */
static bool hold_in_pipe(struct memory *m, size_t pages)
{
	struct iovec range = { m->at, pages * PAGE };

	if (pipe(holder) || fcntl(holder[1], F_SETPIPE_SZ, pages * PAGE) < 0)
		return false;
	return vmsplice(holder[1], &range, 1, SPLICE_F_NONBLOCK) == (ssize_t)(pages * PAGE);
}

static void let_go_in_pipe(void)
{
	close(holder[0]);
	close(holder[1]);
}

static int test_pinned(void)
{
	struct memory m = memory_new(64);
	int result = held_test(&m, hold_pinned, let_go_pinned);

	memory_drop(&m);
	return result;
}

static int test_in_pipe(void)
{
	struct memory m = memory_new(64);
	int result = held_test(&m, hold_in_pipe, let_go_in_pipe);

	memory_drop(&m);
	return result;
}

static long smaps_swap(const char *file, const void *at)
{
	char line[512], key[32];
	bool here = !at;
	long kb = -1, sum = 0;
	FILE *f = fopen(file, "r");

	if (!f)
		return -1;
	snprintf(key, sizeof(key), "%lx-", (unsigned long)at);
	while (fgets(line, sizeof(line), f)) {
		if (at && strchr(line, '-') && strspn(line, "0123456789abcdef") == (size_t)(strchr(line, '-') - line))
			here = !strncmp(line, key, strlen(key));
		if (here && sscanf(line, "Swap: %ld kB", &kb) == 1)
			sum += kb;
	}
	fclose(f);
	return kb < 0 ? -1 : sum;
}

static int test_smaps(void)
{
	struct memory m = memory_new(1024);
	char *private = map_aligned(m.fd, 1024 * PAGE, MAP_PRIVATE);
	long before = smaps_swap("/proc/self/smaps_rollup", NULL);

	write_pages(&m, 0, 1024, 1);
	PROPAGATE(page_out(&m, 0, 300));
	CHECK(smaps_swap("/proc/self/smaps", m.at) == 1200, "%ld", smaps_swap("/proc/self/smaps", m.at));
	CHECK(smaps_swap("/proc/self/smaps", private) == 1200, "%ld", smaps_swap("/proc/self/smaps", private));
	CHECK(smaps_swap("/proc/self/smaps_rollup", NULL) - before == 2400, "%ld",
	      smaps_swap("/proc/self/smaps_rollup", NULL) - before);
	munmap(private, 1024 * PAGE);
	memory_drop(&m);
	return PASS;
}

static int test_private_mapping(void)
{
	struct memory m = memory_new(64);
	char *private;

	write_pages(&m, 0, 64, 1);
	private = map_aligned(m.fd, 64 * PAGE, MAP_PRIVATE);
	for (size_t i = 0; i < 64; i++)
		CHECK(stamped(private + i * PAGE, i, 1));
	stamp(private + 9 * PAGE, 9, 2);
	CHECK(!madvise(private, 64 * PAGE, MADV_PAGEOUT));
	CHECK(!madvise(m.at, 64 * PAGE, MADV_PAGEOUT));
	CHECK(stamped(private + 9 * PAGE, 9, 2) && content_is(&m, 9, 1, 1));
	for (size_t i = 10; i < 64; i++)
		CHECK(stamped(private + i * PAGE, i, 1) && content_is(&m, i, 1, 1));
	munmap(private, 64 * PAGE);
	memory_drop(&m);
	return PASS;
}

static int other_kind(char *at, size_t pages)
{
	struct memory m = { .fd = -1, .at = at, .pages = pages };
	unsigned char core[64];

	write_pages(&m, 0, pages, 1);
	for (int try = 0; try < 50; try++) {
		madvise(at, pages * PAGE, MADV_PAGEOUT);
		mincore(at, pages * PAGE, core);
		if (!memchr(core, 1, pages))
			break;
		usleep(5000);
	}
	for (size_t i = 0; i < pages; i++)
		CHECK(core[i] || SWAPPED_HERE(m, i), "page %zu", i);
	if (kernel.exact) {
		char told[64];

		PROPAGATE(exact_states(at, pages, told, 64));
		for (size_t i = 0; i < pages; i++)
			CHECK(told[i] == (core[i] ? RESIDENT : SWAPPED));
	}
	CHECK(content_is(&m, 0, pages, 1));
	return PASS;
}

static int test_anonymous_shared(void)
{
	char *at = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	PROPAGATE(other_kind(at, 64));
	munmap(at, 64 * PAGE);
	return PASS;
}

static int test_sysv_shm(void)
{
	int id = shmget(IPC_PRIVATE, 64 * PAGE, 0600);
	char *at;

	if (id < 0)
		return because(SKIP, "no shmget");
	at = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL);
	CHECK(at != (char *)-1);
	PROPAGATE(other_kind(at, 64));
	shmdt(at);
	return PASS;
}

/* Reclaim proper takes pages that are mapped twice, and leaves a mark in both page tables. */
static int test_reclaim_two_mappings(void)
{
	struct memory m = memory_new(256);
	char *other = map_aligned(m.fd, 256 * PAGE, MAP_SHARED);
	size_t out = 0, marked = 0;

	if (!enter_cgroup("max"))
		return because(SKIP, "no cgroup v2 memory controller");
	write_pages(&m, 0, 256, 1);
	for (size_t i = 0; i < 256; i++)
		CHECK(stamped(other + i * PAGE, i, 1));
	for (int try = 0; try < 40 && out < 200; try++) {
		/* What both mappings have used counts as active, and would stay. */
		write_file("/proc/self/clear_refs", "1");
		write_file("/sys/fs/cgroup/pm_swap_test/memory.reclaim", "1M");
		usleep(10000);
		out = 0;
		for (size_t i = 0; i < 256; i++)
			out += oracle_of(&m, i) == SWAPPED;
	}
	if (!out)
		return because(SKIP, "memory.reclaim reclaimed nothing");
	for (size_t i = 0; i < 256; i++)
		if (oracle_of(&m, i) == SWAPPED)
			marked += (entry_of(&m, i) & PM_SWAP) && (entry(other + i * PAGE) & PM_SWAP);
	CHECK(marked == (kernel.marker ? out : 0), "%zu of %zu", marked, out);
	PROPAGATE(agree(&m));
	PROPAGATE(agree_at(m.fd, other, 0, 256));
	CHECK(content_is(&m, 0, 256, 1));
	munmap(other, 256 * PAGE);
	memory_drop(&m);
	return PASS;
}

/* Any start, any end, any number of regions a call, with and without page tables. */
static int test_exact_ranges(void)
{
	struct memory m = memory_new(2048);
	char told[2048], want[2048];
	char *fresh;

	SKIP_UNLESS(kernel.exact);
	/* The third page table of four is never made. */
	for (size_t i = 0; i < 2048; i++)
		if ((i / 512 != 2 && i % 7 < 3) || i / 512 == 3)
			stamp(m.at + i * PAGE, i, 1);
	PROPAGATE(page_out(&m, 200, 400));
	for (size_t i = 1600; i < 2048; i += 5)
		PROPAGATE(page_out(&m, i, 1));
	fresh = map_aligned(m.fd, 2048 * PAGE, MAP_SHARED);
	oracle(&m, want);
	srand(1);
	for (int n = 0; n < 300; n++) {
		size_t first = rand() % 2048, count = 1 + rand() % (2048 - first);
		char *at = (n & 1 ? fresh : m.at) + first * PAGE;

		PROPAGATE(exact_states(at, count, told, 1 + rand() % 64));
		CHECK(!memcmp(told, want + first, count), "at %zu + %zu", first, count);
	}
	/* Asking for one kind gives that kind and no other. */
	for (int n = 0; n < 2; n++) {
		uint64_t kind = n ? IS_SWAPPED : IS_INCORE;
		static struct region r[2048];
		long got = scan(fresh, 2048 * PAGE, SCAN_EXACT, kind, 0, kind, r, 2048, NULL);
		size_t pages = 0, wanted = 0;

		CHECK(got >= 0);
		for (long k = 0; k < got; k++)
			for (uint64_t a = r[k].start; a < r[k].end; a += PAGE, pages++)
				CHECK(want[(a - (uintptr_t)fresh) / PAGE] == (n ? SWAPPED : RESIDENT));
		for (size_t i = 0; i < 2048; i++)
			wanted += want[i] == (n ? SWAPPED : RESIDENT);
		CHECK(pages == wanted);
	}
	munmap(fresh, 2048 * PAGE);
	memory_drop(&m);
	return PASS;
}

static int test_exact_refusals(void)
{
	struct memory m = memory_new(16);
	char *anonymous = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *private = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, m.fd, 0);
	struct region r[4];
	int fd, status;
	pid_t child;

	SKIP_UNLESS(kernel.exact);
	CHECK(scan(anonymous, PAGE, SCAN_EXACT, 0, 0, IS_SWAPPED, r, 4, NULL) < 0 && errno == EOPNOTSUPP);
	CHECK(scan(private, PAGE, SCAN_EXACT, 0, 0, IS_SWAPPED, r, 4, NULL) < 0 && errno == EOPNOTSUPP);
	CHECK(scan(m.at, PAGE, SCAN_EXACT | SCAN_WP, 0, 0, IS_SWAPPED, r, 4, NULL) < 0 && errno == EINVAL);
	CHECK(scan(m.at, PAGE, 0, 0, 0, IS_INCORE, r, 4, NULL) < 0 && errno == EINVAL);
	CHECK(scan(m.at, PAGE, 0, IS_INCORE, 0, 0, r, 4, NULL) < 0 && errno == EINVAL);
	CHECK(scan(m.at, PAGE, 1 << 3, 0, 0, 0, r, 4, NULL) < 0 && errno == EINVAL);

	/* Who may not write the file is not told. */
	fd = open("/tmp/pm_swap_test.ro", O_RDWR | O_CREAT | O_TRUNC, 0444);
	CHECK(fd >= 0 && !ftruncate(fd, PAGE));
	close(fd);
	child = fork();
	if (!child) {
		char *at;

		pagemap = open("/proc/self/pagemap", O_RDONLY);
		if (setgid(65534) || setuid(65534))
			_exit(1);
		fd = open("/tmp/pm_swap_test.ro", O_RDONLY);
		at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
		if (at == MAP_FAILED)
			_exit(2);
		if (scan(at, PAGE, SCAN_EXACT, 0, 0, IS_SWAPPED, r, 4, NULL) >= 0)
			_exit(3);
		_exit(errno == EPERM ? 0 : errno == EOPNOTSUPP ? 77 : 4);
	}
	CHECK(waitpid(child, &status, 0) == child);
	unlink("/tmp/pm_swap_test.ro");
	/* 77: /tmp is not tmpfs. */
	CHECK(status == 0 || status == 77 << 8, "status %#x", status);
	munmap(anonymous, 16 * PAGE);
	munmap(private, 16 * PAGE);
	memory_drop(&m);
	return PASS;
}

static bool is_not_supported(char *at, size_t pages)
{
	struct region r[64];

	return scan(at, pages * PAGE, SCAN_EXACT, 0, 0, IS_INCORE | IS_SWAPPED, r, 64, NULL) < 0 && errno == EOPNOTSUPP;
}

/* What lies between two parts of a file's mapping is not a hole of the file's. */
static int beside_test(struct memory *m, char *between, size_t pages)
{
	size_t before = (between - m->at) / PAGE, behind = m->pages - before - pages;
	char told[64];

	CHECK(is_not_supported(between, pages));
	CHECK(is_not_supported(between, 1));
	CHECK(is_not_supported(m->at, m->pages));
	CHECK(is_not_supported(between - PAGE, 2) && is_not_supported(between + (pages - 1) * PAGE, 2));
	/*
	 * Before it and behind it all is as ever, also where the call stops for want of room before it gets there. The
	 * page before it is one that would be told by the call that fails.
	 */
	PROPAGATE(agree_at(m->fd, m->at, 0, before));
	PROPAGATE(agree_at(m->fd, m->at + (before + pages) * PAGE, before + pages, behind));
	CHECK(exact_states(m->at, m->pages, told, 1) == FAIL && errno == EOPNOTSUPP);
	why_text[0] = 0;
	for (size_t i = 0; i < before - 1; i++)
		CHECK(told[i] == oracle_of(m, i), "page %zu is told '%c'", i, told[i]);
	return PASS;
}

static struct memory mixed_memory(void)
{
	struct memory m = memory_new(64);

	write_pages(&m, 0, 64, 2);
	for (size_t i = 0; i < 64; i += 8)
		if (page_out(&m, i, 1) != PASS)
			die(why_text);
	return m;
}

static int test_exact_gap(void)
{
	struct memory m;
	char *between;

	SKIP_UNLESS(kernel.exact);
	m = mixed_memory();
	between = m.at + 24 * PAGE;
	CHECK(!munmap(between, 8 * PAGE));
	PROPAGATE(beside_test(&m, between, 8));
	/* Behind the last page too. */
	CHECK(!munmap(m.at + 56 * PAGE, 8 * PAGE));
	CHECK(is_not_supported(m.at + 48 * PAGE, 16));
	PROPAGATE(agree_at(m.fd, m.at + 48 * PAGE, 48, 8));
	memory_drop(&m);
	return PASS;
}

/* A driver's mapping, which has frames and no pages: the firmware's memory. */
static int test_exact_pfnmap(void)
{
	struct memory m;
	char *between;
	int device;

	SKIP_UNLESS(kernel.exact);
	m = mixed_memory();
	between = m.at + 24 * PAGE;
	device = open("/dev/mem", O_RDONLY | O_CLOEXEC);
	if (device < 0)
		return because(SKIP, "/dev/mem: %s", strerror(errno));
	if (mmap(between, 8 * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, device, 0xf0000) == MAP_FAILED)
		return because(SKIP, "mapping of /dev/mem: %s", strerror(errno));
	PROPAGATE(beside_test(&m, between, 8));
	close(device);
	memory_drop(&m);
	return PASS;
}

/* --- Soak ------------------------------------------------------------------------------------------------------- */

#define BLOCK 64
#define SOAK_PAGES 8192UL

static struct {
	struct memory m;
	char *other; /* a second mapping, without userfaultfd */
	pthread_mutex_t lock[SOAK_PAGES / BLOCK];
	uint32_t generation[SOAK_PAGES];
	volatile bool stop;
	int failed;
	unsigned long ops;
	bool async;
} soak;

static bool soak_fail(const char *what, size_t page, unsigned long detail)
{
	printf("# soak: %s, page %zu, detail %#lx, entry %#llx\n", what, page, detail,
	       (unsigned long long)entry(soak.m.at + page * PAGE));
	soak.failed++;
	soak.stop = true;
	return false;
}

static bool soak_check(const char *at, size_t page, const char *how)
{
	return stamped(at, page, soak.generation[page]) ? true : soak_fail(how, page, soak.generation[page]);
}

/* One thing done to one block, whose lock is held. */
static bool soak_step(size_t block, unsigned int *seed)
{
	size_t first = block * BLOCK, page = first + rand_r(seed) % BLOCK;
	char *at = soak.m.at + page * PAGE, *start = soak.m.at + first * PAGE, buffer[PAGE];
	unsigned int what = rand_r(seed) % 20;

	switch (what) {
	case 0 ... 3:
		for (size_t i = page; i < first + BLOCK; i += 1 + rand_r(seed) % 8)
			stamp(soak.m.at + i * PAGE, i, ++soak.generation[i]);
		return true;
	case 4 ... 6:
		for (size_t i = page; i < first + BLOCK; i += 1 + rand_r(seed) % 8)
			if (!soak_check(soak.m.at + i * PAGE, i, "wrong content by mapping"))
				return false;
		return true;
	case 7:
		if (pread(soak.m.fd, buffer, PAGE, page * PAGE) != PAGE)
			return soak_fail("pread failed", page, errno);
		return soak_check(buffer, page, "wrong content by pread");
	case 8:
		memset(buffer, 0, PAGE);
		stamp(buffer, page, soak.generation[page] + 1);
		if (pwrite(soak.m.fd, buffer, PAGE, page * PAGE) != PAGE)
			return soak_fail("pwrite failed", page, errno);
		soak.generation[page]++;
		return true;
	case 9 ... 11:
		madvise(start, BLOCK * PAGE, MADV_PAGEOUT);
		return true;
	case 12:
		for (size_t i = first; i < first + BLOCK; i += 3)
			if (!soak_check(soak.other + i * PAGE, i, "wrong content by the other mapping"))
				return false;
		/* Pages mapped twice are left alone by MADV_PAGEOUT: let go again. */
		madvise(soak.other + first * PAGE, BLOCK * PAGE, MADV_DONTNEED);
		return true;
	case 13:
		if (fallocate(soak.m.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE,
			      (first + BLOCK - page) * PAGE))
			return soak_fail("punch failed", page, errno);
		for (size_t i = page; i < first + BLOCK; i++)
			soak.generation[i] = 0;
		return true;
	case 14:
		madvise(start, BLOCK * PAGE, MADV_DONTNEED);
		return true;
	case 15:
		if (mprotect(start, BLOCK * PAGE, PROT_READ) || !soak_check(at, page, "wrong content read-only") ||
		    mprotect(start, BLOCK * PAGE, PROT_READ | PROT_WRITE))
			return soak_fail("mprotect", page, errno);
		return true;
	case 16 ... 17: {
		/* Armed, written in part: what was written is told, all of it and nothing else. */
		struct region r[BLOCK];
		bool written[BLOCK] = {}, told[BLOCK] = {};
		long n;

		if (!soak.async)
			return true;
		if (scan(start, BLOCK * PAGE, SCAN_WP, 0, 0, IS_WRITTEN, r, BLOCK, NULL) < 0)
			return soak_fail("arming failed", first, errno);
		if (rand_r(seed) % 2)
			madvise(start, BLOCK * PAGE, MADV_PAGEOUT);
		for (size_t i = rand_r(seed) % 4; i < BLOCK; i += 1 + rand_r(seed) % 8) {
			stamp(start + i * PAGE, first + i, ++soak.generation[first + i]);
			written[i] = true;
		}
		if (rand_r(seed) % 2)
			madvise(start, BLOCK * PAGE, MADV_PAGEOUT);
		n = scan(start, BLOCK * PAGE, 0, IS_WRITTEN, 0, IS_WRITTEN, r, BLOCK, NULL);
		if (n < 0)
			return soak_fail("scan failed", first, errno);
		for (long k = 0; k < n; k++)
			for (uint64_t a = r[k].start; a < r[k].end; a += PAGE)
				told[(a - (uintptr_t)start) / PAGE] = true;
		for (size_t i = 0; i < BLOCK; i++)
			if (written[i] && !told[i])
				return soak_fail("a write was missed", first + i, n);
			else if (told[i] && !written[i])
				return soak_fail("a write was made up", first + i, n);
		return true;
	}
	case 18: {
		/* A page that has content is never told to be a hole. */
		char told[BLOCK];

		if (!kernel.exact)
			return true;
		if (exact_states(rand_r(seed) % 2 ? start : soak.other + first * PAGE, BLOCK, told, 64) != PASS)
			return soak_fail(why_text, first, 0);
		for (size_t i = 0; i < BLOCK; i++)
			if (soak.generation[first + i] && told[i] == HOLE)
				return soak_fail("content told to be a hole", first + i, 0);
		return true;
	}
	default:
		for (size_t i = page; i < first + BLOCK; i++)
			(void)entry(soak.m.at + i * PAGE);
		return true;
	}
}

static void *soak_main(void *arg)
{
	unsigned int seed = (uintptr_t)arg;

	while (!soak.stop) {
		size_t block = rand_r(&seed) % (SOAK_PAGES / BLOCK);

		pthread_mutex_lock(&soak.lock[block]);
		soak_step(block, &seed);
		pthread_mutex_unlock(&soak.lock[block]);
		__atomic_add_fetch(&soak.ops, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

/* What takes no locks: swap goes and comes, the whole is queried, children come and go, huge pages are made. */
static void *soak_trouble(void *arg)
{
	unsigned int seed = 99;
	char *told = malloc(SOAK_PAGES);

	(void)arg;
	while (!soak.stop) {
		switch (rand_r(&seed) % 6) {
		case 0:
			if (!swap_device[0])
				break;
			/* All comes into memory now, and would not fit. */
			write_file("/sys/fs/cgroup/pm_swap_test/memory.max", "max");
			if (!swapoff(swap_device)) {
				usleep(50000);
				if (swapon(swap_device, 0))
					soak_fail("swapon", 0, errno);
			}
			write_file("/sys/fs/cgroup/pm_swap_test/memory.max", "24M");
			break;
		case 1:
			if (kernel.exact && exact_states(soak.m.at, SOAK_PAGES, told, 64) != PASS)
				soak_fail(why_text, 0, 0);
			break;
		case 2: {
			pid_t child = fork();

			if (!child)
				_exit(0);
			waitpid(child, NULL, 0);
			break;
		}
		case 3:
			madvise(soak.other + (rand_r(&seed) % (SOAK_PAGES / 512)) * HUGE_PAGE, HUGE_PAGE, MADV_COLLAPSE);
			break;
		case 4:
			write_file("/sys/fs/cgroup/pm_swap_test/memory.reclaim", "4M");
			break;
		case 5:
			(void)smaps_swap("/proc/self/smaps", soak.m.at);
			write_file("/proc/self/clear_refs", "1");
			break;
		}
		usleep(100000);
	}
	free(told);
	return NULL;
}

static int run_soak(int seconds)
{
	pthread_t threads[5];
	bool limited = enter_cgroup("24M");
	int fd = -1;

	soak.m = memory_new(SOAK_PAGES);
	soak.other = map_aligned(soak.m.fd, SOAK_PAGES * PAGE, MAP_SHARED);
	for (size_t i = 0; i < SOAK_PAGES / BLOCK; i++)
		pthread_mutex_init(&soak.lock[i], NULL);
	if (kernel.wp_async) {
		fd = uffd_open(FEATURE_WP_SHMEM | FEATURE_WP_ASYNC);
		soak.async = !uffd_register(fd, soak.m.at, SOAK_PAGES * PAGE, UFFDIO_REGISTER_MODE_WP);
	}
	for (uintptr_t t = 0; t < 4; t++)
		pthread_create(&threads[t], NULL, soak_main, (void *)(t + 1));
	pthread_create(&threads[4], NULL, soak_trouble, NULL);
	for (int s = 0; s < seconds * 10 && !soak.stop; s++)
		usleep(100000);
	soak.stop = true;
	for (int t = 0; t < 5; t++)
		pthread_join(threads[t], NULL);
	for (size_t i = 0; i < SOAK_PAGES && !soak.failed; i++)
		soak_check(soak.m.at + i * PAGE, i, "wrong content at the end");
	printf("# soak: %d s, %lu steps, memory %s, write tracking %s\n", seconds, soak.ops,
	       limited ? "limited to 24 MiB" : "not limited", soak.async ? "on" : "off");
	if (fd >= 0)
		close(fd);
	return soak.failed ? because(FAIL, "see above") : PASS;
}

/* --- All of it --------------------------------------------------------------------------------------------------- */

static const struct {
	const char *name;
	int (*run)(void);
} tests[] = {
#define TEST(name) { #name, test_##name }
	TEST(present_swapped_hole), TEST(fault), TEST(pread), TEST(second_mapping), TEST(punch_hole), TEST(madv_remove),
	TEST(ftruncate), TEST(madv_dontneed), TEST(mremap), TEST(mprotect), TEST(fork), TEST(uffd_wp_then_pageout),
	TEST(pageout_then_uffd_wp), TEST(uffd_wp_punch), TEST(uffd_wp_hole), TEST(uffd_wp_async), TEST(uffd_missing),
	TEST(uffd_minor), TEST(uffd_poison), TEST(hwpoison), TEST(madv_collapse), TEST(madv_collapse_marked_table), TEST(swapoff),
	TEST(zero_pages), TEST(clean_pages), TEST(fallocate), TEST(pinned), TEST(in_pipe), TEST(smaps), TEST(private_mapping),
	TEST(anonymous_shared), TEST(sysv_shm), TEST(reclaim_two_mappings), TEST(exact_ranges), TEST(exact_refusals),
	TEST(exact_gap), TEST(exact_pfnmap),
};

int main(int argc, char **argv)
{
	bool want_stock = false, want_marker = false, want_exact = false;
	cpu_set_t all, one;
	int seconds = 0, number = 0, passed = 0, failed = 0, skipped = 0;
	const char *only = NULL;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--expect-stock"))
			want_stock = true;
		else if (!strcmp(argv[i], "--expect-marker"))
			want_marker = true;
		else if (!strcmp(argv[i], "--expect-exact"))
			want_exact = true;
		else if (!strcmp(argv[i], "--soak") && i + 1 < argc)
			seconds = atoi(argv[++i]);
		else if (!strcmp(argv[i], "--only") && i + 1 < argc)
			only = argv[++i];
		else {
			fprintf(stderr, "usage: %s [--expect-stock | --expect-marker] [--expect-exact] [--soak SECONDS] "
					"[--only NAME]\n", argv[0]);
			return 2;
		}
	}

	setvbuf(stdout, NULL, _IOLBF, 0);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		die("/proc/self/pagemap");
	printf("TAP version 13\n");
	/* MADV_PAGEOUT drains the LRU batches of its own processor alone: so the tests, and their threads, stay on one. */
	sched_getaffinity(0, sizeof(all), &all);
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
	find_out();
	printf("# kernel: markers %s, exact query %s, PAGEMAP_SCAN %s, uffd-wp of shmem %s, asynchronous %s\n",
	       kernel.marker ? "yes" : "no (stock)", kernel.exact ? "yes" : "no", kernel.scan ? "yes" : "no",
	       kernel.wp ? "yes" : "no", kernel.wp_async ? "yes" : "no");

#define REPORT(name, result)                                                                                           \
	do {                                                                                                           \
		int r_ = (result);                                                                                     \
		const char *n_ = (name);                                                                               \
		number++;                                                                                              \
		passed += r_ == PASS;                                                                                  \
		failed += r_ == FAIL;                                                                                  \
		skipped += r_ == SKIP;                                                                                 \
		if (r_ == SKIP)                                                                                        \
			printf("ok %d - %s # SKIP %s\n", number, n_, why);                                             \
		else                                                                                                   \
			printf("%sok %d - %s\n", r_ == PASS ? "" : "not ", number, n_);                                \
		if (r_ == FAIL)                                                                                        \
			printf("# %s\n", why);                                                                         \
	} while (0)

	why = "";
	if (!kernel.marker && !want_marker)
		REPORT("marker", because(SKIP, "stock kernel"));
	else
		REPORT("marker", !kernel.marker ? because(FAIL, "swapped shared memory shows no PM_SWAP") :
				 want_stock	? because(FAIL, "this is not a stock kernel") :
						  PASS);
	if (want_exact)
		REPORT("exact", kernel.exact ? PASS : because(FAIL, "PM_SCAN_EXACT_SWAP is not known"));
	for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
		if (!only || !strcmp(only, tests[i].name)) {
			why_text[0] = 0;
			REPORT(tests[i].name, tests[i].run());
		}
	sched_setaffinity(0, sizeof(all), &all);
	if (seconds)
		REPORT("soak", run_soak(seconds));
	printf("1..%d\n# Totals: pass:%d fail:%d skip:%d\n", number, passed, failed, skipped);
	return failed != 0;
}
