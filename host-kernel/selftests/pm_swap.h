/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the programs in this folder share: memory under test with known content, where its pages are by the means of a
 * stock kernel (the oracle), what pagemap and PAGEMAP_SCAN say, paging out.
 */
#ifndef PM_SWAP_H
#define PM_SWAP_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/io_uring.h>
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

__attribute__((format(printf, 2, 3)))
static inline int because(int result, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why_text, sizeof(why_text), format, args);
	va_end(args);
	why = why_text;
	return result;
}

/* What failed, where, and what else there is to say. */
__attribute__((format(printf, 3, 4)))
static inline int check_failed(int line, const char *what, const char *format, ...)
{
	va_list args;
	int n = snprintf(why_text, sizeof(why_text), "line %d: %s", line, what);

	va_start(args, format);
	if (n > 0 && (size_t)n < sizeof(why_text))
		vsnprintf(why_text + n, sizeof(why_text) - n, format, args);
	va_end(args);
	why = why_text;
	return FAIL;
}

#define CHECK(what, ...)                                                                                               \
	do {                                                                                                           \
		if (!(what))                                                                                           \
			return check_failed(__LINE__, #what, " " __VA_ARGS__);                                         \
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

static inline void die(const char *what)
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
static inline char *map_aligned(int fd, size_t bytes, int flags)
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

static inline struct memory memory_new(size_t pages)
{
	struct memory m = { .pages = pages };

	m.fd = memfd_create("pm_swap_test", MFD_CLOEXEC);
	if (m.fd < 0 || ftruncate(m.fd, pages * PAGE))
		die("memfd");
	m.at = map_aligned(m.fd, pages * PAGE, MAP_SHARED);
	return m;
}

static inline void memory_drop(struct memory *m)
{
	munmap(m->at, m->pages * PAGE);
	close(m->fd);
}

static inline uint64_t stamp_word(uint64_t page, uint64_t generation, unsigned int word)
{
	uint64_t x = page * 0x9e3779b97f4a7c15ULL + generation * 0xbf58476d1ce4e5b9ULL + word;

	x ^= x >> 31;
	return x * 0x94d049bb133111ebULL;
}

/* Words 0, 100, 200, 300, 400, 500 of a page tell which page and which generation it is. */
static inline void stamp(char *at, uint64_t page, uint64_t generation)
{
	for (unsigned int word = 0; word < 512; word += 100)
		((volatile uint64_t *)at)[word] = stamp_word(page, generation, word);
}

static inline bool stamped(const char *at, uint64_t page, uint64_t generation)
{
	for (unsigned int word = 0; word < 512; word += 100) {
		uint64_t want = generation ? stamp_word(page, generation, word) : 0;

		if (((volatile const uint64_t *)at)[word] != want)
			return false;
	}
	return true;
}

static inline void write_pages(struct memory *m, size_t first, size_t count, size_t step)
{
	for (size_t i = first; i < first + count; i += step)
		stamp(m->at + i * PAGE, i, 1);
}

static inline bool content_is(struct memory *m, size_t first, size_t count, uint64_t generation)
{
	for (size_t i = first; i < first + count; i++)
		if (!stamped(m->at + i * PAGE, i, generation))
			return false;
	return true;
}

/* --- What is where, by the means of a stock kernel ---------------------------------------------------------------- */

/* States of pages [first, first + count) of the file; any mapping of them will do for mincore(). */
static inline void oracle_at(int fd, char *at, size_t first, size_t count, char *states)
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

static inline void oracle(struct memory *m, char *states)
{
	oracle_at(m->fd, m->at, 0, m->pages, states);
}

static inline char oracle_of(struct memory *m, size_t page)
{
	char state;

	oracle_at(m->fd, m->at + page * PAGE, page, 1, &state);
	return state;
}

/* --- What pagemap says ------------------------------------------------------------------------------------------ */

static inline uint64_t entry(const void *at)
{
	uint64_t e;

	if (pread(pagemap, &e, 8, (uintptr_t)at / PAGE * 8) != 8)
		die("read of pagemap");
	return e;
}

static inline uint64_t entry_of(struct memory *m, size_t page)
{
	return entry(m->at + page * PAGE);
}

static inline char entry_state(uint64_t e)
{
	return e & PM_PRESENT ? RESIDENT : e & PM_SWAP ? SWAPPED : HOLE;
}

static inline long scan(char *at, size_t bytes, uint64_t flags, uint64_t mask, uint64_t inverted, uint64_t ret,
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
static inline int exact_states(char *at, size_t count, char *states, size_t room)
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
static inline int agree_at(int fd, char *at, size_t first, size_t count)
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

static inline int agree(struct memory *m)
{
	return agree_at(m->fd, m->at, 0, m->pages);
}

/* Each page's entry shows what the page is. */
static inline int entries_agree(struct memory *m, bool need_marks)
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

static inline bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return done;
}

/* Until all that can go has gone: pages in other processors' LRU batches stay behind at first. */
static inline int page_out(struct memory *m, size_t first, size_t count)
{
	char *states = malloc(count);
	size_t left = count;
	char bytes[32];

	for (int try = 0; try < 200 && left; try++) {
		if (madvise(m->at + first * PAGE, count * PAGE, MADV_PAGEOUT))
			die("MADV_PAGEOUT");
		oracle_at(m->fd, m->at + first * PAGE, first, count, states);
		left = 0;
		for (size_t i = 0; i < count; i++)
			left += states[i] == RESIDENT;
		if (left)
			usleep(try < 20 ? 1000 : 20000);
		/* A disk is written to in time, and what is written stays in swap cache until its memory is wanted. */
		if (left && try > 2 && try % 4 && strncmp(swap_device, "/dev/zram", 9)) {
			snprintf(bytes, sizeof(bytes), "%zu", left * PAGE);
			write_file("/sys/fs/cgroup/memory.reclaim", bytes);
			continue;
		}
		/* What came back with a neighbour (readahead) is in swap cache and not mapped. */
		for (size_t i = 0; left && try > 2 && i < count; i++)
			if (states[i] == RESIDENT)
				(void)*(volatile char *)(m->at + (first + i) * PAGE);
	}
	free(states);
	return left ? because(FAIL, "%zu pages will not go out", left) : PASS;
}

/* --- Pinning ------------------------------------------------------------------------------------------------------- */

/*
 * Pins pages for DMA, as buffers of an io_uring that does no I/O, `count` ranges. They are in memory then. Gives the ring,
 * whose end is theirs, or -1 with errno.
 */
static inline int pin(const struct iovec *ranges, unsigned int count)
{
	struct io_uring_params params = {};
	int error, ring = syscall(SYS_io_uring_setup, 1, &params);

	if (ring >= 0 && syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, ranges, count)) {
		error = errno;
		close(ring);
		errno = error;
		return -1;
	}
	return ring;
}

static inline void unpin(int ring)
{
	/* At once: a ring that is closed lets go of them later, in its own time. */
	if (syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0))
		die("IORING_UNREGISTER_BUFFERS");
	close(ring);
}

/* --- userfaultfd ------------------------------------------------------------------------------------------------ */

static inline int uffd_open(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return -1;
	}
	return fd;
}

static inline int uffd_register(int fd, char *at, size_t bytes, uint64_t mode)
{
	struct uffdio_register arg = { .range = { (uintptr_t)at, bytes }, .mode = mode };

	return ioctl(fd, UFFDIO_REGISTER, &arg);
}

static inline int uffd_protect(int fd, char *at, size_t bytes, bool on)
{
	struct uffdio_writeprotect arg = { .range = { (uintptr_t)at, bytes },
					   .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0 };

	return ioctl(fd, UFFDIO_WRITEPROTECT, &arg);
}

/* --- Which kernel, which cgroup --------------------------------------------------------------------------------- */

/* A cgroup of its own, where cgroup v2 has a memory controller. */
static inline bool enter_cgroup(const char *limit)
{
	write_file("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir("/sys/fs/cgroup/pm_swap_test", 0755);
	return write_file("/sys/fs/cgroup/pm_swap_test/memory.max", limit) &&
	       write_file("/sys/fs/cgroup/pm_swap_test/cgroup.procs", "0");
}

static inline void find_out(void)
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

#endif
