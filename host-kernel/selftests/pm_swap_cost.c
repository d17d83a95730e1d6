// SPDX-License-Identifier: GPL-2.0
/*
 * What it costs that pagemap tells swapped shared memory, in instructions a page, and how right what it tells is.
 *
 * Runs on stock and patched kernels, so that two runs can be compared. Needs root and swap on zram. `--cost` needs a
 * processor whose time stamp counter counts instructions, such as QEMU's with -icount shift=0, and finds out whether it
 * is on one. Build: gcc -static -O2 -Wall -o pm_swap_cost pm_swap_cost.c
 *
 *   pm_swap_cost --cost [--repeat N]	COST name median min max, in instructions a page
 *   pm_swap_cost --accuracy		ACCURACY scenario pages swapped marker_fp marker_fn exact_fp exact_fn
 *
 * The last four are per million pages: false positives are pages told to be swapped that are not, false negatives those
 * that are swapped and not told so. For the exact query a hole told to be in memory is a false positive too, and memory
 * told to be a hole a false negative, so that 0 and 0 is right everywhere. `-`: this kernel has no exact query.
 *
 * Exit status: 0, or 1 after a sentence that says why not.
 */
#define _GNU_SOURCE
#include <sys/resource.h>
#include <sys/swap.h>
#include <sys/wait.h>

#include "pm_swap.h"

static void refuse(const char *sentence)
{
	printf("Bail out! %s\n", sentence);
	exit(1);
}

static void page_cluster(const char *value)
{
	if (!write_file("/proc/sys/vm/page-cluster", value))
		die("/proc/sys/vm/page-cluster");
}

/* --- Counting instructions ------------------------------------------------------------------------------------- */

static inline uint64_t now(void)
{
	uint32_t low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/*
 * Waits for the timer to tick, and gives the time after. What takes less than a tick (4 million instructions at 250 Hz)
 * is then disturbed by none; what takes longer by as many in every run.
 */
static uint64_t begin(void)
{
	uint64_t last = now(), at;

	for (uint64_t until = last + 40000000; (at = now()) < until; last = at)
		if (at - last > 400)
			break;
	return now();
}

/* Ticks of the counter that a loop takes, of 2 instructions or of 5 a turn. */
static uint64_t ticks_of(unsigned long turns, bool longer)
{
	uint64_t least = UINT64_MAX;

	for (int try = 0; try < 5; try++) {
		unsigned long left = turns, product = 3;
		uint64_t from = begin(), ticks;

		if (longer)
			asm volatile("1: imul $7, %1, %1\n\tadd $1, %1\n\tror $3, %1\n\tdec %0\n\tjnz 1b"
				     : "+r"(left), "+r"(product) : : "cc");
		else
			asm volatile("1: dec %0\n\tjnz 1b" : "+r"(left) : : "cc");
		ticks = now() - from;
		if (ticks < least)
			least = ticks;
	}
	return least;
}

/* Ends the program unless the counter ticks once an instruction, whatever the instructions are. */
static void calibrate(void)
{
	static const struct {
		unsigned long turns, instructions;
		bool longer;
	} loops[] = { { 1000, 2000, false }, { 100000, 200000, false }, { 100000, 500000, true } };

	for (size_t i = 0; i < sizeof(loops) / sizeof(loops[0]); i++) {
		uint64_t want = loops[i].instructions, ticks = ticks_of(loops[i].turns, loops[i].longer);

		printf("# a loop of %lu instructions takes %lu ticks\n", (long)want, (long)ticks);
		/* A few go to reading the counter. */
		if (ticks < want || ticks > want + want / 1000 + 40)
			refuse("the time stamp counter does not count instructions here: "
			       "run this in QEMU with -icount shift=0");
	}
}

/* --- What was measured ----------------------------------------------------------------------------------------- */

#define PAGES 8192UL
#define REPEATS 64

static struct cost {
	char name[48];
	double of[REPEATS];
	size_t count;
} costs[96];
static size_t measurements;

static void record(const char *what, const char *of, uint64_t ticks, size_t pages)
{
	char name[48];
	size_t i;

	snprintf(name, sizeof(name), "%s%s%s", what, of[0] ? "-" : "", of);
	for (i = 0; i < measurements && strcmp(costs[i].name, name); i++)
		;
	if (i == sizeof(costs) / sizeof(costs[0]) || costs[i].count == REPEATS || !pages)
		refuse(pages ? "too much was measured" : "no page went out");
	if (i == measurements)
		strcpy(costs[measurements++].name, name);
	costs[i].of[costs[i].count++] = (double)ticks / pages;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void print_costs(void)
{
	for (size_t i = 0; i < measurements; i++) {
		struct cost *c = &costs[i];

		qsort(c->of, c->count, sizeof(c->of[0]), ascending);
		printf("COST %s %.2f %.2f %.2f\n", c->name, c->of[c->count / 2], c->of[0], c->of[c->count - 1]);
	}
}

/* --- Memory to measure ----------------------------------------------------------------------------------------- */

/*
 * Half of a page does not compress and half does well, so that zram keeps about half a page, as it does of the memory
 * of most guests. Dearer content would hide what the patches cost, cheaper would exaggerate it.
 */
static void fill(struct memory *m, size_t page)
{
	uint64_t *words = (uint64_t *)(m->at + page * PAGE), x = page * 0x9e3779b97f4a7c15ULL + 1;

	for (size_t i = 0; i < 512; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		words[i] = i < 256 ? x : page;
	}
}

/* One word over and over: zram keeps the word. Nothing is cheaper to swap. */
static void fill_same(struct memory *m, size_t page)
{
	uint64_t *words = (uint64_t *)(m->at + page * PAGE);

	for (size_t i = 0; i < 512; i++)
		words[i] = page + 1;
}

static void fill_all(struct memory *m, void (*how)(struct memory *, size_t))
{
	for (size_t i = 0; i < m->pages; i++)
		how(m, i);
}

static void out(struct memory *m)
{
	if (page_out(m, 0, m->pages) != PASS)
		refuse(why_text);
}

static size_t swapped_pages(struct memory *m)
{
	char *states = malloc(m->pages);
	size_t n = 0;

	oracle(m, states);
	for (size_t i = 0; i < m->pages; i++)
		n += states[i] == SWAPPED;
	free(states);
	return n;
}

/* --- Reading --------------------------------------------------------------------------------------------------- */

/* PAGEMAP_SCAN of a range for any of these categories, as memory-agent asks. */
static void scan_all(struct memory *m, uint64_t flags, uint64_t categories)
{
	static struct region regions[512];
	struct scan_arg arg = {
		.size = sizeof(arg), .flags = flags, .start = (uintptr_t)m->at,
		.end = (uintptr_t)m->at + m->pages * PAGE, .vec = (uintptr_t)regions,
		.vec_len = sizeof(regions) / sizeof(regions[0]), .anyof = categories, .ret = categories,
	};

	for (; arg.start < arg.end; arg.start = arg.walk_end)
		if (ioctl(pagemap, SCAN, &arg) < 0)
			die("PAGEMAP_SCAN");
}

static void measure_pagemap(struct memory *m, const char *of)
{
	static uint64_t entries[512];
	off_t first = (uintptr_t)m->at / PAGE * 8;
	uint64_t from = begin();

	for (size_t i = 0; i < m->pages; i += 512)
		if (pread(pagemap, entries, sizeof(entries), first + i * 8) != sizeof(entries))
			die("read of pagemap");
	record("pagemap-batch", of, now() - from, m->pages);

	from = begin();
	for (size_t i = 0; i < m->pages; i++)
		if (pread(pagemap, entries, 8, first + i * 8) != 8)
			die("read of pagemap");
	record("pagemap-single", of, now() - from, m->pages);

	if (!kernel.scan)
		return;
	from = begin();
	scan_all(m, 0, IS_PRESENT | IS_SWAPPED);
	record("scan", of, now() - from, m->pages);
}

/* The exact query, and beside it what a stock kernel has to be asked for the same. */
static void measure_exact(struct memory *m, const char *of)
{
	static unsigned char core[PAGES];
	off_t end = m->pages * PAGE, data, hole;
	uint64_t from;

	if (kernel.exact) {
		from = begin();
		scan_all(m, SCAN_EXACT, IS_INCORE | IS_SWAPPED);
		record("exact", of, now() - from, m->pages);
	}
	from = begin();
	for (off_t at = 0; at < end; at = hole) {
		data = lseek(m->fd, at, SEEK_DATA);
		if (data < 0)
			break;
		hole = lseek(m->fd, data, SEEK_HOLE);
	}
	if (mincore(m->at, end, core))
		die("mincore");
	record("lseek-mincore", of, now() - from, m->pages);
}

/* --- Faults ---------------------------------------------------------------------------------------------------- */

static size_t in_order[PAGES], shuffled[PAGES];

static void make_orders(void)
{
	unsigned int seed = 1;

	for (size_t i = 0; i < PAGES; i++)
		in_order[i] = shuffled[i] = i;
	for (size_t i = PAGES - 1; i; i--) {
		size_t j = rand_r(&seed) % (i + 1), kept = shuffled[i];

		shuffled[i] = shuffled[j];
		shuffled[j] = kept;
	}
}

static long faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_minflt + usage.ru_majflt;
}

static void measure_touch(struct memory *m, const char *name, const size_t *order, bool write, bool say)
{
	long before = faults();
	uint64_t from = begin();

	for (size_t i = 0; i < m->pages; i++) {
		volatile char *at = m->at + order[i] * PAGE;

		if (write)
			*at = 1;
		else
			(void)*at;
	}
	record(name, "", now() - from, m->pages);
	if (say)
		printf("# %s: %ld faults for %zu pages\n", name, faults() - before, m->pages);
}

/* --- All that is measured -------------------------------------------------------------------------------------- */

static void measure_reading(struct memory *m)
{
	/* One page a page table, so that the holes have entries. */
	for (size_t i = 0; i < m->pages; i += 512)
		fill(m, i);
	measure_pagemap(m, "hole");
	measure_exact(m, "hole");

	fill_all(m, fill);
	measure_pagemap(m, "present");
	measure_exact(m, "present");

	out(m);
	measure_pagemap(m, "swapped");
	measure_exact(m, "swapped");

	/* Every second page is there and mapped, every other one swapped. */
	for (size_t i = 0; i < m->pages; i += 2)
		(void)*(volatile char *)(m->at + i * PAGE);
	measure_pagemap(m, "alternating");
	measure_exact(m, "alternating");
}

static void measure_faults(struct memory *m, bool say)
{
	static char pages[64 * PAGE];
	static const struct {
		const char *name;
		bool random, write;
		const char *cluster;
	} ways[] = {
		{ "swap-in-sequential", false, false, "0" },
		{ "swap-in-random", true, false, "0" },
		{ "swap-in-write-sequential", false, true, "0" },
		{ "swap-in-sequential-readahead", false, false, "3" },
		{ "swap-in-random-readahead", true, false, "3" },
	};

	for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
		out(m);
		page_cluster(ways[i].cluster);
		measure_touch(m, ways[i].name, ways[i].random ? shuffled : in_order, ways[i].write, say);
		page_cluster("0");
	}

	/* Back in the page cache by another way, and not mapped: what fault-around is for. */
	out(m);
	for (size_t i = 0; i < m->pages; i += 64)
		if (pread(m->fd, pages, sizeof(pages), i * PAGE) != sizeof(pages))
			die("pread");
	measure_touch(m, "fault-around-all-back", in_order, false, say);
	out(m);
	for (size_t i = 0; i < m->pages; i += 2)
		if (pread(m->fd, pages, PAGE, i * PAGE) != PAGE)
			die("pread");
	measure_touch(m, "fault-around-half-back", in_order, false, say);
}

static void measure_reclaim(struct memory *m, bool grouped)
{
	char bytes[32];
	uint64_t from, ticks;

	from = begin();
	if (madvise(m->at, m->pages * PAGE, MADV_PAGEOUT))
		die("MADV_PAGEOUT");
	ticks = now() - from;
	record("reclaim-madvise", "", ticks, swapped_pages(m));

	if (!grouped)
		return;
	fill_all(m, fill);
	snprintf(bytes, sizeof(bytes), "%lu", m->pages * PAGE);
	from = begin();
	/* Says EAGAIN when it found less. */
	write_file("/sys/fs/cgroup/pm_swap_test/memory.reclaim", bytes);
	ticks = now() - from;
	record("reclaim-cgroup", "", ticks, swapped_pages(m));
}

/* What meets the entries of a range that is swapped out, besides faults. */
static void measure_others(struct memory *m)
{
	size_t bytes = m->pages * PAGE;
	uint64_t from;
	pid_t child;

	out(m);
	from = begin();
	child = fork();
	if (!child)
		_exit(0);
	if (waitpid(child, NULL, 0) != child)
		die("fork");
	record("fork-exit-swapped", "", now() - from, m->pages);

	from = begin();
	if (mprotect(m->at, bytes, PROT_READ))
		die("mprotect");
	record("mprotect-swapped", "", now() - from, m->pages);
	mprotect(m->at, bytes, PROT_READ | PROT_WRITE);

	from = begin();
	munmap(m->at, bytes);
	record("munmap-swapped", "", now() - from, m->pages);

	/* Mapped anew: no page tables, and all of it in swap. */
	m->at = map_aligned(m->fd, bytes, MAP_SHARED);
	measure_exact(m, "swapped-fresh");
	for (size_t i = 0; i < m->pages; i++)
		(void)*(volatile char *)(m->at + i * PAGE);
	out(m);
	from = begin();
	if (fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, bytes))
		die("PUNCH_HOLE");
	record("punch-hole-swapped", "", now() - from, m->pages);
}

static void measure_same_filled(struct memory *m)
{
	uint64_t from, ticks;

	fill_all(m, fill_same);
	from = begin();
	if (madvise(m->at, m->pages * PAGE, MADV_PAGEOUT))
		die("MADV_PAGEOUT");
	ticks = now() - from;
	record("reclaim-madvise-same-filled", "", ticks, swapped_pages(m));
	out(m);
	measure_touch(m, "swap-in-sequential-same-filled", in_order, false, false);
}

static void measure(int repeats)
{
	bool grouped;

	calibrate();
	grouped = enter_cgroup("max");
	if (!grouped)
		printf("# there is no cgroup v2 memory controller: memory.reclaim is not measured\n");
	page_cluster("0");
	make_orders();
	/* The first time round caches are filled, and it does not count. */
	for (int n = 0; n <= repeats; n++) {
		struct memory m = memory_new(PAGES);

		printf("# round %d of %d\n", n, repeats);
		if (n == 1)
			measurements = 0, memset(costs, 0, sizeof(costs));
		measure_reading(&m);
		measure_faults(&m, n == repeats);
		fill_all(&m, fill);
		measure_reclaim(&m, grouped);
		measure_others(&m);
		measure_same_filled(&m);
		memory_drop(&m);
	}
	print_costs();
}

/* --- How right it is ------------------------------------------------------------------------------------------- */

#define ASKED 16384UL
#define BLOCK 64

struct tally {
	size_t swapped, marker_fp, marker_fn, exact_fp, exact_fn;
};

/* What a mapping of a file tells of its pages, against what the file says. */
static struct tally compare(int fd, char *at)
{
	static char truth[ASKED], told[ASKED];
	static uint64_t entries[ASKED];
	/* A mapping that nothing was done to: nothing but the file can answer. */
	char *fresh = map_aligned(fd, ASKED * PAGE, MAP_SHARED);
	struct tally t = {};

	oracle_at(fd, fresh, 0, ASKED, truth);
	munmap(fresh, ASKED * PAGE);
	if (pread(pagemap, entries, sizeof(entries), (uintptr_t)at / PAGE * 8) != sizeof(entries))
		die("read of pagemap");
	if (kernel.exact && exact_states(at, ASKED, told, 64) != PASS)
		refuse(why_text);
	for (size_t i = 0; i < ASKED; i++) {
		bool swapped = truth[i] == SWAPPED, marked = entry_state(entries[i]) == SWAPPED;

		t.swapped += swapped;
		t.marker_fp += marked && !swapped;
		t.marker_fn += swapped && !marked;
		if (!kernel.exact || told[i] == truth[i])
			continue;
		if (told[i] == SWAPPED || (told[i] == RESIDENT && truth[i] == HOLE))
			t.exact_fp++;
		else
			t.exact_fn++;
	}
	return t;
}

static double per_million(size_t pages)
{
	return pages * 1e6 / ASKED;
}

static void tell(const char *scenario, struct tally t)
{
	printf("ACCURACY %s %lu %zu %.0f %.0f", scenario, ASKED, t.swapped, per_million(t.marker_fp),
	       per_million(t.marker_fn));
	if (kernel.exact)
		printf(" %.0f %.0f\n", per_million(t.exact_fp), per_million(t.exact_fn));
	else
		printf(" - -\n");
}

/* Every eighth page and every seventh block is a hole. */
static void write_some(struct memory *m)
{
	for (size_t i = 0; i < ASKED; i++)
		if (i % 8 != 7 && i / BLOCK % 7 != 6)
			stamp(m->at + i * PAGE, i, 1);
}

/* Three of four blocks go out. */
static void out_some(struct memory *m)
{
	for (size_t block = 0; block < ASKED / BLOCK; block++)
		if (block % 4 != 3 && page_out(m, block * BLOCK, BLOCK) != PASS)
			refuse(why_text);
}

static void touch_some(char *at)
{
	for (size_t i = 0; i < ASKED; i += 3)
		if (i / BLOCK % 7 != 6)
			(void)*(volatile char *)(at + i * PAGE);
}

/* Each is done to memory with holes, pages in memory and pages in swap. Gives what it was not done for, or NULL. */

static const char *nothing(struct memory *m)
{
	(void)m;
	return NULL;
}

static const char *fault(struct memory *m)
{
	touch_some(m->at);
	return NULL;
}

static const char *by_pread(struct memory *m)
{
	char page[PAGE];

	for (size_t i = 0; i < ASKED; i += 3)
		if (pread(m->fd, page, PAGE, i * PAGE) != PAGE)
			die("pread");
	return NULL;
}

static const char *other_mapping(struct memory *m)
{
	char *other = map_aligned(m->fd, ASKED * PAGE, MAP_SHARED);

	touch_some(other);
	munmap(other, ASKED * PAGE);
	return NULL;
}

static const char *punch_hole(struct memory *m)
{
	for (size_t i = 0; i < ASKED; i += 5 * BLOCK)
		if (fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, i * PAGE, BLOCK * PAGE))
			die("PUNCH_HOLE");
	return NULL;
}

static const char *truncated(struct memory *m)
{
	if (ftruncate(m->fd, ASKED / 2 * PAGE) || ftruncate(m->fd, ASKED * PAGE))
		die("ftruncate");
	return NULL;
}

static const char *dontneed(struct memory *m)
{
	if (madvise(m->at, ASKED / 2 * PAGE, MADV_DONTNEED))
		die("MADV_DONTNEED");
	return NULL;
}

static const char *moved(struct memory *m)
{
	char *room = map_aligned(-1, ASKED * PAGE, MAP_PRIVATE | MAP_ANONYMOUS);

	m->at = mremap(m->at, ASKED * PAGE, ASKED * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
	if (m->at == MAP_FAILED)
		die("mremap");
	return NULL;
}

static const char *protected(struct memory *m)
{
	if (mprotect(m->at, ASKED * PAGE, PROT_READ))
		die("mprotect");
	return NULL;
}

static const char *fresh_mapping(struct memory *m)
{
	munmap(m->at, ASKED * PAGE);
	m->at = map_aligned(m->fd, ASKED * PAGE, MAP_SHARED);
	return NULL;
}

static int tracked = -1; /* userfaultfd of the memory, closed with it */

static const char *arm(struct memory *m)
{
	if (!kernel.wp)
		return "there is no write protection of shared memory by userfaultfd";
	tracked = uffd_open(FEATURE_WP_SHMEM);
	if (uffd_register(tracked, m->at, ASKED * PAGE, UFFDIO_REGISTER_MODE_WP) ||
	    uffd_protect(tracked, m->at, ASKED * PAGE, true))
		die("write protection by userfaultfd");
	return NULL;
}

static const char *swap_off_and_on(struct memory *m)
{
	if (!swap_device[0])
		return "there is more than one swap device";
	if (swapoff(swap_device) || swapon(swap_device, 0))
		die("swapoff and swapon");
	/* All is in memory now. Some of it goes out again. */
	if (page_out(m, 0, ASKED / 4) != PASS)
		refuse(why_text);
	return NULL;
}

static int pinned = -1; /* io_uring that has pages of the memory for buffers, closed with it */

/* The blocks that stayed in memory are pinned, as a device's or an io_uring's, and reclaim comes by. */
static const char *pinned_pages(struct memory *m)
{
	struct iovec ranges[ASKED / BLOCK];
	unsigned int count = 0;

	for (size_t block = 3; block < ASKED / BLOCK; block += 4)
		ranges[count++] = (struct iovec){ m->at + block * BLOCK * PAGE, BLOCK * PAGE };
	pinned = pin(ranges, count);
	if (pinned < 0)
		return "pages cannot be pinned by io_uring";
	if (madvise(m->at, ASKED * PAGE, MADV_PAGEOUT))
		die("MADV_PAGEOUT");
	return NULL;
}

static const char *collapse(struct memory *m)
{
	/* Half of the huge pages are made, and every second of those goes out again. */
	for (size_t i = 0; i < ASKED; i += 2 * 512)
		if (madvise(m->at + i * PAGE, HUGE_PAGE, MADV_COLLAPSE))
			return "shared memory cannot be collapsed to huge pages";
	for (size_t i = 0; i < ASKED; i += 4 * 512)
		if (page_out(m, i, 512) != PASS)
			refuse(why_text);
	return NULL;
}

static const char *random_history(struct memory *m)
{
	char *other = map_aligned(m->fd, ASKED * PAGE, MAP_SHARED);
	unsigned int seed = 7;
	char page[PAGE];

	for (int n = 0; n < 3000; n++) {
		size_t first = rand_r(&seed) % (ASKED / BLOCK) * BLOCK, i = first + rand_r(&seed) % BLOCK;

		switch (rand_r(&seed) % 8) {
		case 0:
			for (; i < first + BLOCK; i += 1 + rand_r(&seed) % 8)
				stamp(m->at + i * PAGE, i, 2);
			break;
		case 1:
			for (; i < first + BLOCK; i += 1 + rand_r(&seed) % 8)
				(void)*(volatile char *)(m->at + i * PAGE);
			break;
		case 2:
			if (pread(m->fd, page, PAGE, i * PAGE) != PAGE)
				die("pread");
			break;
		case 3 ... 5:
			madvise(m->at + first * PAGE, BLOCK * PAGE, MADV_PAGEOUT);
			break;
		case 6:
			if (rand_r(&seed) % 2)
				madvise(m->at + first * PAGE, BLOCK * PAGE, MADV_DONTNEED);
			else if (fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, i * PAGE,
					   (first + BLOCK - i) * PAGE))
				die("PUNCH_HOLE");
			break;
		case 7:
			(void)*(volatile char *)(other + i * PAGE);
			/* Pages mapped twice would not go out again. */
			madvise(other + first * PAGE, BLOCK * PAGE, MADV_DONTNEED);
			break;
		}
	}
	munmap(other, ASKED * PAGE);
	return NULL;
}

static const struct {
	const char *name;
	const char *(*before)(struct memory *), *(*after)(struct memory *);
	bool in_child;
} scenarios[] = {
	{ "page-out", nothing, nothing, false },
	{ "fault", nothing, fault, false },
	{ "pread", nothing, by_pread, false },
	{ "other-mapping", nothing, other_mapping, false },
	{ "punch-hole", nothing, punch_hole, false },
	{ "truncate", nothing, truncated, false },
	{ "dontneed", nothing, dontneed, false },
	{ "mremap", nothing, moved, false },
	{ "mprotect", nothing, protected, false },
	{ "fork", nothing, nothing, true },
	{ "fresh-mapping", nothing, fresh_mapping, false },
	{ "uffd-wp-before", arm, nothing, false },
	{ "uffd-wp-after", nothing, arm, false },
	{ "swapoff-on", nothing, swap_off_and_on, false },
	{ "collapse", nothing, collapse, false },
	{ "pinned", nothing, pinned_pages, false },
	{ "random", nothing, random_history, false },
};

static void tell_as_child(const char *name, struct memory *m)
{
	pid_t child;
	int status;

	fflush(stdout);
	child = fork();
	if (!child) {
		pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
		tell(name, compare(m->fd, m->at));
		exit(0);
	}
	if (waitpid(child, &status, 0) != child || status)
		refuse("the child could not be asked");
}

static void judge(void)
{
	/* The kernel's own value: neighbours come back with a page, and are in memory without having been touched. */
	page_cluster("3");
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
		struct memory m = memory_new(ASKED);
		const char *skipped;

		write_some(&m);
		skipped = scenarios[i].before(&m);
		if (!skipped) {
			out_some(&m);
			skipped = scenarios[i].after(&m);
		}
		if (skipped)
			printf("# %s is skipped: %s\n", scenarios[i].name, skipped);
		else if (scenarios[i].in_child)
			tell_as_child(scenarios[i].name, &m);
		else
			tell(scenarios[i].name, compare(m.fd, m.at));
		if (tracked >= 0)
			close(tracked);
		tracked = -1;
		if (pinned >= 0)
			unpin(pinned);
		pinned = -1;
		memory_drop(&m);
	}
}

int main(int argc, char **argv)
{
	bool cost = argc > 1 && !strcmp(argv[1], "--cost"), accuracy = argc == 2 && !strcmp(argv[1], "--accuracy");
	int repeats = argc == 4 && !strcmp(argv[2], "--repeat") ? atoi(argv[3]) : 3;
	cpu_set_t one;

	if (!(accuracy || (cost && (argc == 2 || argc == 4))) || repeats < 1 || repeats > REPEATS) {
		fprintf(stderr, "usage: %s --cost [--repeat N] | --accuracy\n", argv[0]);
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		die("/proc/self/pagemap");
	/* MADV_PAGEOUT drains the LRU batches of its own processor alone. */
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	sched_setaffinity(0, sizeof(one), &one);
	find_out();
	printf("# kernel: markers %s, exact query %s\n", kernel.marker ? "yes" : "no (stock)",
	       kernel.exact ? "yes" : "no");
	if (cost)
		measure(repeats);
	else
		judge();
	return 0;
}
