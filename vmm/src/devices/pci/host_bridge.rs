//! The host bridge: by what the guest reaches the bus. Configuration space by two ports (PCI Local Bus Specification 3.0,
//! 3.2.2.3.2) and by memory (PCI Express Base Specification, 7.2.2), and the window in which the functions' BARs lie.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{CONFIG_BYTES, ConfigSpace, Identity, PciBus, PciFunction};
use crate::arch::x86_64::layout::{ECAM, PCI_CONFIG_PORTS, PCI_WINDOW};
use crate::bounded::Block;
use crate::devices::host::Host;
use crate::devices::{Device, DeviceDescription, DeviceError, RegisterAccess, StopReason};
use crate::record::{Record, RecordError, Saved};

/// As QEMU's generic host bridge, which needs nothing of an operating system.
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_0000, subsystem: (0x1af4, 0x1100) };

/// Offset of `CONFIG_DATA` behind `CONFIG_ADDRESS`.
const CONFIG_DATA: u64 = 4;
/// `CONFIG_ADDRESS` has an address of configuration space.
const ENABLE: u32 = 1 << 31;
/// What can be set of it: bus, device, function and dword.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

/// What is saved of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedHostBridge {
    /// `CONFIG_ADDRESS`.
    pub config_address: u32,
    /// Its configuration space.
    pub config: Block<CONFIG_BYTES>,
}

impl Saved for SavedHostBridge {
    const KIND: &'static str = "pci-host-bridge";
    const VERSION: u16 = 1;
}

#[derive(Debug)]
struct HostBridge {
    description: DeviceDescription,
    bus: Arc<PciBus>,
    function: Arc<BridgeFunction>,
    config_address: Arc<Mutex<u32>>,
}

/// The bridge as the device in slot 0.
#[derive(Debug)]
struct BridgeFunction(Mutex<ConfigSpace>);

impl BridgeFunction {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        locked(&self.0)
    }
}

impl PciFunction for BridgeFunction {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn decode(&self, _: u64) -> Option<(usize, u64)> {
        None
    }

    fn read_bar(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bridge; leaves the bus for the devices on it.
pub(in crate::devices) fn make(
    description: &DeviceDescription,
    host: &mut Host,
) -> Result<Arc<dyn Device>, DeviceError> {
    let bus = Arc::new(PciBus::default());
    let function = Arc::new(BridgeFunction(Mutex::new(ConfigSpace::new(&IDENTITY))));
    bus.add(Arc::clone(&function) as _);
    host.pci = Some(Arc::clone(&bus));
    Ok(Arc::new(HostBridge { description: description.clone(), bus, function, config_address: Arc::default() }))
}

impl Device for HostBridge {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn reset(&self) {
        *locked(&self.config_address) = 0;
        *self.function.lock() = ConfigSpace::new(&IDENTITY);
    }

    fn save(&self) -> Result<Record, RecordError> {
        let saved =
            SavedHostBridge { config_address: *locked(&self.config_address), config: self.function.lock().save() };
        Record::of(self.description.id.as_str(), &saved)
    }

    fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
        let SavedHostBridge { config_address, config } = saved.read()?;
        let restored = self.function.lock().restore(&config);
        restored.map_err(|why| self.description.bad_state(why))?;
        *locked(&self.config_address) = config_address & ADDRESS_BITS;
        Ok(())
    }

    fn ports(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        let ports = ConfigPorts { address: Arc::clone(&self.config_address), bus: Arc::clone(&self.bus) };
        vec![(PCI_CONFIG_PORTS, Arc::new(ports))]
    }

    fn memory(self: Arc<Self>) -> Vec<(Range<u64>, Arc<dyn RegisterAccess>)> {
        let (ecam, window) = (Ecam(Arc::clone(&self.bus)), Window(Arc::clone(&self.bus)));
        vec![(PCI_WINDOW, Arc::new(window)), (ECAM, Arc::new(ecam))]
    }
}

/// `CONFIG_ADDRESS`, which takes whole dwords alone, and `CONFIG_DATA`, of any width.
struct ConfigPorts {
    address: Arc<Mutex<u32>>,
    bus: Arc<PciBus>,
}

impl ConfigPorts {
    /// The slot and the register at which `CONFIG_DATA` is, `offset` bytes behind its first.
    fn target(&self, offset: u64) -> Option<(usize, usize)> {
        let address = *locked(&self.address);
        let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let is_there = address & ENABLE != 0 && bus == 0 && function == 0;
        is_there.then(|| (slot as usize, (address & 0xfc) as usize + offset as usize))
    }
}

impl RegisterAccess for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset < CONFIG_DATA {
            let address = locked(&self.address).to_le_bytes();
            data.iter_mut().zip(&address[offset as usize..]).for_each(|(byte, register)| *byte = *register);
        } else if let Some((slot, register)) = self.target(offset - CONFIG_DATA) {
            self.bus.read_config(slot, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        if let (0, Ok(address)) = (offset, data.try_into()) {
            *locked(&self.address) = u32::from_le_bytes(address) & ADDRESS_BITS;
        } else if let Some((slot, register)) = offset.checked_sub(CONFIG_DATA).and_then(|offset| self.target(offset)) {
            self.bus.write_config(slot, register, data);
        }
        None
    }
}

/// Enhanced configuration access: 4 KiB a function, 8 functions a device.
struct Ecam(Arc<PciBus>);

impl Ecam {
    fn target(offset: u64) -> Option<(usize, usize)> {
        let function = offset >> 12 & 7;
        (function == 0).then_some(((offset >> 15) as usize, (offset & 0xfff) as usize))
    }
}

impl RegisterAccess for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((slot, register)) => self.0.read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        let (slot, register) = Self::target(offset)?;
        self.0.write_config(slot, register, data);
        None
    }
}

/// Where BARs lie.
struct Window(Arc<PciBus>);

impl RegisterAccess for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_memory(PCI_WINDOW.start + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<StopReason> {
        self.0.write_memory(PCI_WINDOW.start + offset, data);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::FakeVm;
    use crate::devices::{Devices, table};

    fn bridge() -> Devices {
        Devices::new(&[table::describe("pci0", SavedHostBridge::KIND).unwrap()], FakeVm::host()).unwrap()
    }

    fn port<const N: usize>(devices: &Devices, port: u16) -> [u8; N] {
        let mut data = [0; N];
        devices.bus().port_read(port, &mut data);
        data
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let devices = bridge();
        let bus = devices.bus();
        assert_eq!(port::<4>(&devices, 0xcfc), [0xff; 4], "not enabled");
        // As Linux looks for this mechanism (arch/x86/pci/direct.c, pci_check_type1).
        bus.port_write(0xcfb, &[1]);
        bus.port_write(0xcf8, &0x8000_0003_u32.to_le_bytes());
        assert_eq!(port::<4>(&devices, 0xcf8), 0x8000_0000_u32.to_le_bytes());
        assert_eq!(port::<4>(&devices, 0xcfc), [0x36, 0x1b, 8, 0]);
        assert_eq!((port::<2>(&devices, 0xcfe), port::<1>(&devices, 0xcfd)), ([8, 0], [0x1b]));
        let mut ecam = [0; 4];
        bus.memory_read(ECAM.start, &mut ecam);
        assert_eq!(ecam, [0x36, 0x1b, 8, 0]);
        bus.memory_write(ECAM.start + 0x3c, &[0x5a]);
        bus.port_write(0xcf8, &0x8000_003c_u32.to_le_bytes());
        assert_eq!(port::<1>(&devices, 0xcfc), [0x5a]);
        bus.port_write(0xcfc, &[0x11, 0x22]);
        bus.memory_read(ECAM.start + 0x3c, &mut ecam);
        assert_eq!(ecam, [0x11, 0, 0, 0], "of the two, one register can be written");
    }

    #[test]
    fn nobody_is_in_other_slots_functions_and_buses() {
        let devices = bridge();
        for address in [0x8000_0800_u32, 0x8000_0100, 0x8001_0000, 0x80ff_ff00] {
            devices.bus().port_write(0xcf8, &address.to_le_bytes());
            assert_eq!(port::<4>(&devices, 0xcfc), [0xff; 4]);
            devices.bus().port_write(0xcfc, &[0; 4]);
        }
        let mut data = [0; 8];
        for address in [ECAM.start + 0x1000, ECAM.start + 0x8000, ECAM.end - 8, PCI_WINDOW.start, PCI_WINDOW.end - 8] {
            devices.bus().memory_read(address, &mut data);
            assert_eq!(data, [0xff; 8]);
            devices.bus().memory_write(address, &data);
        }
        devices.bus().memory_read(ECAM.start + 0xffc, &mut data[..4]);
        assert_eq!(data[..4], [0; 4], "no extended capability");
    }
}
