//! Whether KVM is there, and what it can do.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLOCK_REALTIME,
    KVM_DIRTY_LOG_INITIALLY_SET,
};
use kvm_ioctls::{Cap, Kvm};

use super::{Area, Findings, State, paravirtual};
use crate::config::MAX_CPUS;
use crate::host::text;
use crate::kvm::Vm;
use crate::ram::GuestRam;

const DEVICE: &str = "/dev/kvm";

/// What KVM needs to run a guest as this program does.
const TO_RUN: [(Cap, &str); 5] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "irqchip"),
    (Cap::Pit2, "PIT2"),
    (Cap::Irqfd, "irqfd"),
    (Cap::ImmediateExit, "immediate exit"),
];
/// What it needs to save and restore one.
const TO_MIGRATE: [(Cap, &str); 7] = [
    (Cap::MpState, "MP state"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::PitState2, "PIT state"),
    (Cap::AdjustClock, "clock"),
];

fn back_end(cpu_flags: &str) -> Option<BackEnd> {
    BackEnd::of(|module| Path::new("/sys/module").join(module).exists(), cpu_flags)
}

pub(super) fn emulates_ring_0() -> bool {
    let cpu = text::read("/proc/cpuinfo").unwrap_or_default();
    back_end(text::field(&cpu, "flags").unwrap_or_default()) == Some(BackEnd::Pvm)
}

pub(super) fn examine(found: &mut Findings) {
    let cpu = text::read("/proc/cpuinfo").unwrap_or_default();
    let flags = text::field(&cpu, "flags").unwrap_or_default();
    let back_end = back_end(flags);
    match Kvm::new() {
        Ok(kvm) => {
            let version = kvm.get_api_version();
            let state = State::ok_or(u32::try_from(version) == Ok(KVM_API_VERSION), State::Missing);
            let what = if state == State::Ok { "can be used" } else { "this program speaks version 12 only" };
            found.add(Area::Kvm, DEVICE, state, format_args!("API version {version}"), what);
            nature(found, back_end, flags);
            machine(found);
            capabilities(found, &kvm);
            paravirtual::examine(found, &kvm);
        }
        Err(e) => {
            let (value, consequence) = why_not(&io::Error::from_raw_os_error(e.errno()), back_end, flags);
            found.add(Area::Kvm, DEVICE, State::Missing, value, consequence);
        }
    }
}

/// What KVM makes virtual CPUs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BackEnd {
    Vmx,
    Svm,
    Pvm,
}

impl BackEnd {
    /// By the modules there are, loaded or built in. A kernel can have several built in; then the processor's flags
    /// decide which of them is at work.
    fn of(module: impl Fn(&str) -> bool, cpu_flags: &str) -> Option<Self> {
        let backs = [("kvm_intel", "vmx", Self::Vmx), ("kvm_amd", "svm", Self::Svm)];
        let able = backs.iter().find(|(name, flag, _)| module(name) && text::has_word(cpu_flags, flag));
        let pvm = || module("kvm_pvm").then_some(Self::Pvm);
        let any = || backs.iter().find(|(name, ..)| module(name)).map(|(.., back)| *back);
        able.map(|(.., back)| *back).or_else(pvm).or_else(any)
    }
}

fn nature(found: &mut Findings, back_end: Option<BackEnd>, cpu_flags: &str) {
    let nested = text::has_word(cpu_flags, "hypervisor");
    let place = if nested { "nested" } else { "on bare metal" };
    let (state, name, consequence) = match back_end {
        Some(BackEnd::Pvm) => (
            State::Limited,
            "pvm",
            "ring 3 of a guest runs natively, ring 0 is emulated: the embedded workload is quick, a stock Linux is not",
        ),
        Some(BackEnd::Vmx) if nested => {
            (State::Ok, "vmx", "guests run natively; leaving a guest costs more than on bare metal")
        }
        Some(BackEnd::Svm) if nested => {
            (State::Ok, "svm", "guests run natively; leaving a guest costs more than on bare metal")
        }
        Some(BackEnd::Vmx) => (State::Ok, "vmx", "guests run natively"),
        Some(BackEnd::Svm) => (State::Ok, "svm", "guests run natively"),
        None => (State::Limited, "unknown", "not tried by anybody: how fast guests run is to be seen"),
    };
    found.add(Area::Kvm, "back-end", state, format_args!("{name}, {place}"), consequence);
}

/// Makes a machine the way `run` does, and gives it back.
fn machine(found: &mut Findings) {
    const RAM: u64 = 2 << 20;
    let made = GuestRam::new(RAM).map_err(|e| e.to_string()).and_then(|ram| {
        let vm = Vm::new(Arc::new(ram)).map_err(|e| e.to_string())?;
        vm.fd().create_vcpu(0).map_err(|e| format!("KVM refused KVM_CREATE_VCPU: {e}"))?;
        vm.start_dirty_log().and_then(|()| vm.take_dirty_log()).map_err(|e| e.to_string())
    });
    match made {
        Ok(_) => found.add(Area::Kvm, "trial", State::Ok, "machine made", "with RAM, irqchip, PIT, vCPU and dirty log"),
        Err(e) => found.add(Area::Kvm, "trial", State::Missing, "no machine can be made", e),
    }
}

fn capabilities(found: &mut Findings, kvm: &Kvm) {
    let has = |cap| kvm.check_extension(cap);
    let mut all = |name: &str, wanted: &[(Cap, &str)], with: &str, without: &str| {
        let lacks: Vec<_> = wanted.iter().filter(|(cap, _)| !has(*cap)).map(|(_, name)| *name).collect();
        if lacks.is_empty() {
            let names: Vec<_> = wanted.iter().map(|(_, name)| *name).collect();
            found.add(Area::Kvm, name, State::Ok, "all there", format_args!("{with}: {}", names.join(", ")));
        } else {
            found.add(Area::Kvm, name, State::Missing, format_args!("without {}", lacks.join(", ")), without);
        }
    };
    all("to run", &TO_RUN, "it has what a guest needs", "no guest can be run: use a newer kernel");
    all("to migrate", &TO_MIGRATE, "a guest can be saved and restored", "no guest can be migrated: use a newer kernel");

    let mut one = |name: &str, good: bool, value: String, with: &str, without: &str| {
        let state = State::ok_or(good, State::Limited);
        found.add(Area::Kvm, name, state, value, if good { with } else { without });
    };
    let yes_no = |good: bool| String::from(if good { "there" } else { "none" });
    one(
        "MMU notifiers",
        has(Cap::SyncMmu),
        yes_no(has(Cap::SyncMmu)),
        "the host can page out what a guest has in use",
        "KVM holds on to guest pages: they cannot be paged out",
    );
    let manual = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let ring = kvm.check_extension_int(Cap::DirtyLogRing);
    let ring = ring.max(kvm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()));
    one(
        "dirty log",
        manual > 0,
        dirty_log(manual, ring),
        "it can be cleared piece by piece",
        "it is cleared all at once, which holds up a large guest",
    );
    let xsave = kvm.check_extension_int(Cap::Xsave2);
    one(
        "XSAVE2",
        xsave > 0,
        if xsave > 0 { format!("{xsave} bytes") } else { "none (Linux 5.17)".into() },
        "extended state of any size is saved",
        "extended state beyond 4 KiB (AMX) is not offered to guests",
    );
    one(
        "TSC control",
        has(Cap::TscControl),
        yes_no(has(Cap::TscControl)),
        "guests can come from hosts whose TSC has another rate",
        "guests from hosts whose TSC has another rate cannot be received",
    );
    let clock = kvm.check_extension_int(Cap::AdjustClock) as u32;
    let realtime = clock & KVM_CLOCK_REALTIME != 0;
    one(
        "clock realtime",
        realtime,
        if realtime { "there".into() } else { "none (Linux 5.16)".into() },
        "kvmclock goes on during downtime",
        "kvmclock stands still during downtime",
    );
    let most = kvm.get_max_vcpus();
    let enough = format!("a guest has {MAX_CPUS} at most");
    one("vCPUs", most >= usize::from(MAX_CPUS), format!("up to {most}"), &enough, "larger guests cannot be received");
}

fn dirty_log(manual_protect: i32, ring_bytes: i32) -> String {
    // An entry of the ring has 16 bytes.
    let ring = if ring_bytes > 0 { format!("ring of {}", ring_bytes / 16) } else { "no ring".into() };
    let manual = match manual_protect {
        flags if flags > 0 && flags as u32 & KVM_DIRTY_LOG_INITIALLY_SET != 0 => "manual protect, initially set",
        flags if flags > 0 => "manual protect",
        _ => "no manual protect",
    };
    format!("{manual}, {ring}")
}

/// Why the device cannot be opened, and what to do.
fn why_not(error: &io::Error, back_end: Option<BackEnd>, cpu_flags: &str) -> (String, String) {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => ("not there".into(), no_device(back_end, cpu_flags)),
        Some(libc::EACCES) => {
            let metadata = fs::metadata(DEVICE);
            let groups = text::read("/etc/group").unwrap_or_default();
            let (mode, gid) = metadata.map_or((0, 0), |m| (m.mode() & 0o777, m.gid()));
            not_permitted(mode, gid, &groups)
        }
        // What the device controller of control groups says.
        Some(libc::EPERM) => (
            "refused".into(),
            "this control group or container may not use it: permit the device (docker: --device /dev/kvm)".into(),
        ),
        _ => ("cannot be opened".into(), error.to_string()),
    }
}

fn no_device(back_end: Option<BackEnd>, cpu_flags: &str) -> String {
    let able = |flag| text::has_word(cpu_flags, flag);
    let advice = match back_end {
        Some(_) => {
            "KVM is in the kernel: see dmesg for why it does not start, or make the device appear in this container"
        }
        None if able("vmx") => "modprobe kvm_intel",
        None if able("svm") => "modprobe kvm_amd",
        None => {
            "the processor shows no VMX or SVM: switch it on in the firmware, or, in a virtual machine, nested \
             virtualisation in its host"
        }
    };
    advice.into()
}

fn not_permitted(mode: u32, gid: u32, groups: &str) -> (String, String) {
    let group = text::group_name(groups, gid).map_or_else(|| format!("group {gid}"), |name| format!("group {name}"));
    let value = format!("not for this user (mode {mode:o}, {group})");
    let advice = if gid != 0 && mode & 0o060 == 0o060 {
        format!("add this user to {group} and log in again")
    } else {
        "give this user the right to read and write it: setfacl -m u:USER:rw /dev/kvm".into()
    };
    (value, advice)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_back_end_is_the_one_the_processor_can_do() {
        let with = |modules: &'static [&str]| move |module: &str| modules.contains(&module);
        assert_eq!(BackEnd::of(with(&["kvm_amd"]), "fpu svm"), Some(BackEnd::Svm));
        assert_eq!(BackEnd::of(with(&["kvm_intel", "kvm_amd"]), "fpu svm"), Some(BackEnd::Svm));
        assert_eq!(BackEnd::of(with(&["kvm_intel", "kvm_pvm"]), "fpu hypervisor"), Some(BackEnd::Pvm));
        assert_eq!(BackEnd::of(with(&["kvm_intel"]), ""), Some(BackEnd::Vmx));
        assert_eq!(BackEnd::of(with(&["kvm"]), "vmx"), None);
    }

    #[test]
    fn what_to_do_depends_on_which_right_is_missing() {
        let groups = "root:x:0:\nkvm:x:104:";
        assert!(not_permitted(0o660, 104, groups).1.contains("group kvm"));
        assert!(not_permitted(0o660, 0, groups).1.contains("setfacl"));
        assert!(not_permitted(0o600, 104, groups).1.contains("setfacl"));
        assert!(not_permitted(0o660, 7, "").1.contains("group 7"));
        let error = |code| why_not(&io::Error::from_raw_os_error(code), None, "svm").1;
        assert_eq!(error(libc::ENOENT), "modprobe kvm_amd");
        assert!(error(libc::EPERM).contains("container"));
        assert!(!error(libc::EIO).is_empty());
    }

    #[test]
    fn the_dirty_log_is_named_by_what_it_can_do() {
        assert_eq!(dirty_log(3, 65536 * 16), "manual protect, initially set, ring of 65536");
        assert_eq!(dirty_log(1, 0), "manual protect, no ring");
        assert_eq!(dirty_log(-1, -1), "no manual protect, no ring");
    }

    proptest! {
        #[test]
        fn any_host_gets_an_answer(flags in "\\PC*", groups in "(\\PC|[:\n])*", mode: u32, gid: u32, code: i32, a: i32, b: i32) {
            let _ = (not_permitted(mode, gid, &groups), why_not(&io::Error::from_raw_os_error(code), None, &flags));
            let _ = (BackEnd::of(|_| true, &flags), dirty_log(a, b));
        }
    }
}
