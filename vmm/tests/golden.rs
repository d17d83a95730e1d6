//! The bytes of saved state, kind by kind: what one release saved another must read. A test fails when bytes change and
//! their version does not.
//!
//! A new version gets a file of its own: `THERMOCLINE_WRITE_GOLDEN=1 cargo test -p thermocline --test golden` writes those
//! that are missing, never over one that is there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use thermocline::arch::x86_64::msrs::Msr;
use thermocline::arch::x86_64::state::{
    DebugRegisters, DescriptorTable, Events, Exception, GeneralRegisters, Interrupt, IoApic, MpState, Nmi, Pic, Pit,
    PitChannel, Segment, Smi, SpecialRegisters, Time, VcpuState, VmState, Xcr,
};
use thermocline::bounded::Block;
use thermocline::devices::legacy::power_button::SavedPowerButton;
use thermocline::devices::legacy::serial::SavedSerial;
use thermocline::devices::pci::{SavedHostBridge, SavedMsix};
use thermocline::devices::virtio::QueueSetup;
use thermocline::devices::virtio::pci::{CommonConfig, SavedVirtio};
use thermocline::machine::MachineState;
use thermocline::record::{Record, Records, Saved};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The bytes are those in the file.
fn same(name: &str, bytes: &[u8]) {
    let path = path(name);
    if std::env::var_os("THERMOCLINE_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(golden == bytes, "the bytes of {name} have changed: they need another version");
}

/// What is saved has the bytes of its version, and these bytes mean what was saved.
fn golden<T: Saved + PartialEq + Debug>(state: &T) {
    let record = Record::of("part0", state).unwrap();
    same(&format!("{}-{}.bin", T::KIND, T::VERSION), &record.bytes);
    assert_eq!(&record.read::<T>().unwrap(), state);
}

/// Each field another number, so that two that change places are noticed.
#[derive(Default)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }

    fn u8(&mut self) -> u8 {
        (self.next() % 251) as u8
    }

    fn u32(&mut self) -> u32 {
        self.next() as u32 + 0x1_0000
    }

    fn u64(&mut self) -> u64 {
        self.next() + (1 << 40)
    }

    fn segment(&mut self) -> Segment {
        let number = self.next();
        let bit = |bit: u32| number >> bit & 1 == 1;
        Segment {
            base: self.u64(),
            limit: self.u32(),
            selector: self.next() as u16,
            type_: (number % 16) as u8,
            dpl: (number % 4) as u8,
            present: bit(0),
            db: bit(1),
            s: bit(2),
            l: bit(3),
            g: bit(4),
            avl: bit(5),
            unusable: bit(6),
        }
    }

    fn table(&mut self) -> DescriptorTable {
        DescriptorTable { base: self.u64(), limit: self.next() as u16 }
    }

    fn pic(&mut self) -> Pic {
        Pic {
            last_irr: self.u8(),
            irr: self.u8(),
            imr: self.u8(),
            isr: self.u8(),
            priority_add: self.u8(),
            irq_base: self.u8(),
            read_reg_select: self.u8(),
            poll: self.u8(),
            special_mask: self.u8(),
            init_state: self.u8(),
            auto_eoi: self.u8(),
            rotate_on_auto_eoi: self.u8(),
            special_fully_nested_mode: self.u8(),
            init4: self.u8(),
            elcr: self.u8(),
            elcr_mask: self.u8(),
        }
    }

    fn channel(&mut self) -> PitChannel {
        PitChannel {
            count: self.u32(),
            latched_count: self.next() as u16,
            count_latched: self.u8(),
            status_latched: self.u8(),
            status: self.u8(),
            read_state: self.u8(),
            write_state: self.u8(),
            write_latch: self.u8(),
            rw_mode: self.u8(),
            mode: self.u8(),
            bcd: self.u8(),
            gate: self.u8(),
            count_load_time: -(self.u64() as i64),
        }
    }
}

#[test]
fn vm() {
    let mut n = Numbers::default();
    golden(&VmState {
        pics: [n.pic(), n.pic()],
        io_apic: IoApic {
            base_address: n.u64(),
            ioregsel: n.u32(),
            id: n.u32(),
            irr: n.u32(),
            redirtbl: std::array::from_fn(|_| n.u64()),
        },
        pit: Pit { channels: std::array::from_fn(|_| n.channel()), flags: n.u32() },
    });
}

#[test]
fn time() {
    let mut n = Numbers::default();
    golden(&Time { clock_ns: n.u64(), realtime_ns: n.u64(), tscs: vec![n.u64(), n.u64()] });
}

#[test]
fn vcpu() {
    let mut n = Numbers::default();
    golden(&VcpuState {
        mp_state: MpState::Halted,
        regs: GeneralRegisters {
            rax: n.u64(),
            rbx: n.u64(),
            rcx: n.u64(),
            rdx: n.u64(),
            rsi: n.u64(),
            rdi: n.u64(),
            rsp: n.u64(),
            rbp: n.u64(),
            r8: n.u64(),
            r9: n.u64(),
            r10: n.u64(),
            r11: n.u64(),
            r12: n.u64(),
            r13: n.u64(),
            r14: n.u64(),
            r15: n.u64(),
            rip: n.u64(),
            rflags: n.u64(),
        },
        sregs: SpecialRegisters {
            cs: n.segment(),
            ds: n.segment(),
            es: n.segment(),
            fs: n.segment(),
            gs: n.segment(),
            ss: n.segment(),
            tr: n.segment(),
            ldt: n.segment(),
            gdt: n.table(),
            idt: n.table(),
            // Paging of three levels, as page directory pointers go with that alone.
            cr0: n.u64() | 1 << 31,
            cr2: n.u64(),
            cr3: n.u64(),
            cr4: n.u64() | 1 << 5,
            cr8: n.u64(),
            efer: n.u64(),
            apic_base: n.u64(),
            pdptrs: Some(std::array::from_fn(|_| n.u64())),
        },
        xsave: (0..40).map(|_| n.u32()).collect(),
        xcrs: vec![Xcr { xcr: n.u32(), value: n.u64() }],
        debug_regs: DebugRegisters { db: std::array::from_fn(|_| n.u64()), dr6: n.u64(), dr7: n.u64() },
        lapic: Block(Box::new(std::array::from_fn(|_| n.u8()))),
        events: Events {
            exception: Exception {
                injected: true,
                nr: n.u8(),
                has_error_code: false,
                pending: true,
                error_code: n.u32(),
                payload: Some(n.u64()),
            },
            interrupt: Interrupt { injected: false, nr: n.u8(), soft: true, shadow: n.u8() },
            nmi: Nmi { injected: true, pending: n.u8(), masked: false },
            sipi_vector: n.u32(),
            flags: n.u32(),
            smi: Smi { smm: false, pending: true, smm_inside_nmi: false, latched_init: true },
            triple_fault_pending: true,
        },
        msrs: (0..3).map(|_| Msr { index: n.u32(), value: n.u64() }).collect(),
    });
}

#[test]
fn serial() {
    golden(&SavedSerial { divisor: [1, 2], registers: [3, 4, 5, 6, 7, 8, 9], received: b"typed".to_vec() });
}

#[test]
fn pci_host_bridge() {
    let mut n = Numbers::default();
    golden(&SavedHostBridge { config_address: n.u32(), config: Block(Box::new(std::array::from_fn(|_| n.u8()))) });
}

/// What every virtio device saves, whatever the kind that its record names.
#[test]
fn virtio_pci() {
    let mut n = Numbers::default();
    let mut queue = || QueueSetup {
        size: n.next() as u16,
        is_enabled: true,
        descriptors: n.u64(),
        available: n.u64(),
        used: n.u64(),
        next_available: n.next() as u16,
        next_used: n.next() as u16,
    };
    let queues = vec![queue(), queue()];
    golden(&SavedVirtio {
        config: Block(Box::new(std::array::from_fn(|_| n.u8()))),
        msix: SavedMsix { table: (0..48).map(|_| n.u8()).collect(), pending: vec![n.u64()] },
        status: n.u8(),
        isr: n.u8(),
        generation: n.u8(),
        config_vector: n.next() as u16,
        queue_vectors: vec![n.next() as u16, n.next() as u16],
        common: CommonConfig {
            device_feature_select: n.u32(),
            driver_feature_select: n.u32(),
            driver_features: n.u64(),
            queue_select: n.next() as u16,
            queues,
        },
        device: b"its own".to_vec(),
    });
}

#[test]
fn power_button() {
    golden(&SavedPowerButton { is_pressed: true });
}

/// What the records themselves look like, which a protocol's version stands for.
#[test]
fn machine() {
    let serial = SavedSerial { divisor: [1, 2], registers: [3, 4, 5, 6, 7, 8, 9], received: b"typed".to_vec() };
    let state = MachineState { running: true, records: Records(vec![Record::of("serial0", &serial).unwrap()]) };
    let bytes = postcard::to_stdvec(&state).unwrap();
    same("machine-1.bin", &bytes);
    assert_eq!(postcard::from_bytes::<MachineState>(&bytes).unwrap(), state);
}
