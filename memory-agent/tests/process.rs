//! Another process's memory: asked about, paged out, scanned and guarded from here, while that process goes on, changes
//! its mappings, executes another program or ends.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use memory_agent::{
    Agent, AgentOptions, ContentHash, Counts, FilePage, FileView, HintProbe, Marker, PAGE_SIZE, PageCache, PageNumber,
    PageOutError, PageState, Probe, ProbeError, Process, ProcessMemory, Residency, ResidencyGuard, ScanProgress,
    SparseDump, Target, TargetError, ZeroFinder, counts_of, page_out, scan,
};
use support::{Memory, with_swap};

const NAME: &str = "memory-agent-other-process";
const PAGES: u64 = 4096;

/// What the other process is: this very program, told so by its environment.
#[test]
fn the_other_process() {
    if std::env::var_os("MEMORY_AGENT_OTHER").is_none() {
        return;
    }
    let memory = Memory::new(NAME, PAGES);
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<u64>().unwrap();
        match words[0] {
            "write" => (number(1)..number(2)).for_each(|page| memory.write(page, number(3))),
            "touch" => (number(1)..number(2)).for_each(|page| assert!(memory.holds(page, number(3)), "page {page}")),
            "move" => memory.move_elsewhere(),
            "map" => (0..number(1)).for_each(|_| std::mem::forget(Memory::new("memory-agent-another", 1))),
            "exec" => {
                let error = std::os::unix::process::CommandExt::exec(Command::new("sleep").arg("600"));
                panic!("{error}");
            }
            other => panic!("{other}?"),
        }
        println!("done");
    }
    // Not by the test harness, which would print.
    std::process::exit(0);
}

/// The other process, ended with this.
struct Other {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start() -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_other_process", "--nocapture"]).env("MEMORY_AGENT_OTHER", "yes");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut other = Self { child, input, output };
        other.wait_for("ready");
        other
    }

    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        // The harness's own words end without a line.
        while !line.trim_end().ends_with(word) {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the other process has ended");
        }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.input.as_ref().unwrap(), "{command}").unwrap();
        if command != "exec" {
            self.wait_for("done");
        }
    }

    fn end(&mut self) {
        self.input = None;
        self.child.wait().unwrap();
    }

    fn memory(&self) -> ProcessMemory {
        let process = Process::open(self.child.id()).unwrap();
        let mut memories = process.shared_memory(NAME).unwrap().memories;
        assert_eq!(memories.len(), 1);
        memories.remove(0)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Three quarters of the other process's memory is written, and half of that paged out.
fn half_cold() -> (Other, ProcessMemory) {
    let mut other = Other::start();
    other.tell(&format!("write 0 {} 7", PAGES / 4 * 3));
    let memory = other.memory();
    let report = page_out(&memory, &[0..PAGES / 2]).unwrap();
    assert_eq!((report.asked, report.left), (PAGES / 2, 0), "{report:?}");
    (other, memory)
}

const HALF_COLD: Counts = Counts { hole: PAGES / 4, resident: PAGES / 4, swapped: PAGES / 2 };

fn residency(memory: &ProcessMemory) -> Residency {
    PageCache.residency(memory, 0..PAGES).unwrap()
}

fn changed(before: &Residency, after: &Residency) -> u64 {
    before.ranges_where(after, |a, b| a != b).map(|range| range.end - range.start).sum()
}

#[test]
fn what_another_process_has_is_seen_and_paged_out() {
    with_swap("what_another_process_has_is_seen_and_paged_out", || {
        let (mut other, memory) = half_cold();
        assert!(memory.name().contains(NAME) && memory.file_offset() == 0);
        assert_eq!(residency(&memory).counts(), HALF_COLD);
        // Asking maps nothing and brings in nothing.
        assert_eq!(counts_of(&memory.mapping()).unwrap(), HALF_COLD);
        let view = FileView::of_process(other.child.id(), NAME).unwrap();
        assert_eq!(PageCache.residency(&view.mapping(), 0..PAGES).unwrap(), residency(&memory));
        // Its page tables are its own.
        let entries = Marker.hint(&memory, 0..PAGES).unwrap();
        assert_eq!(entries.counts().resident, PAGES / 4);
        other.tell("touch 10 20 7");
        assert!((10..20).all(|page| residency(&memory).get(page) == Some(PageState::Resident)));
        // Brought in by another way and not mapped there: it is mapped first, and goes.
        let mut page = vec![0; PAGE_SIZE as usize];
        memory.file().read(&FilePage(100).run(1), &mut page).unwrap();
        assert_eq!(residency(&memory).get(100), Some(PageState::Resident));
        let report = page_out(&memory, &[0..PAGES / 2]).unwrap();
        assert!(report.asked >= 11 && report.left == 0, "{report:?}");
        other.tell(&format!("touch 0 {} 7", PAGES / 4 * 3));
    });
}

#[test]
fn a_scan_leaves_another_process_as_it_was() {
    with_swap("a_scan_leaves_another_process_as_it_was", || {
        const WINDOW: u64 = 512;
        let (mut other, memory) = half_cold();
        let before = residency(&memory);
        let go_on = &mut |_: ScanProgress| ControlFlow::Continue(());
        let mut most = 0;
        let mut hash = ContentHash::default();
        let view = memory.file();
        let report = scan(&view, FilePage(0).run(PAGES), WINDOW, &mut hash, &mut |_| {
            most = most.max(counts_of(&memory.mapping()).unwrap().resident);
            ControlFlow::Continue(())
        });
        let report = report.unwrap();
        assert_eq!((report.pages, report.complete), (HALF_COLD, true));
        assert!(report.restored.left * 100 <= report.restored.asked, "{report:?}");
        assert!(most <= HALF_COLD.resident + WINDOW + WINDOW / 100, "{most} pages at a time");
        let after = residency(&memory);
        assert!(changed(&before, &after) * 100 <= PAGES, "{before:?} became {after:?}");

        let file = tempfile::NamedTempFile::new().unwrap();
        let mut dump = SparseDump::new(file.reopen().unwrap(), &FilePage(0).run(PAGES)).unwrap();
        scan(&view, FilePage(0).run(PAGES), WINDOW, &mut dump, go_on).unwrap();
        assert_eq!(dump.written(), PAGES / 4 * 3);
        assert_eq!(blake3::hash(&std::fs::read(file.path()).unwrap()).to_hex().to_string(), hash.hex());
        let mut zeros = ZeroFinder::default();
        other.tell("write 5 9 0");
        scan(&view, FilePage(0).run(PAGES), WINDOW, &mut zeros, go_on).unwrap();
        assert_eq!(zeros.ranges(), [FilePage(5).run(4)]);

        // Ended early, it has paged out again what it swapped in.
        let before = residency(&memory);
        let mut batches = 0;
        let report = scan(&view, FilePage(0).run(PAGES), WINDOW, &mut ContentHash::default(), &mut |_| {
            batches += 1;
            if batches == 11 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let report = report.unwrap();
        assert!(!report.complete && (1..=11 * 64).contains(&report.pages.total()), "{report:?}");
        assert!(changed(&before, &residency(&memory)) * 100 <= PAGES);
    });
}

#[test]
fn what_the_owner_touches_during_a_scan_stays() {
    with_swap("what_the_owner_touches_during_a_scan_stays", || {
        let (mut other, memory) = half_cold();
        let mut told = false;
        let report = scan(&memory.file(), FilePage(0).run(PAGES), 512, &mut ContentHash::default(), &mut |progress| {
            if !told && progress.done >= 256 {
                told = true;
                other.tell("write 100 116 8");
            }
            ControlFlow::Continue(())
        });
        report.unwrap();
        let after = residency(&memory);
        assert_eq!(after.counts_in(100..116).resident, 16, "{after:?}");
        assert!(after.counts_in(0..PAGES / 2).resident <= 16 + 32, "{after:?}");
    });
}

#[test]
fn a_guard_restores_what_readers_swap_in() {
    with_swap("a_guard_restores_what_readers_swap_in", || {
        const WINDOW: u64 = 512;
        for by_the_process_itself in [true, false] {
            let (mut other, memory) = half_cold();
            let before = residency(&memory);
            let mut guard = ResidencyGuard::new(&memory, WINDOW).unwrap();
            let mut page = vec![0; PAGE_SIZE as usize];
            let mut most = 0;
            // A reader of everything, at the pace of a migration: holes are allocated too when they are read through a mapping.
            for first in (0..PAGES).step_by(128) {
                if by_the_process_itself {
                    let stamp = if first < PAGES / 4 * 3 { 7 } else { 0 };
                    other.tell(&format!("touch {first} {} {stamp}", first + 128));
                } else {
                    (first..first + 128).for_each(|n| memory.file().read(&FilePage(n).run(1), &mut page).unwrap());
                }
                most = most.max(counts_of(&memory.mapping()).unwrap().resident);
                guard.step().unwrap();
            }
            let report = guard.finish().unwrap();
            let after = residency(&memory);
            assert_eq!(report.snapshot, HALF_COLD);
            assert!(most <= HALF_COLD.resident + WINDOW + WINDOW / 10, "{most} pages at a time");
            assert!(changed(&before, &after) * 100 <= PAGES, "{report:?}: {before:?} became {after:?}");
            assert!(report.restored >= PAGES / 2 && report.excess * 100 <= PAGES, "{report:?}");
        }
    });
}

#[test]
fn a_guard_leaves_what_comes_again() {
    with_swap("a_guard_leaves_what_comes_again", || {
        let (mut other, memory) = half_cold();
        let mut guard = ResidencyGuard::new(&memory, 512).unwrap();
        // Read once by somebody, and then worked with.
        other.tell("touch 64 128 7");
        guard.step().unwrap();
        let report = guard.step().unwrap();
        assert_eq!((report.restored, residency(&memory).counts_in(64..128).swapped), (64, 64), "{report:?}");
        other.tell("write 64 128 9");
        for _ in 0..4 {
            guard.step().unwrap();
        }
        let report = guard.finish().unwrap();
        assert_eq!(residency(&memory).counts_in(64..128).resident, 64, "{report:?}");
        assert_eq!((report.restored, report.refaulted), (64, 64), "{report:?}");
    });
}

#[test]
fn a_guard_can_make_memory_like_another() {
    with_swap("a_guard_can_make_memory_like_another", || {
        let mut other = Other::start();
        let memory = other.memory();
        let mut map = Residency::uniform(PAGES, PageState::Hole);
        map.set(0..1000, PageState::Swapped);
        map.set(1000..1500, PageState::Resident);
        assert!(ResidencyGuard::like(&memory, 512, Residency::uniform(7, PageState::Hole)).is_err());
        let mut guard = ResidencyGuard::like(&memory, 512, map.clone()).unwrap();
        for first in (0..1500).step_by(100) {
            other.tell(&format!("write {first} {} 3", first + 100));
            guard.step().unwrap();
        }
        guard.finish().unwrap();
        let after = residency(&memory);
        assert!(changed(&map, &after) * 100 <= PAGES, "{after:?}");
    });
}

#[test]
fn an_agent_keeps_a_map_and_restores_what_readers_swap_in() {
    with_swap("an_agent_keeps_a_map_and_restores_what_readers_swap_in", || {
        let (mut other, memory) = half_cold();
        let options = AgentOptions { budget: 50.0, interval: Duration::from_millis(20), ..AgentOptions::default() };
        let agent = Agent::new(options).unwrap();
        let wait = |rounds: u64| {
            let rounds = agent.cost().rounds + rounds;
            assert!(agent.wait_for_rounds(rounds, Duration::from_secs(20)), "{:?}", agent.cost());
        };
        std::thread::scope(|scope| {
            // What fails below must not leave the agent at work.
            struct Stop<'a>(&'a Agent);
            impl Drop for Stop<'_> {
                fn drop(&mut self) {
                    self.0.stop();
                }
            }
            let _stop = Stop(&agent);
            let (tell, thread) = std::sync::mpsc::channel();
            let watching = scope.spawn({
                let (agent, memory) = (&agent, &memory);
                move || {
                    tell.send(rustix::thread::gettid().as_raw_pid()).unwrap();
                    agent.watch(&[memory])
                }
            });
            assert!(agent.wait_for_rounds(1, Duration::from_secs(20)));
            assert_eq!(agent.map().unwrap().maps, [residency(&memory)]);
            // By its owner: it stays.
            other.tell("touch 0 32 7");
            wait(3);
            assert_eq!(agent.map().unwrap().maps[0].counts_in(0..32).resident, 32);
            // By somebody else: it is paged out again.
            let mut pages = vec![0; 512 * PAGE_SIZE as usize];
            memory.file().read(&FilePage(512).run(512), &mut pages).unwrap();
            let swapped_in = residency(&memory).counts_in(512..1024).resident;
            wait(4);
            let after = residency(&memory);
            assert_eq!(after.counts_in(512..1024).swapped, 512, "{swapped_in} were swapped in: {:?}", agent.cost());
            assert_eq!(after.counts_in(0..32).resident, 32);
            // Aside it does nothing.
            let aside = agent.suspend();
            let before = agent.cost().pages;
            std::thread::sleep(Duration::from_millis(100));
            assert!(agent.cost().pages <= before + PAGES / 4);
            drop(aside);
            // However short somebody's hurry was, afterwards it runs again when nobody else does.
            for _ in 0..2000 {
                drop(agent.suspend());
                std::thread::sleep(Duration::from_micros(50));
            }
            wait(2);
            let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", thread.recv().unwrap())).unwrap();
            // Field 41 of proc(5); what stands behind the name begins with field 3.
            let policy = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(41 - 3).unwrap();
            assert_eq!(policy, "5", "SCHED_IDLE");
            let cost = agent.cost();
            assert!(cost.percent() <= 60.0, "{cost:?}");
            other.end();
            let error = watching.join().unwrap().unwrap_err();
            assert!(error.to_string().contains("has ended"), "{error}");
        });
    });
}

/// Whatever is asked of the memory of a process that is gone, or has other memory there by now.
fn all_fail(memory: &ProcessMemory, expected: fn(&TargetError) -> bool) {
    let check = |what: &str, error: &TargetError| assert!(expected(error), "{what}: {error}");
    check("check", &memory.check().unwrap_err());
    match PageCache.residency(memory, 0..PAGES) {
        Err(ProbeError::Target(e)) => check("residency", &e),
        other => panic!("{other:?}"),
    }
    match Marker.hint(memory, 0..PAGES) {
        Err(ProbeError::Target(e)) => check("hint", &e),
        other => panic!("{other:?}"),
    }
    check("advise", &memory.advise_page_out(&[0..16]).unwrap_err());
    check("map", &memory.map_pages(&(0..16)).unwrap_err());
    match page_out(memory, &[0..PAGES]) {
        Err(PageOutError::Target(e)) => check("page out", &e),
        // Nothing of it was in memory, which needs nobody to be asked.
        Ok(report) => assert_eq!(report.asked, 0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_process_that_ends_is_an_error() {
    let mut other = Other::start();
    other.tell("write 0 64 1");
    let memory = other.memory();
    let pid = other.child.id();
    assert_eq!(residency(&memory).counts().resident, 64);
    other.end();
    all_fail(&memory, |e| matches!(e, TargetError::Exited(_)));
    assert!(matches!(Process::open(pid), Err(TargetError::NoProcess(_))));
    assert!(matches!(Process::open(0), Err(TargetError::NoProcess(0))));
    assert!(matches!(Process::open(u32::MAX), Err(TargetError::NoProcess(_))));
}

#[test]
fn a_process_that_has_ended_but_is_not_buried_is_an_error_too() {
    let mut other = Other::start();
    other.tell("write 0 64 1");
    let memory = other.memory();
    other.child.kill().unwrap();
    // Not waited for: it is a zombie, whose folder in /proc is still there.
    while !memory.process().has_ended() {
        std::thread::sleep(Duration::from_millis(1));
    }
    all_fail(&memory, |e| matches!(e, TargetError::Exited(_)));
    assert!(matches!(Process::open(other.child.id()), Err(TargetError::Exited(_))));
}

#[test]
fn a_process_that_is_ending_is_not_taken_for_one_that_has_changed_its_mappings() {
    for _ in 0..20 {
        let mut other = Other::start();
        // So many that the kernel lists them in pieces, the memory in the last of them.
        other.tell("map 900");
        let memory = other.memory();
        let error = std::thread::scope(|scope| {
            let checking = scope.spawn(|| {
                loop {
                    if let Err(e) = memory.check() {
                        return e;
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(5));
            other.child.kill().unwrap();
            checking.join().unwrap()
        });
        assert!(matches!(error, TargetError::Exited(_)), "{error}");
    }
}

#[test]
fn a_process_that_maps_something_else_there_is_an_error() {
    let mut other = Other::start();
    other.tell("write 0 64 1");
    let memory = other.memory();
    other.tell("move");
    all_fail(&memory, |e| matches!(e, TargetError::Remapped { .. }));
    // Looked for again, it is found where it is now.
    let again = other.memory();
    assert_ne!(again.address(), memory.address());
    assert_eq!(residency(&again).counts().resident, 64);

    other.tell("exec");
    let start = std::time::Instant::now();
    while again.check().is_ok() {
        assert!(start.elapsed() < Duration::from_secs(10), "it has not executed anything");
        std::thread::sleep(Duration::from_millis(1));
    }
    all_fail(&again, |e| matches!(e, TargetError::Remapped { .. }));
    let process = Process::open(other.child.id()).unwrap();
    assert!(matches!(process.shared_memory(NAME), Err(TargetError::NotFound { .. })));
}

#[test]
fn every_piece_of_a_file_is_found_once() {
    let memory = Memory::new("memory-agent-own-pieces", 64);
    (0..64).for_each(|page| memory.write(page, page));
    // A second mapping, for reading: the one that writes is what the process works with.
    let view = FileView::new(memory.file.try_clone().unwrap(), 64 * PAGE_SIZE).unwrap();
    let process = Process::open(std::process::id()).unwrap();
    let found = process.shared_memory("memory-agent-own-pieces").unwrap().memories;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].address() as usize, memory.mapping().address_of(0).unwrap());
    assert_eq!(PageCache.residency(&found[0], 0..64).unwrap(), memory.truth());
    assert_eq!(Arc::strong_count(&process), 2);
    drop(view);
}
