//! The ACPI tables (ACPI 6.5): hardware-reduced, so that there is nothing but what they name. A guest learns from them of its
//! processors, of PCI's configuration space and window, of the serial port, and how to end and reset the machine.
//!
//! What they say is the same on every machine but for the number of processors; they lie in guest RAM, and travel with it.

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::arch::x86_64::layout::{ACPI_TABLES, ECAM, IO_APIC, LOCAL_APIC, RESET_PORTS, RESET_VALUE, SLEEP_PORTS};
use crate::ram::GuestRam;

const OEM: [u8; 6] = *b"THERMO";
const OEM_TABLE: [u8; 8] = *b"CLINE   ";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGN: usize = 64;

/// `IAPC_BOOT_ARCH` (section 5.2.9.3): no VGA and no CMOS clock; that of the i8042 is not set, so that there is no keyboard.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Writes the tables for a machine with so many processors, the RSDP first.
pub(super) fn write(ram: &GuestRam, cpus: u8) -> Result<(), BootError> {
    let tables = tables(cpus);
    let room = (ACPI_TABLES.end - ACPI_TABLES.start) as usize;
    if tables.len() > room {
        return Err(BootError::Structures(format!("ACPI tables of {} bytes, where {room} fit", tables.len())));
    }
    ram.memory().write_slice(&tables, GuestAddress(ACPI_TABLES.start)).map_err(super::structures)
}

/// Tables one behind the other, as they lie in guest memory.
struct Blob(Vec<u8>);

impl Blob {
    /// Adds a table; gives its guest physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        let address = ACPI_TABLES.start + self.0.len() as u64;
        table.to_aml_bytes(self);
        address
    }
}

impl AmlSink for Blob {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// All tables, to be at the start of [`ACPI_TABLES`].
fn tables(cpus: u8) -> Vec<u8> {
    let mut blob = Blob(vec![0; Rsdp::len()]);
    let dsdt = blob.add(&dsdt());
    let fadt = blob.add(&fadt(dsdt));
    let madt = blob.add(&madt(cpus));
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    let mcfg = blob.add(&mcfg);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = blob.add(&xsdt);
    let mut rsdp = Blob(Vec::new());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    blob.0[..rsdp.0.len()].copy_from_slice(&rsdp.0);
    blob.0
}

fn dsdt() -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&dsdt::aml());
    table
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let flags = [
        Flags::HwReducedAcpi,
        Flags::Wbinvd,
        Flags::ProcC1,
        // Neither is a fixed register's: the power button is a device of the DSDT, and there is no sleep button.
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::Headless,
    ];
    let table =
        FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION).dsdt_64(dsdt).preferred_pm_profile(PmProfile::EnterpriseServer);
    let mut table = flags.into_iter().fold(table, FADTBuilder::flag);
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = port(RESET_PORTS.start);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(SLEEP_PORTS.start);
    table.sleep_status_reg = port(SLEEP_PORTS.start + 1);
    table.finalize()
}

/// A vCPU's number is its APIC id. There are at most 255, so that none needs an x2APIC entry: those are for ids from 255 on
/// (section 5.2.12.12).
fn madt(cpus: u8) -> MADT {
    let local_apic = LocalInterruptController::Address(LOCAL_APIC.start as u32);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local_apic);
    for id in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IO_APIC.start as u32, 0));
    table
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use super::*;

    fn at(tables: &[u8], address: u64) -> &[u8] {
        &tables[(address - ACPI_TABLES.start) as usize..]
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Follows pointers as a guest does: from the RSDP to the XSDT, its tables, and the FADT's DSDT.
    fn found(tables: &[u8]) -> Vec<(String, Vec<u8>)> {
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let table = |address| {
            let bytes = at(tables, address);
            let bytes = bytes[..u32_at(bytes, 4) as usize].to_vec();
            assert_eq!(sum(&bytes), 0, "checksum of {:?}", &bytes[..4]);
            (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
        };
        let (name, xsdt) = table(u64_at(tables, 24));
        assert_eq!(name, "XSDT");
        let mut all: Vec<_> = xsdt[36..].chunks(8).map(|pointer| table(u64_at(pointer, 0))).collect();
        let dsdt = table(u64_at(&all[0].1, 140));
        all.push(dsdt);
        all
    }

    #[test]
    fn a_guest_finds_all_of_them_with_any_number_of_processors() {
        for cpus in 1..=u8::MAX {
            let tables = tables(cpus);
            assert!(tables.len() as u64 <= ACPI_TABLES.end - ACPI_TABLES.start);
            let found = found(&tables);
            let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
            let madt = &found[1].1;
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
            let last = &madt[44 + 8 * (usize::from(cpus) - 1)..];
            assert_eq!(last[..8], [0, 8, cpus - 1, cpus - 1, 1, 0, 0, 0]);
            assert_eq!((last[8], u32_at(last, 12)), (1, 0xfec0_0000));
            assert_eq!(u64_at(&found[2].1, 44), ECAM.start);
        }
    }

    #[test]
    fn the_fadt_says_how_to_end() {
        let found = found(&tables(1));
        let fadt = &found[0].1;
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & (1 << 20 | 1 << 10 | 1 << 4), 1 << 20 | 1 << 10 | 1 << 4);
        let register = |offset: usize| (fadt[offset], fadt[offset + 1], u64_at(fadt, offset + 4));
        assert_eq!(register(116), (1, 8, RESET_PORTS.start));
        assert_eq!(register(244), (1, 8, SLEEP_PORTS.start));
        assert_eq!(register(256), (1, 8, SLEEP_PORTS.start + 1));
    }

    #[test]
    fn intels_own_disassembler_takes_them() {
        let program = std::env::var_os("IASL").unwrap_or_else(|| "iasl".into());
        if Command::new(&program).arg("-v").output().is_err() {
            let _ = writeln!(std::io::stderr(), "not run: iasl is not installed (package acpica-tools)");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in found(&tables(3)) {
            let path = folder.path().join(&name).with_extension("dat");
            std::fs::write(&path, bytes).unwrap();
            let run = |arguments: &[&str], file: &std::path::Path| {
                let output = Command::new(&program).args(arguments).arg(file).output().unwrap();
                let text =
                    [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
                assert!(output.status.success(), "{name}: {text}");
                text
            };
            let text = run(&["-d"], &path);
            assert!(!text.contains("Error") && !text.contains("Invalid"), "{name}: {text}");
            if name == "DSDT" {
                let text = run(&["-we"], &path.with_extension("dsl"));
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
        }
    }
}
