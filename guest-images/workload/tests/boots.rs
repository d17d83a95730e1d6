//! Boots the image in stock QEMU and checks what it says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]
#![allow(clippy::expect_used, reason = "as above")]

mod guest;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use guest::{Guest, PATIENCE, has_kvm};
use workload_guest::report::{Bad, State, Touched};
use workload_guest::{Command, Line, Options, pattern};

#[test]
fn works_obeys_and_powers_off() {
    let Some(mut guest) = Guest::boot("working-set=4MiB,cold=8MiB,seed=7", 64, 1) else { return };
    let ready = guest.ready();
    assert_eq!((ready.cpus, ready.seed), (1, 7));
    assert_eq!((ready.working_set.bytes(), ready.cold.bytes()), (4 << 20, 8 << 20));

    let first = guest.report();
    let second = guest.report();
    assert_eq!(second.state, State::Running);
    assert!(second.iterations > first.iterations, "{first:?} {second:?}");
    let all = guest.check();
    assert_eq!((all.pages, all.errors), (3072, 0));

    guest.send(Command::Stop);
    guest.report();
    let stopped = guest.report();
    assert_eq!(stopped.state, State::Stopped);
    assert_eq!(guest.report().iterations, stopped.iterations);

    guest.send(Command::TouchCold(100));
    let touched: Touched = guest.wait(|line| if let Line::Touched(touched) = line { Some(touched) } else { None });
    assert_eq!((touched.pages, touched.errors), (100, 0));

    writeln!(guest.input, "dance").unwrap();
    guest.wait(|line| matches!(line, Line::Error(_)).then_some(()));

    guest.send(Command::Rate(1000));
    guest.send(Command::Writes(100));
    guest.send(Command::Go);
    let (first, mut last) = (guest.report(), guest.report());
    while last.now_us - first.now_us < 2_000_000 {
        last = guest.report();
    }
    let rate = (last.iterations - first.iterations) * 1_000_000 / (last.now_us - first.now_us);
    assert!((500..=1100).contains(&rate), "{rate} operations a second instead of 1000");
    assert_eq!(last.errors, 0);
    guest.send(Command::Off);
    guest.ends();
}

#[test]
fn two_vcpus_share_the_work() {
    let Some(mut guest) = Guest::boot("working-set=4MiB,cold=4MiB,cpus=2,writes=100", 64, 2) else { return };
    assert_eq!(guest.ready().cpus, 2);
    for _ in 0..3 {
        assert_eq!(guest.check().errors, 0);
    }
    guest.send(Command::Stop);
    assert_eq!(guest.check().errors, 0);
    guest.report();
    let iterations = guest.report().iterations;
    assert_eq!(guest.report().iterations, iterations, "one of the vCPUs did not stop");
    guest.send(Command::Off);
    guest.ends();
}

#[test]
fn pages_hold_the_pattern_and_damage_is_told() {
    let options = Options { working_set: 4 << 20, cold: 4 << 20, seed: 3, ..Options::default() };
    let Some(mut guest) = Guest::boot(&options.to_string(), 64, 1) else { return };
    let ready = guest.ready();
    guest.send(Command::Stop);
    assert_eq!(guest.check().errors, 0);

    let cold = ready.cold.page(5).unwrap();
    let key = pattern::key(cold / pattern::PAGE, 3, 0);
    let expected: Vec<u64> = (0..pattern::WORDS).map(|index| pattern::word(key, index)).collect();
    assert_eq!(guest.words(cold), expected);

    let index = 9;
    let page = ready.working_set.page(index).unwrap();
    let mut generation = [0; 4];
    guest.memory().read_exact_at(&mut generation, ready.table[0].start + index * 4).unwrap();
    let key = pattern::key(page / pattern::PAGE, 3, u32::from_le_bytes(generation));
    assert_eq!(guest.words(page)[511], pattern::word(key, 511));

    guest.memory().write_all_at(&(expected[100] ^ 1).to_le_bytes(), cold + 800).unwrap();
    assert_eq!(guest.check().errors, 1);
    // Told with the next report at the latest, which may be before or after the answer: check once more to see it.
    guest.memory().write_all_at(&[0; 4096], page).unwrap();
    guest.send(Command::Check);
    let bad: Bad = guest.wait(|line| match line {
        Line::Bad(bad) if bad.page == page => Some(bad),
        _ => None,
    });
    assert_eq!((bad.word, bad.found), (0, 0));
    assert_eq!(bad.expected, pattern::word(key, 0));
    assert!(guest.report().errors >= 2);
    guest.send(Command::Off);
    guest.ends();
}

#[test]
fn memory_it_was_not_given_stays_untouched() {
    let Some(mut guest) = Guest::boot("working-set=2MiB,cold=2MiB", 128, 1) else { return };
    guest.ready();
    guest.report();
    guest.send(Command::Stop);
    // Table, working set and cold pages lie from 2 to 8 MiB; firmware keeps its tables in the last MiB.
    let memory = guest.memory();
    let mut bytes = vec![0; 1 << 20];
    for mib in 8..127 {
        memory.read_exact_at(&mut bytes, mib << 20).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "something in MiB {mib}");
    }
    guest.send(Command::Off);
    guest.ends();
}

#[test]
fn bad_options_end_the_machine() {
    for (options, part) in [("cpus=7", "1 or 2"), ("cold=1GiB", "do not fit"), ("?", "options are")] {
        let Some(guest) = Guest::boot(options, 64, 1) else { return };
        let message = guest.wait(|line| if let Line::Error(error) = line { Some(error.message) } else { None });
        assert!(message.contains(part), "{message}");
        guest.ends();
    }
}

#[test]
fn reset_and_crash_end_the_machine() {
    for command in [Command::Reset, Command::Crash] {
        let Some(mut guest) = Guest::boot("working-set=1MiB", 64, 1) else { return };
        guest.ready();
        guest.send(command);
        guest.ends();
    }
}

#[test]
fn a_stopped_machine_is_a_stall() {
    const STOPPED: Duration = Duration::from_millis(400);
    // TCG's time-stamp counter stops with the machine.
    if !has_kvm() {
        return;
    }
    for options in ["working-set=1MiB", "working-set=1MiB,rate=100", "working-set=1MiB,cpus=2,rate=1"] {
        let Some(mut guest) = Guest::boot(options, 64, 2) else { return };
        guest.ready();
        guest.report();
        let mut monitor = guest.monitor();
        guest.send(Command::ResetStall);
        writeln!(monitor, "stop").unwrap();
        std::thread::sleep(STOPPED);
        writeln!(monitor, "cont").unwrap();
        // The last report before the stop may still be on its way.
        let seen = (0..20).map(|_| Duration::from_micros(guest.report().longest_stall_us)).max().unwrap();
        assert!(seen > STOPPED * 9 / 10 && seen < STOPPED * 5, "{options}: {seen:?} instead of {STOPPED:?}");
        guest.send(Command::ResetStall);
        guest.report();
        assert!(guest.report().longest_stall_us < seen.as_micros() as u64);
        guest.send(Command::Off);
        guest.ends();
    }
}

#[test]
fn an_exception_is_told_and_ends_the_machine() {
    // TCG keeps what it translated when another process changes the code.
    if !has_kvm() {
        return;
    }
    let Some(guest) = Guest::boot("working-set=1MiB,rate=1", 64, 1) else { return };
    guest.ready();
    guest.report();
    // An invalid opcode in place of the breakpoint by which it sleeps, right after the start of the APIC's timer.
    let memory = guest.memory();
    let mut image = vec![0; 0x1_0000];
    memory.read_exact_at(&mut image, 1 << 20).unwrap();
    let timer = 0xfee0_0380u32.to_le_bytes();
    let mut sleeps = 0;
    for start in (0..image.len() - 32).filter(|start| image[*start..].starts_with(&timer)) {
        if let Some(after) = image[start..start + 32].iter().position(|byte| *byte == 0xcc) {
            memory.write_all_at(&[0x06], (1 << 20) + (start + after) as u64).unwrap();
            sleeps += 1;
        }
    }
    assert!(sleeps > 0, "no sleep in the image");
    let panic = loop {
        match guest.lines.recv_timeout(PATIENCE).expect("a panic line") {
            text if text.contains("panic") => break Line::parse(&text).unwrap(),
            // The line before may have been cut short.
            _ => {}
        }
    };
    assert!(matches!(panic, Line::Panic(panic) if panic.vector == 6 && panic.cpu == 0), "{panic:?}");
    guest.ends();
}
