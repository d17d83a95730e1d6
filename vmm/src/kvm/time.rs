//! Time of a guest: it goes on while its machine is between hosts, never back, and at one rate.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VcpuFd};

use super::registers::{read_msr, write_msrs};
use super::{KvmError, Vm, sys};
use crate::arch::x86_64::msrs::{self, Msr};
use crate::arch::x86_64::state::Time;

/// A blackout longer than this is a clock that is wrong, not a migration.
const LONGEST_BLACKOUT: Duration = Duration::from_secs(3600);

/// How much KVM takes two frequencies for one by, in millionths, where nobody has said otherwise (arch/x86/kvm/x86.c,
/// `tsc_tolerance_ppm`).
const TOLERANCE_PPM: u32 = 250;

/// Wall-clock time, nanoseconds since 1970.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// How long the guest did not run, by the wall clocks of both hosts; `None` where they disagree so that time would go backwards, or by
/// more than an hour.
fn blackout(saved_at_ns: u64, now_ns: u64) -> Option<Duration> {
    let blackout = Duration::from_nanos(now_ns.checked_sub(saved_at_ns)?);
    (blackout <= LONGEST_BLACKOUT).then_some(blackout)
}

/// How far a counter of `khz` goes in `time`.
fn ticks(time: Duration, khz: u32) -> u64 {
    (time.as_nanos() * u128::from(khz) / 1_000_000) as u64
}

/// The offsets that make counters `wanted` of those that say `now` with these offsets, the first one's at the moment at which it was
/// read: all at the same moment.
fn offsets(first_now: u64, first_offset: u64, wanted: &[u64]) -> Vec<u64> {
    let Some(first) = wanted.first() else { return Vec::new() };
    let moved = first_offset.wrapping_add(first.wrapping_sub(first_now));
    wanted.iter().map(|tsc| moved.wrapping_add(tsc.wrapping_sub(*first))).collect()
}

/// Reads the clocks of a machine whose vCPUs, which are paused, have the files `fds`.
///
/// # Errors
/// When KVM refuses.
pub(super) fn save(vm: &Vm, fds: &[&VcpuFd], khz: u32) -> Result<Time, KvmError> {
    let clock = vm.fd().get_clock().map_err(KvmError::call("KVM_GET_CLOCK"))?;
    let realtime_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 { clock.realtime } else { now_ns() };
    Ok(Time { clock_ns: clock.clock, realtime_ns, tscs: counters(fds, khz)? })
}

/// The time stamp counters at one moment: by their offsets from one another where KVM tells them, by the time between reading the first
/// and each other one where it does not.
fn counters(fds: &[&VcpuFd], khz: u32) -> Result<Vec<u64>, KvmError> {
    let Some(first_fd) = fds.first() else { return Ok(Vec::new()) };
    let read_at = Instant::now();
    let first = read_msr(first_fd, msrs::TSC)?;
    let first_offset = sys::tsc_offset(first_fd);
    let counter = |fd: &&VcpuFd| match (first_offset, sys::tsc_offset(fd)) {
        (Some(first_offset), Some(offset)) => Ok(first.wrapping_add(offset.wrapping_sub(first_offset))),
        _ => Ok(read_msr(fd, msrs::TSC)?.wrapping_sub(ticks(read_at.elapsed(), khz))),
    };
    fds.iter().enumerate().map(|(index, fd)| if index == 0 { Ok(first) } else { counter(fd) }).collect()
}

/// Has the clocks of a machine, whose vCPUs are paused, go on from what they said, as if the guest had been there meanwhile: kvmclock and
/// the time stamp counters by the same time.
///
/// # Errors
/// When KVM refuses.
pub(super) fn restore(vm: &Vm, fds: &[&VcpuFd], khz: u32, time: &Time) -> Result<(), KvmError> {
    set_clock(vm, time)?;
    // What KVM has made of it is what the counters follow: as far as kvmclock has come.
    let clock = vm.fd().get_clock().map_err(KvmError::call("KVM_GET_CLOCK"))?.clock;
    let Some(first) = fds.first() else { return Ok(()) };
    let (first_now, first_offset) = (read_msr(first, msrs::TSC)?, sys::tsc_offset(first));
    let since = Duration::from_nanos(clock.saturating_sub(time.clock_ns)).min(LONGEST_BLACKOUT);
    let wanted: Vec<_> = time.tscs.iter().map(|tsc| tsc.wrapping_add(ticks(since, khz))).collect();
    let Some(first_offset) = first_offset else { return write_counters(fds, &wanted) };
    for (fd, offset) in fds.iter().zip(offsets(first_now, first_offset, &wanted)) {
        sys::set_tsc_offset(fd, offset).map_err(KvmError::call("KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET"))?;
    }
    Ok(())
}

/// Without offsets: KVM takes counters that are written within a second of one another, and differ by less, for one
/// (arch/x86/kvm/x86.c, `kvm_synchronize_tsc`).
fn write_counters(fds: &[&VcpuFd], wanted: &[u64]) -> Result<(), KvmError> {
    let mut written = fds.iter().zip(wanted);
    written.try_for_each(|(fd, value)| write_msrs(fd, &[Msr { index: msrs::TSC, value: *value }]))
}

fn set_clock(vm: &Vm, time: &Time) -> Result<(), KvmError> {
    let gone = blackout(time.realtime_ns, now_ns());
    if gone.is_none() {
        tracing::warn!(
            "the clocks of the two hosts disagree by more than an hour, or this one is behind: the guest's clocks go on from where they \
             were; set the hosts' clocks (chrony, ntpd)"
        );
    }
    let can_adjust = vm.kvm().check_extension_int(Cap::AdjustClock).max(0) as u32 & KVM_CLOCK_REALTIME != 0;
    let clock = match gone {
        // KVM adds what has gone by until it sets the clock.
        Some(_) if can_adjust => kvm_clock_data {
            clock: time.clock_ns,
            realtime: time.realtime_ns,
            flags: KVM_CLOCK_REALTIME,
            ..Default::default()
        },
        gone => {
            let clock = time.clock_ns.saturating_add(gone.unwrap_or_default().as_nanos() as u64);
            kvm_clock_data { clock, ..Default::default() }
        }
    };
    vm.fd().set_clock(&clock).map_err(KvmError::call("KVM_SET_CLOCK"))
}

/// Gives all vCPUs the first one's counter, as a reset does, which their guest may have set apart.
///
/// # Errors
/// When KVM refuses.
pub(super) fn align(fds: &[&VcpuFd]) -> Result<(), KvmError> {
    let Some(offset) = fds.first().and_then(|fd| sys::tsc_offset(fd)) else { return Ok(()) };
    let refused = KvmError::call("KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET");
    fds.iter().try_for_each(|fd| sys::set_tsc_offset(fd, offset)).map_err(refused)
}

/// Has a vCPU's time stamp counter run at `wanted` kHz, or as the host's does; gives the frequency.
///
/// # Errors
/// When this host's counter runs at another frequency and its KVM cannot scale it.
pub(super) fn set_frequency(vm: &Vm, fd: &VcpuFd, wanted: Option<u32>) -> Result<u32, KvmError> {
    let host = fd.get_tsc_khz().map_err(KvmError::call("KVM_GET_TSC_KHZ"))?;
    let Some(guest) = wanted.filter(|guest| *guest != host) else { return Ok(host) };
    let scales = vm.kvm().check_extension(Cap::TscControl);
    let is_possible = scales || is_near(guest, host, tolerance_ppm());
    // Asked for a faster one that it cannot make, KVM says yes, and moves the counter on at each entry (`set_tsc_khz`): between two of them
    // it runs too slowly.
    if is_possible && fd.set_tsc_khz(guest).is_ok() && fd.get_tsc_khz() == Ok(guest) {
        return Ok(guest);
    }
    Err(KvmError::TscFrequency { guest, host })
}

/// Whether KVM takes these two frequencies for one, as measurements of the same processor differ.
fn is_near(guest: u32, host: u32, tolerance_ppm: u32) -> bool {
    u64::from(guest.abs_diff(host)) * 1_000_000 <= u64::from(host) * u64::from(tolerance_ppm)
}

fn tolerance_ppm() -> u32 {
    let text = std::fs::read_to_string("/sys/module/kvm/parameters/tsc_tolerance_ppm");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(TOLERANCE_PPM)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{convert, supported_cpuid};
    use super::*;
    use crate::arch::x86_64::cpuid;
    use crate::ram::GuestRam;

    #[test]
    fn time_goes_on_and_never_back() {
        assert_eq!(blackout(500, 1_000_500), Some(Duration::from_millis(1)));
        assert_eq!(blackout(500, 400), None);
        assert_eq!(blackout(0, u64::MAX), None);
        assert_eq!(blackout(0, 3_600_000_000_000), Some(LONGEST_BLACKOUT));
        assert_eq!(ticks(Duration::from_millis(1), 2_000_000), 2_000_000);
        assert_eq!(ticks(LONGEST_BLACKOUT, u32::MAX), 3600 * 1000 * u64::from(u32::MAX));
    }

    #[test]
    fn all_counters_are_moved_by_one_offset() {
        // The guest has set the third one apart.
        assert_eq!(offsets(1_000, 50, &[5_000, 5_000, 4_000]), [4_050, 4_050, 3_050]);
        // Backwards, as between hosts that have been on for different times.
        assert_eq!(offsets(9_000, 0, &[5_000, 5_001]), [4_000_u64.wrapping_neg(), 3_999_u64.wrapping_neg()]);
        assert_eq!(offsets(1, 2, &[]), [0; 0]);
    }

    #[test]
    fn frequencies_are_near_as_kvm_says() {
        assert!(is_near(2_000_500, 2_000_000, 250) && is_near(1_999_500, 2_000_000, 250));
        assert!(!is_near(2_000_501, 2_000_000, 250) && !is_near(1_999_499, 2_000_000, 250));
        assert!(!is_near(1, 0, 250) && is_near(0, 0, 0) && !is_near(u32::MAX, 1, u32::MAX - 1));
    }

    fn machine(vcpus: u8) -> Option<(Vm, Vec<VcpuFd>)> {
        let vm = Vm::new(Arc::new(GuestRam::new(16 << 20).unwrap()));
        let vm = vm.inspect_err(|e| command_line::note(format_args!("not run: {e}"))).ok()?;
        let told = supported_cpuid(vm.kvm()).unwrap();
        let vcpu = |index| {
            let fd = vm.fd().create_vcpu(u64::from(index)).unwrap();
            fd.set_cpuid2(&convert::cpuid_to_kvm(&cpuid::for_vcpu(&told, index, vcpus)).unwrap()).unwrap();
            fd
        };
        let fds = (0..vcpus).map(vcpu).collect();
        Some((vm, fds))
    }

    fn all(fds: &[VcpuFd]) -> Vec<&VcpuFd> {
        fds.iter().collect()
    }

    #[test]
    fn clocks_go_on_in_another_machine() {
        let Some((vm, fds)) = machine(2) else { return };
        let khz = fds[0].get_tsc_khz().unwrap();
        let saved = save(&vm, &all(&fds), khz).unwrap();
        assert_eq!(saved.tscs.len(), 2);
        let (other, other_fds) = machine(2).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        restore(&other, &all(&other_fds), khz, &saved).unwrap();
        let now = save(&other, &all(&other_fds), khz).unwrap();
        let gone = now.clock_ns.checked_sub(saved.clock_ns).expect("kvmclock goes back");
        assert!((20_000_000..20_000_000_000).contains(&gone), "{gone} ns");
        for (then, now) in saved.tscs.iter().zip(&now.tscs) {
            let gone_by_tsc =
                now.checked_sub(*then).expect("a counter goes back") as u128 * 1_000_000 / u128::from(khz);
            // Between reading one and the other there is whatever the scheduler does.
            assert!(
                gone_by_tsc.abs_diff(u128::from(gone)) < 1_000_000_000,
                "{gone_by_tsc} ns by the counter, {gone} ns by kvmclock"
            );
        }
        assert_eq!(sys::tsc_offset(&other_fds[0]), sys::tsc_offset(&other_fds[1]));
    }

    #[test]
    fn a_clock_that_is_wrong_moves_no_time() {
        let Some((vm, fds)) = machine(1) else { return };
        let khz = fds[0].get_tsc_khz().unwrap();
        let fds = all(&fds);
        let future = Time { clock_ns: 1 << 40, realtime_ns: u64::MAX, tscs: vec![1 << 50] };
        restore(&vm, &fds, khz, &future).unwrap();
        let past = Time { realtime_ns: 0, ..future };
        restore(&vm, &fds, khz, &past).unwrap();
        let clock = vm.fd().get_clock().unwrap().clock;
        assert!((1 << 40..(1 << 40) + 60_000_000_000).contains(&clock), "{clock}");
        let last = Time { clock_ns: u64::MAX, realtime_ns: now_ns(), tscs: vec![u64::MAX] };
        // Nothing that state may say is more than KVM can refuse.
        let _ = restore(&vm, &fds, khz, &last);
    }

    #[test]
    fn another_frequency_is_refused_where_it_cannot_be_made() {
        let Some((vm, fds)) = machine(1) else { return };
        let host = fds[0].get_tsc_khz().unwrap();
        assert_eq!(set_frequency(&vm, &fds[0], None).unwrap(), host);
        assert_eq!(set_frequency(&vm, &fds[0], Some(host + 1)).unwrap(), host + 1, "as near as two measurements");
        fds[0].set_tsc_khz(host).unwrap();
        if !vm.kvm().check_extension(Cap::TscControl) {
            for guest in [host / 2, host + host / 2] {
                let refused = set_frequency(&vm, &fds[0], Some(guest)).unwrap_err().to_string();
                assert!(refused.contains(&format!("{guest} kHz")), "{refused}");
            }
        }
    }
}
