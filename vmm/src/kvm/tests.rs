//! What becomes of a guest that is stopped, saved and restored, on this machine's KVM.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{CODE, DEVICE, PORT, guest};
use super::{KvmError, Vcpus, Vm};
use crate::arch::x86_64::msrs::Msr;
use crate::arch::x86_64::state::{MpState, VcpuState};
use crate::devices::{RegisterAccess, StopReason};

const LIMIT: Duration = Duration::from_secs(60);

/// `1: jmp 1b`
const LOOP: &[u8] = &[0xeb, 0xfe];

/// Writes down what is written to it. The first access waits until somebody says that it may go on.
#[derive(Debug)]
struct Device {
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    reached: SyncSender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl RegisterAccess for Device {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        let is_first = {
            let mut written = self.written.lock().unwrap();
            written.push((offset, data.to_vec()));
            written.len() == 1
        };
        if is_first {
            self.reached.send(()).unwrap();
            self.go_on.lock().unwrap().recv_timeout(LIMIT).unwrap();
        }
        None
    }
}

/// The device, what tells that its first access has come, and what lets that go on.
fn device() -> (Arc<Device>, Receiver<()>, SyncSender<()>) {
    let ((reached, has_reached), (go_on, may_go_on)) = (sync_channel(1), sync_channel(1));
    let device = Device { written: Mutex::default(), reached, go_on: Mutex::new(may_go_on) };
    (Arc::new(device), has_reached, go_on)
}

fn regs(vcpus: &Vcpus, index: usize) -> kvm_regs {
    vcpus.with_fd(index, |fd| fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))).unwrap()
}

fn state(vcpus: &Vcpus) -> VcpuState {
    vcpus.save().unwrap().remove(0)
}

/// Runs the guest until its device's first access, and has it paused while that lasts.
fn paused_in_the_first_access(vcpus: &Vcpus, has_reached: &Receiver<()>, go_on: &SyncSender<()>) {
    vcpus.resume();
    has_reached.recv_timeout(LIMIT).unwrap();
    // Ordered to stop while the access is under way.
    assert!(!vcpus.try_pause());
    go_on.send(()).unwrap();
    vcpus.pause(LIMIT).unwrap();
}

#[test]
fn an_access_in_two_pieces_is_whole_when_a_vcpu_has_stopped() {
    let (device, has_reached, go_on) = device();
    // mov %eax, 0xd0000ffe, over the end of a page: KVM makes two accesses of it.
    let code = [&[0xa3, 0xfe, 0x0f, 0x00, 0xd0][..], LOOP].concat();
    let registers = kvm_regs { rax: 0x4433_2211, ..Default::default() };
    let Some((_vm, vcpus)) = guest(&[(&code, registers)], Some(device.clone())) else { return };
    paused_in_the_first_access(&vcpus, &has_reached, &go_on);
    assert_eq!(*device.written.lock().unwrap(), [(0xffe, vec![0x11, 0x22]), (0x1000, vec![0x33, 0x44])]);
    assert_eq!(regs(&vcpus, 0).rip, CODE + 5, "the instruction is not behind it");
    assert!(DEVICE.contains(&(DEVICE.start + 0x1001)));
}

#[test]
fn what_a_repeated_instruction_has_done_is_in_its_registers() {
    let (device, has_reached, go_on) = device();
    // cld; rep outsb
    let code = [&[0xfc, 0xf3, 0x6e][..], LOOP].concat();
    let registers = kvm_regs { rsi: 0x8000, rcx: 3000, rdx: PORT.into(), ..Default::default() };
    let Some((vm, vcpus)) = guest(&[(&code, registers)], Some(device.clone())) else { return };
    let bytes: Vec<u8> = (0..3000).map(|byte| byte as u8).collect();
    vm.ram().memory().write_slice(&bytes, GuestAddress(0x8000)).unwrap();
    let written = || device.written.lock().unwrap().iter().flat_map(|(_, data)| data.clone()).collect::<Vec<u8>>();
    paused_in_the_first_access(&vcpus, &has_reached, &go_on);
    let (done, now) = (written(), regs(&vcpus, 0));
    assert_eq!(done.len() as u64, 3000 - now.rcx, "{now:?}");
    assert_eq!(now.rsi, 0x8000 + done.len() as u64);
    // It goes on behind that.
    vcpus.resume();
    let deadline = Instant::now() + LIMIT;
    while written().len() < bytes.len() {
        assert!(Instant::now() < deadline, "{} bytes have come", written().len());
        std::thread::sleep(Duration::from_millis(1));
    }
    vcpus.pause(LIMIT).unwrap();
    assert!(written() == bytes, "a byte is lost or there twice");
}

#[test]
fn all_vcpus_stop_together_though_one_cannot() {
    const COUNTER: GuestAddress = GuestAddress(0x8000);
    let (device, has_reached, go_on) = device();
    // mov %eax, 0xd0000000
    let stuck = [&[0xa3, 0x00, 0x00, 0x00, 0xd0][..], LOOP].concat();
    // 1: incl 0x8000; jmp 1b
    let counts = [0xff, 0x05, 0x00, 0x80, 0x00, 0x00, 0xeb, 0xf8];
    let none = kvm_regs::default();
    let Some((vm, vcpus)) = guest(&[(&stuck, none), (&counts, none)], Some(device)) else { return };
    let count = || vm.ram().memory().read_obj::<u32>(COUNTER).unwrap();
    vcpus.resume();
    has_reached.recv_timeout(LIMIT).unwrap();
    let deadline = Instant::now() + LIMIT;
    while count() == 0 {
        assert!(Instant::now() < deadline, "the second vCPU does not run");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| vcpus.pause(LIMIT));
        // The first one is in its device until it is let go: only that ends the pause.
        let stands_still = || {
            let before = count();
            std::thread::sleep(Duration::from_millis(50));
            count() == before
        };
        while !stands_still() {
            assert!(Instant::now() < deadline, "the second vCPU runs while the first one is waited for");
        }
        assert!(!pausing.is_finished());
        go_on.send(()).unwrap();
        pausing.join().unwrap().unwrap();
    });
}

/// Two machines of the same guest that loops.
fn two() -> Option<(Vcpus, Vcpus, Vm)> {
    let ((_, one), (other_vm, other)) =
        (guest(&[(LOOP, kvm_regs::default())], None)?, guest(&[(LOOP, kvm_regs::default())], None)?);
    Some((one, other, other_vm))
}

#[test]
fn caching_and_machine_checks_go_along() {
    let Some((one, other, _vm)) = two() else { return };
    let mut saved = state(&one);
    let fake = [
        // A variable MTRR, write-back over the first GiB; a fixed one; and their default type.
        Msr { index: 0x200, value: 6 },
        Msr { index: 0x201, value: 0xf_c000_0800 },
        Msr { index: 0x250, value: 0x0606_0606_0606_0606 },
        Msr { index: 0x2ff, value: 0xc06 },
        // The first bank's address and miscellaneous information.
        Msr { index: 0x402, value: 0x1234_5678 },
        Msr { index: 0x403, value: 0x9abc },
    ];
    for msr in fake {
        let there = saved.msrs.iter_mut().find(|there| there.index == msr.index);
        there.unwrap_or_else(|| panic!("MSR {:#x} is not saved", msr.index)).value = msr.value;
    }
    other.restore(&[saved]).unwrap();
    let restored = state(&other);
    for msr in fake {
        assert!(restored.msrs.contains(&msr), "{msr:x?} is not restored");
    }
    other.reset().unwrap();
    assert!(state(&other).msrs.contains(&Msr { index: 0x402, value: 0 }), "a reset leaves it there");
}

#[test]
fn page_directory_pointers_go_along() {
    let Some((one, other, _vm)) = two() else { return };
    let mut saved = state(&one);
    // PAE paging, whose table in memory says something else than what was loaded.
    saved.sregs.cr3 = 0x8000;
    saved.sregs.cr4 |= 1 << 5;
    saved.sregs.cr0 |= 1 << 31;
    saved.sregs.pdptrs = Some([0x9001, 0xa001, 0, 0]);
    if let Err(e) = other.restore(std::slice::from_ref(&saved)) {
        return command_line::note(format_args!("not run: this KVM takes no PAE paging: {e}"));
    }
    let restored = state(&other).sregs;
    if restored.cr0 != saved.sregs.cr0 {
        return command_line::note(format_args!("not run: this KVM has no PAE paging outside of long mode (PVM)"));
    }
    assert_eq!((restored.pdptrs, restored.cr3, restored.cr4), (saved.sregs.pdptrs, saved.sregs.cr3, saved.sregs.cr4));
}

#[test]
fn tasks_that_wait_for_a_page_are_woken() {
    /// MSRs and `struct kvm_vcpu_pv_apf_data` (arch/x86/include/uapi/asm/kvm_para.h): its token, and the one that is everybody's.
    const ASYNC_PF_EN: u32 = 0x4b56_4d02;
    const ASYNC_PF_INT: u32 = 0x4b56_4d06;
    const TOKEN: u64 = 4;
    const ALL: u32 = u32::MAX;
    const PAGE: u64 = 0xa000;
    /// The local APIC's spurious vector, with what enables it (Intel SDM, volume 3, table 11-1).
    const SPURIOUS: usize = 0xf0;
    let Some((one, other, vm)) = two() else { return };
    let mut saved = state(&one);
    saved.lapic.0[SPURIOUS + 1] |= 1;
    for (index, value) in [(ASYNC_PF_EN, PAGE | 1 | 1 << 3), (ASYNC_PF_INT, 0xf3)] {
        match saved.msrs.iter_mut().find(|msr| msr.index == index) {
            Some(msr) => msr.value = value,
            None => return command_line::note(format_args!("not run: this KVM has no asynchronous page faults")),
        }
    }
    other.restore(&[saved]).unwrap();
    other.resume();
    let deadline = Instant::now() + LIMIT;
    while vm.ram().memory().read_obj::<u32>(GuestAddress(PAGE + TOKEN)).unwrap() != ALL {
        assert!(Instant::now() < deadline, "nobody is woken");
        std::thread::sleep(Duration::from_millis(1));
    }
    other.pause(LIMIT).unwrap();
}

#[test]
fn a_guest_is_told_that_it_was_stopped() {
    /// `struct pvclock_vcpu_time_info` (arch/x86/include/asm/pvclock-abi.h): its flags, and `PVCLOCK_GUEST_STOPPED`.
    const FLAGS: u64 = 29;
    const GUEST_STOPPED: u8 = 1 << 1;
    const PAGE: u64 = 0x9000;
    const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    let Some((one, other, vm)) = two() else { return };
    let mut saved = state(&one);
    let clock = saved.msrs.iter_mut().find(|msr| msr.index == SYSTEM_TIME_NEW).expect("no kvmclock");
    clock.value = PAGE | 1;
    other.restore(&[saved]).unwrap();
    let flags = || vm.ram().memory().read_obj::<u8>(GuestAddress(PAGE + FLAGS)).unwrap();
    assert_eq!(flags() & GUEST_STOPPED, 0);
    other.resume();
    let deadline = Instant::now() + LIMIT;
    while flags() & GUEST_STOPPED == 0 {
        assert!(Instant::now() < deadline, "it is not told");
        std::thread::sleep(Duration::from_millis(1));
    }
    other.pause(LIMIT).unwrap();
}

#[test]
fn all_of_a_vcpu_goes_along() {
    let Some((one, other, _vm)) = two() else { return };
    let mut saved = state(&one);
    assert_eq!(saved.mp_state, MpState::Runnable);
    saved.regs.r15 = 0x1234;
    saved.debug_regs.db[0] = 0x5678;
    other.restore(std::slice::from_ref(&saved)).unwrap();
    let restored = state(&other);
    assert_eq!(restored.regs, saved.regs);
    assert_eq!(restored.sregs, saved.sregs);
    assert_eq!(restored.debug_regs, saved.debug_regs);
    assert_eq!(restored.xcrs, saved.xcrs);
    let differ: Vec<_> = saved.msrs.iter().zip(&restored.msrs).filter(|(one, other)| one != other).collect();
    assert!(differ.is_empty() && saved.msrs.len() == restored.msrs.len(), "{differ:x?}");
}
