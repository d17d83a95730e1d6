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
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>

/* What the headers of an older distribution do not have. */
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define FEATURE_WP_SHMEM (1ULL << 12)
#define FEATURE_WP_ASYNC (1ULL << 15)
struct poison_arg {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define POISON _IOWR(0xAA, 0x08, struct poison_arg)

struct region {
	uint64_t start, end, categories;
};
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, mask, anyof, ret;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
#define IS_WRITTEN (1 << 1)
#define IS_FILE (1 << 2)
#define IS_PRESENT (1 << 3)
#define IS_SWAPPED (1 << 4)
#define IS_INCORE (1 << 9)
#define SCAN_WP (1 << 0)
#define SCAN_EXACT (1 << 2)

#define PM_UFFD_WP (1ULL << 57)
#define PM_FILE (1ULL << 61)
#define PM_SWAP (1ULL << 62)
#define PM_PRESENT (1ULL << 63)

#define PAGE 4096UL
#define HUGE_PAGE (2UL << 20)

enum { HOLE = '.', RESIDENT = 'r', SWAPPED = 's' };

static struct {
	bool marker, exact, scan, wp, wp_async, poison;
} kernel;
static int pagemap;
static char swap_device[256];
static const char *why; /* of the check that failed, or of the skip */
static char why_text[512];

/* Tests return one of these. */
enum { PASS, FAIL, SKIP };

static int because(int result, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why_text, sizeof(why_text), format, args);
	va_end(args);
	why = why_text;
	return result;
}

#define CHECK(what, ...)                                                                                               \
	do {                                                                                                           \
		if (!(what))                                                                                           \
			return because(FAIL, "line %d: " #what " " __VA_ARGS__, __LINE__);                             \
	} while (0)
#define SKIP_UNLESS(what)                                                                                              \
	do {                                                                                                           \
		if (!(what))                                                                                           \
			return because(SKIP, "no " #what);                                                             \
	} while (0)
#define PROPAGATE(call)                                                                                                \
	do {                                                                                                           \
		int result_ = (call);                                                                                  \
		if (result_ != PASS) {                                                                                 \
			size_t n_ = strlen(why_text);                                                                  \
			snprintf(why_text + n_, sizeof(why_text) - n_, " (from line %d)", __LINE__);                   \
			return result_;                                                                                \
		}                                                                                                      \
	} while (0)

static void die(const char *what)
{
	printf("Bail out! %s: %s\n", what, strerror(errno));
	exit(1);
}

/* --- Memory under test ------------------------------------------------------------------------------------------ */

struct memory {
	int fd;
	char *at;
	size_t pages;
};

/* Maps at a multiple of the huge page size, so that a page table's worth of pages is one. */
static char *map_aligned(int fd, size_t bytes, int flags)
{
	char *room = mmap(NULL, bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *at = (char *)(((uintptr_t)room + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));

	if (room == MAP_FAILED)
		die("mmap");
	if (at > room)
		munmap(room, at - room);
	munmap(at + bytes, room + HUGE_PAGE - at);
	at = mmap(at, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static struct memory memory_new(size_t pages)
{
	struct memory m = { .pages = pages };

	m.fd = memfd_create("pm_swap_test", MFD_CLOEXEC);
	if (m.fd < 0 || ftruncate(m.fd, pages * PAGE))
		die("memfd");
	m.at = map_aligned(m.fd, pages * PAGE, MAP_SHARED);
	return m;
}

static void memory_drop(struct memory *m)
{
	munmap(m->at, m->pages * PAGE);
	close(m->fd);
}

static uint64_t stamp_word(uint64_t page, uint64_t generation, unsigned int word)
{
	uint64_t x = page * 0x9e3779b97f4a7c15ULL + generation * 0xbf58476d1ce4e5b9ULL + word;

	x ^= x >> 31;
	return x * 0x94d049bb133111ebULL;
}

/* Words 0, 100, 200, 300, 400, 500 of a page tell which page and which generation it is. */
static void stamp(char *at, uint64_t page, uint64_t generation)
{
	for (unsigned int word = 0; word < 512; word += 100)
		((volatile uint64_t *)at)[word] = stamp_word(page, generation, word);
}

static bool stamped(const char *at, uint64_t page, uint64_t generation)
{
	for (unsigned int word = 0; word < 512; word += 100) {
		uint64_t want = generation ? stamp_word(page, generation, word) : 0;

		if (((volatile const uint64_t *)at)[word] != want)
			return false;
	}
	return true;
}

static void write_pages(struct memory *m, size_t first, size_t count, size_t step)
{
	for (size_t i = first; i < first + count; i += step)
		stamp(m->at + i * PAGE, i, 1);
}

static bool content_is(struct memory *m, size_t first, size_t count, uint64_t generation)
{
	for (size_t i = first; i < first + count; i++)
		if (!stamped(m->at + i * PAGE, i, generation))
			return false;
	return true;
}

/* --- What is where, by the means of a stock kernel ---------------------------------------------------------------- */

/* States of pages [first, first + count) of the file; any mapping of them will do for mincore(). */
static void oracle_at(int fd, char *at, size_t first, size_t count, char *states)
{
	unsigned char *core = malloc(count);
	off_t end = (first + count) * PAGE, data, hole;

	memset(states, HOLE, count);
	if (mincore(at, count * PAGE, core))
		die("mincore");
	for (off_t from = first * PAGE; from < end; from = hole) {
		data = lseek(fd, from, SEEK_DATA);
		if (data < 0 || data >= end)
			break;
		hole = lseek(fd, data, SEEK_HOLE);
		if (hole > end)
			hole = end;
		for (size_t i = data / PAGE; i < hole / PAGE; i++)
			states[i - first] = core[i - first] & 1 ? RESIDENT : SWAPPED;
	}
	free(core);
}

static void oracle(struct memory *m, char *states)
{
	oracle_at(m->fd, m->at, 0, m->pages, states);
}

static char oracle_of(struct memory *m, size_t page)
{
	char state;

	oracle_at(m->fd, m->at + page * PAGE, page, 1, &state);
	return state;
}

/* --- What pagemap says ------------------------------------------------------------------------------------------ */

static uint64_t entry(const void *at)
{
	uint64_t e;

	if (pread(pagemap, &e, 8, (uintptr_t)at / PAGE * 8) != 8)
		die("read of pagemap");
	return e;
}

static uint64_t entry_of(struct memory *m, size_t page)
{
	return entry(m->at + page * PAGE);
}

static char entry_state(uint64_t e)
{
	return e & PM_PRESENT ? RESIDENT : e & PM_SWAP ? SWAPPED : HOLE;
}

static long scan(char *at, size_t bytes, uint64_t flags, uint64_t mask, uint64_t inverted, uint64_t ret,
		 struct region *regions, size_t room, uint64_t *until)
{
	struct scan_arg arg = {
		.size = sizeof(arg), .flags = flags, .start = (uintptr_t)at, .end = (uintptr_t)at + bytes,
		.vec = (uintptr_t)regions, .vec_len = room, .mask = mask, .inverted = inverted, .ret = ret,
	};
	long n = ioctl(pagemap, SCAN, &arg);

	if (until)
		*until = arg.walk_end;
	return n;
}

/* States of pages by PM_SCAN_EXACT_SWAP. `room` regions a call: small numbers try the stops and the goings on. */
static int exact_states(char *at, size_t count, char *states, size_t room)
{
	struct region regions[64];
	uint64_t from = (uintptr_t)at, end = from + count * PAGE, until;
	size_t seen = 0;

	memset(states, '?', count);
	while (from < end) {
		long n = scan((char *)from, end - from, SCAN_EXACT, 0, 0, IS_INCORE | IS_SWAPPED, regions, room, &until);

		CHECK(n >= 0, "%s", strerror(errno));
		for (long r = 0; r < n; r++) {
			uint64_t c = regions[r].categories;

			CHECK(c != (IS_INCORE | IS_SWAPPED));
			for (uint64_t a = regions[r].start; a < regions[r].end; a += PAGE, seen++)
				states[(a - (uintptr_t)at) / PAGE] = c & IS_INCORE  ? RESIDENT :
								     c & IS_SWAPPED ? SWAPPED :
										      HOLE;
		}
		CHECK(until > from);
		from = until;
	}
	CHECK(seen == count, "%zu of %zu", seen, count);
	return PASS;
}

/* The exact query against the stock kernel's means, on quiet memory. Passes where there is no exact query. */
static int agree_at(int fd, char *at, size_t first, size_t count)
{
	int result = PASS;
	char *told, *want;
	size_t i;

	if (!kernel.exact)
		return PASS;
	told = malloc(count);
	want = malloc(count);
	oracle_at(fd, at, first, count, want);
	for (size_t room = 1; room <= 64 && result == PASS; room += 63) {
		result = exact_states(at, count, told, room);
		for (i = 0; result == PASS && i < count; i++)
			if (told[i] != want[i])
				result = because(FAIL, "exact: page %zu is '%c', told '%c'", first + i, want[i], told[i]);
	}
	free(told);
	free(want);
	return result;
}

static int agree(struct memory *m)
{
	return agree_at(m->fd, m->at, 0, m->pages);
}

/* Each page's entry shows what the page is. */
static int entries_agree(struct memory *m, bool need_marks)
{
	char *want = malloc(m->pages);
	int result = PASS;

	oracle(m, want);
	for (size_t i = 0; i < m->pages && result == PASS; i++) {
		uint64_t e = entry_of(m, i);

		if (!need_marks && want[i] == SWAPPED)
			continue;
		if (entry_state(e) != want[i])
			result = because(FAIL, "entry: page %zu is '%c', entry %#llx", i, want[i], (long long)e);
		else if (want[i] == SWAPPED && !(e & PM_FILE))
			result = because(FAIL, "page %zu without PM_FILE", i);
	}
	free(want);
	return result;
}

/* --- Paging out ------------------------------------------------------------------------------------------------- */

/* Until all that can go has gone: pages in other processors' LRU batches stay behind at first. */
static int page_out(struct memory *m, size_t first, size_t count)
{
	char *states = malloc(count);
	size_t left = count;

	for (int try = 0; try < 200 && left; try++) {
		if (madvise(m->at + first * PAGE, count * PAGE, MADV_PAGEOUT))
			die("MADV_PAGEOUT");
		oracle_at(m->fd, m->at + first * PAGE, first, count, states);
		left = 0;
		for (size_t i = 0; i < count; i++)
			left += states[i] == RESIDENT;
		if (left)
			usleep(try < 20 ? 1000 : 20000);
		/* What came back with a neighbour (readahead) is in swap cache and not mapped. */
		for (size_t i = 0; left && try > 2 && i < count; i++)
			if (states[i] == RESIDENT)
				(void)*(volatile char *)(m->at + (first + i) * PAGE);
	}
	free(states);
	return left ? because(FAIL, "%zu pages will not go out", left) : PASS;
}

/* --- userfaultfd ------------------------------------------------------------------------------------------------ */

static int uffd_open(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return -1;
	}
	return fd;
}

static int uffd_register(int fd, char *at, size_t bytes, uint64_t mode)
{
	struct uffdio_register arg = { .range = { (uintptr_t)at, bytes }, .mode = mode };

	return ioctl(fd, UFFDIO_REGISTER, &arg);
}

static int uffd_protect(int fd, char *at, size_t bytes, bool on)
{
	struct uffdio_writeprotect arg = { .range = { (uintptr_t)at, bytes },
					   .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };

	return ioctl(fd, UFFDIO_WRITEPROTECT, &arg);
}

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

static int test_madv_collapse(void)
{
	struct memory m = memory_new(1024);

	write_pages(&m, 0, 1024, 1);
	for (size_t i = 100; i < 120; i++)
		PROPAGATE(page_out(&m, i, 1));
	if (madvise(m.at, HUGE_PAGE, MADV_COLLAPSE)) {
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
	if (madvise(other, HUGE_PAGE, MADV_COLLAPSE))
		return because(errno == EINVAL ? SKIP : FAIL, "MADV_COLLAPSE: %s", strerror(errno));
	CHECK(!madvise(m.at, HUGE_PAGE, MADV_COLLAPSE), "%s", strerror(errno));
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

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return done;
}

/* A cgroup of its own, where cgroup v2 has a memory controller. */
static bool enter_cgroup(const char *limit)
{
	write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir("/sys/fs/cgroup/pm_swap_test", 0755);
	return write_file("/sys/fs/cgroup/pm_swap_test/memory.max", limit) &&
	       write_file("/sys/fs/cgroup/pm_swap_test/cgroup.procs", "0");
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

/* --- Which kernel, and all of it --------------------------------------------------------------------------------- */

static void find_out(void)
{
	struct memory m = memory_new(16);
	struct region r[1];
	struct uffdio_api api = { .api = UFFD_API };
	FILE *f = fopen("/proc/swaps", "r");
	char line[512];
	int fd, swaps = 0;

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "/%255s", swap_device + 1) == 1) {
			swap_device[0] = '/';
			swaps++;
		}
	if (f)
		fclose(f);
	if (swaps != 1)
		swap_device[0] = 0;
	if (!swaps) {
		errno = ENODEV;
		die("no swap is on");
	}

	kernel.scan = scan(m.at, PAGE, 0, 0, 0, IS_PRESENT, r, 1, NULL) >= 0;
	kernel.exact = scan(m.at, PAGE, SCAN_EXACT, 0, 0, IS_INCORE, r, 1, NULL) >= 0;
	write_pages(&m, 0, 16, 1);
	if (page_out(&m, 0, 16) != PASS)
		die(why_text);
	kernel.marker = entry_of(&m, 3) & PM_SWAP;
	memory_drop(&m);

	fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api)) {
		kernel.wp = api.features & FEATURE_WP_SHMEM;
		kernel.wp_async = kernel.scan && kernel.wp && (api.features & FEATURE_WP_ASYNC);
		kernel.poison = api.features & (1ULL << 14);
	}
	close(fd);
}

static const struct {
	const char *name;
	int (*run)(void);
} tests[] = {
#define TEST(name) { #name, test_##name }
	TEST(present_swapped_hole), TEST(fault), TEST(pread), TEST(second_mapping), TEST(punch_hole), TEST(madv_remove),
	TEST(ftruncate), TEST(madv_dontneed), TEST(mremap), TEST(mprotect), TEST(fork), TEST(uffd_wp_then_pageout),
	TEST(pageout_then_uffd_wp), TEST(uffd_wp_punch), TEST(uffd_wp_hole), TEST(uffd_wp_async), TEST(uffd_missing),
	TEST(uffd_minor), TEST(uffd_poison), TEST(madv_collapse), TEST(madv_collapse_marked_table), TEST(swapoff),
	TEST(zero_pages), TEST(clean_pages), TEST(fallocate), TEST(smaps), TEST(private_mapping), TEST(anonymous_shared),
	TEST(sysv_shm), TEST(reclaim_two_mappings), TEST(exact_ranges), TEST(exact_refusals),
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
