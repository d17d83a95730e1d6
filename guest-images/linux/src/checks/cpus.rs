//! Processors: how many there are, whether each has a timer that fires, and what tells the time.

use std::time::Duration;

use super::text_of;
use crate::Outcome;

/// Each processor's timer fires once in this time at least, however idle it is.
const TIMER_TIMEOUT: Duration = Duration::from_secs(4);

/// Needs no argument.
pub(super) fn check(_: &str) -> Outcome {
    let online = text_of("/sys/devices/system/cpu/online")?;
    let count = std::thread::available_parallelism().map_err(|e| e.to_string())?.get();
    let before = timer_interrupts(&text_of("/proc/interrupts")?)?;
    if before.len() != count {
        return Err(format!("{} processors have timers, {count} are online", before.len()));
    }
    std::thread::sleep(TIMER_TIMEOUT);
    let after = timer_interrupts(&text_of("/proc/interrupts")?)?;
    if let Some(cpu) = (0..count).find(|&cpu| after[cpu] == 0 || (cpu == 0 && after[cpu] == before[cpu])) {
        return Err(format!("the timer of processor {cpu} does not fire: {before:?} then {after:?} interrupts"));
    }
    let clock = text_of("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let uptime = text_of("/proc/uptime")?;
    let uptime = uptime.split_whitespace().next().unwrap_or_default();
    Ok(format!("count={count} online={online} clock={clock} uptime={uptime}"))
}

/// Of each processor, out of `/proc/interrupts`: ` LOC:  12  34   Local timer interrupts`.
fn timer_interrupts(table: &str) -> Result<Vec<u64>, String> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix("LOC:"));
    let line = line.ok_or("/proc/interrupts has no local timers")?;
    Ok(line.split_whitespace().map_while(|word| word.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read() {
        let table =
            "            CPU0       CPU1\n  4:  7 0 IO-APIC 4-edge ttyS0\nLOC:   1234   0   Local timer interrupts\n";
        assert_eq!(timer_interrupts(table).unwrap(), [1234, 0]);
        assert!(timer_interrupts("").is_err());
    }
}
