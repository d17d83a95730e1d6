//! The DSDT's devices, in AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, Or, Package, Path, ResourceTemplate, Return, Scope, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use crate::arch::x86_64::layout::{
    COM1_LINE, COM1_PORTS, ECAM, PANIC_PORTS, PCI_CONFIG_PORTS, PCI_WINDOW, POWER_BUTTON_LINE, SLEEP_TYPE_OFF,
};

/// What `_OSC` of a PCI host bridge is asked under (PCI Firmware Specification 3.3, section 4.5.1).
const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// In the first word of `_OSC`'s answer: asked under a name that means nothing here.
const UNKNOWN_NAME: u8 = 1 << 2;
/// `Notify` of a power button that was pressed (ACPI 6.5, table 5.6.6).
const PRESSED: u8 = 0x80;

/// Bytes of AML, one object after the other.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// What is behind the DSDT's header.
pub(super) fn aml() -> Vec<u8> {
    let mut bytes = Bytes::default();
    for add in [pci_host_bridge, configuration_space, serial_port, power_button, event_device, panic_port, power_off] {
        add(&mut bytes);
    }
    bytes.0
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// A device of the system bus with these objects in it.
fn device(bytes: &mut Bytes, name: &str, objects: Vec<&dyn Aml>) {
    Scope::new(path("_SB_"), vec![&Device::new(path(name), objects)]).to_aml_bytes(bytes);
}

fn hid(name: &str) -> Name {
    Name::new(path("_HID"), &EISAName::new(name))
}

fn resources(resources: Vec<&dyn Aml>) -> Name {
    Name::new(path("_CRS"), &ResourceTemplate::new(resources))
}

/// An interrupt that comes as an edge, as an event file brings it.
fn edge(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn ports(range: &std::ops::Range<u64>) -> IO {
    IO::new(range.start as u16, range.start as u16, 1, (range.end - range.start) as u8)
}

/// No `_PRT`, as there are no interrupt lines: devices interrupt by MSI-X.
fn pci_host_bridge(bytes: &mut Bytes) {
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW.start as u32,
        PCI_WINDOW.end as u32 - 1,
        None,
    );
    let (asked, capabilities, first_word) = (Arg(0), Arg(3), path("CDW1"));
    let (ours, answer) = (Uuid::new(PCI_HOST_BRIDGE), Return::new(&capabilities));
    let name_word = CreateDWordField::new(&first_word, &capabilities, &ZERO);
    let is_ours = Equal::new(&asked, &ours);
    // The guest may have control of all that it asks for: there is nothing to take care of here.
    let give_all = If::new(&is_ours, vec![&answer]);
    let refuse = Or::new(&first_word, &first_word, &UNKNOWN_NAME);
    let control = Method::new(path("_OSC"), 4, true, vec![&name_word, &give_all, &refuse, &answer]);
    device(
        bytes,
        "PCI0",
        vec![
            &hid("PNP0A08"),
            &Name::new(path("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_SEG"), &ZERO),
            &Name::new(path("_BBN"), &ZERO),
            &resources(vec![&AddressSpace::new_bus_number(0_u16, 0), &ports(&PCI_CONFIG_PORTS), &window]),
            &control,
        ],
    );
}

/// Reserved here, or a guest does not believe what MCFG says (PCI Firmware Specification 3.3, section 4.1.2).
fn configuration_space(bytes: &mut Bytes) {
    let space = Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
    device(bytes, "ECAM", vec![&hid("PNP0C02"), &Name::new(path("_UID"), &ZERO), &resources(vec![&space])]);
}

fn serial_port(bytes: &mut Bytes) {
    device(
        bytes,
        "COM1",
        vec![
            &hid("PNP0501"),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_DDN"), &"COM1"),
            &resources(vec![&ports(&COM1_PORTS), &edge(COM1_LINE)]),
        ],
    );
}

fn power_button(bytes: &mut Bytes) {
    device(bytes, "PWRB", vec![&hid("PNP0C0C"), &Name::new(path("_UID"), &ZERO)]);
}

/// A generic event device (ACPI 6.5, section 5.6.9): whose interrupt is the power button's.
fn event_device(bytes: &mut Bytes) {
    let button = path("\\_SB_.PWRB");
    let pressed = Notify::new(&button, &PRESSED);
    device(
        bytes,
        "GED_",
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_UID"), &ZERO),
            &resources(vec![&edge(POWER_BUTTON_LINE)]),
            &Method::new(path("_EVT"), 1, true, vec![&pressed]),
        ],
    );
}

fn panic_port(bytes: &mut Bytes) {
    device(bytes, "PEVT", vec![&Name::new(path("_HID"), &"QEMU0001"), &resources(vec![&ports(&PANIC_PORTS)])]);
}

/// `\_S5`: what is written to the sleep control register to switch the machine off.
fn power_off(bytes: &mut Bytes) {
    Name::new(path("_S5_"), &Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(bytes);
}
