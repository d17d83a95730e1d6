//! Which device answers at which port and at which guest physical address.

use std::ops::Range;
use std::sync::Arc;

use super::{DeviceError, RegisterAccess, StopReason};
use crate::record::Name;

/// Ranges of one address space that do not overlap, each with whoever answers there.
#[derive(Clone)]
struct Space {
    name: &'static str,
    /// In order.
    ranges: Vec<(Range<u64>, Name, Arc<dyn RegisterAccess>)>,
}

impl Space {
    fn new(name: &'static str) -> Self {
        Self { name, ranges: Vec::new() }
    }

    fn insert(&mut self, range: Range<u64>, id: &Name, access: Arc<dyn RegisterAccess>) -> Result<(), DeviceError> {
        let space = self.name;
        if range.is_empty() {
            return Err(DeviceError::NoRange { id: id.clone(), space, start: range.start, end: range.end });
        }
        // Before the first that ends behind where this one starts: if any overlaps it, that one does.
        let at = self.ranges.partition_point(|(other, ..)| other.end <= range.start);
        if let Some((other, other_id, _)) = self.ranges.get(at).filter(|(other, ..)| other.start < range.end) {
            let both = if other.start < range.start { (other_id, id) } else { (id, other_id) };
            return Err(DeviceError::Overlap {
                first: both.0.clone(),
                second: both.1.clone(),
                space,
                start: other.start.max(range.start),
                end: other.end.min(range.end),
            });
        }
        self.ranges.insert(at, (range, id.clone(), access));
        Ok(())
    }

    /// Who answers at `address`, at which offset, and how many bytes there are from there to the end.
    fn find(&self, address: u64) -> Option<(&dyn RegisterAccess, u64, u64)> {
        let at = self.ranges.partition_point(|(range, ..)| range.end <= address);
        let (range, _, access) = self.ranges.get(at).filter(|(range, ..)| range.start <= address)?;
        Some((access.as_ref(), address - range.start, range.end - address))
    }

    fn find_all_of(&self, address: u64, length: usize) -> Option<(&dyn RegisterAccess, u64)> {
        let (access, offset, rest) = self.find(address)?;
        (length as u64 <= rest).then_some((access, offset))
    }
}

/// Everything that a vCPU can reach but RAM. Where no device is, reads give ones and writes go nowhere, as on a PC.
#[derive(Clone)]
pub struct Bus {
    ports: Space,
    memory: Space,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = |space: &Space| space.ranges.iter().map(|(range, id, _)| (range.clone(), id.clone())).collect();
        let (ports, memory): (Vec<_>, Vec<_>) = (ranges(&self.ports), ranges(&self.memory));
        f.debug_struct("Bus").field("ports", &ports).field("memory", &memory).finish()
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self { ports: Space::new("port"), memory: Space::new("address") }
    }
}

impl Bus {
    /// Has `access` answer at `ports`.
    ///
    /// # Errors
    /// When there are none, or another device answers at one of them.
    pub fn add_ports(
        &mut self,
        ports: Range<u64>,
        id: &Name,
        access: Arc<dyn RegisterAccess>,
    ) -> Result<(), DeviceError> {
        self.ports.insert(ports, id, access)
    }

    /// Has `access` answer at guest physical `addresses`.
    ///
    /// # Errors
    /// When there are none, or another device answers at one of them.
    pub fn add_memory(
        &mut self,
        addresses: Range<u64>,
        id: &Name,
        access: Arc<dyn RegisterAccess>,
    ) -> Result<(), DeviceError> {
        self.memory.insert(addresses, id, access)
    }

    /// An `in` instruction of the guest.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.ports.find(port.into()) {
            Some((device, offset, _)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// An `out` instruction of the guest.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        let (device, offset, _) = self.ports.find(port.into())?;
        device.write(offset, data)
    }

    /// A read of the guest where no RAM is. One that is not all in one device's range meets nobody.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.memory.find_all_of(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of the guest where no RAM is, as [`Bus::memory_read`].
    pub fn memory_write(&self, address: u64, data: &[u8]) -> Option<StopReason> {
        let (device, offset) = self.memory.find_all_of(address, data.len())?;
        device.write(offset, data)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Says who it is and at which offset it was read.
    struct Echo(u8);

    impl RegisterAccess for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 << 4 | offset as u8 & 0xf);
        }

        fn write(&self, offset: u64, _: &[u8]) -> Option<StopReason> {
            Some(StopReason::Failed(format!("{} {offset}", self.0)))
        }
    }

    fn name(number: usize) -> Name {
        format!("echo{number}").try_into().unwrap()
    }

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0..60_u64, 0..14_u64).prop_map(|(start, length)| start..start + length), 0..12)
    }

    proptest! {
        #[test]
        fn it_answers_as_a_list_that_is_searched_from_the_start(asked in ranges(), length in 1..9_usize) {
            let mut bus = Bus::default();
            let mut naive: Vec<(Range<u64>, u8)> = Vec::new();
            for (number, range) in asked.into_iter().enumerate() {
                let is_free = naive.iter().all(|(other, _)| range.end <= other.start || other.end <= range.start);
                let echo = || Arc::new(Echo(number as u8));
                let ports = bus.add_ports(range.clone(), &name(number), echo());
                let memory = bus.add_memory(range.clone(), &name(number), echo());
                prop_assert_eq!(ports.is_ok(), is_free && !range.is_empty());
                prop_assert_eq!(memory.is_ok(), is_free && !range.is_empty());
                if ports.is_ok() {
                    naive.push((range, number as u8));
                }
            }
            for address in 0..80 {
                let found = naive.iter().find(|(range, _)| range.contains(&address));
                let (mut port, mut memory) = ([0], vec![0; length]);
                bus.port_read(address as u16, &mut port);
                bus.memory_read(address, &mut memory);
                let byte = found.map(|(range, number)| number << 4 | (address - range.start) as u8 & 0xf);
                prop_assert_eq!(port[0], byte.unwrap_or(0xff));
                let whole = found.filter(|(range, _)| address + length as u64 <= range.end).and(byte);
                prop_assert_eq!(memory, vec![whole.unwrap_or(0xff); length]);
                prop_assert_eq!(bus.port_write(address as u16, &[0]).is_some(), found.is_some());
                prop_assert_eq!(bus.memory_write(address, &vec![0; length]).is_some(), whole.is_some());
            }
        }
    }

    #[test]
    fn who_overlaps_is_named() {
        let mut bus = Bus::default();
        bus.add_memory(0x1000..0x2000, &name(1), Arc::new(Echo(1))).unwrap();
        let refused = bus.add_memory(0x1800..0x2800, &name(2), Arc::new(Echo(2))).unwrap_err().to_string();
        assert!(refused.contains("'echo1' and 'echo2' both answer at address 0x1800 to 0x2000"), "{refused}");
        let refused = bus.add_ports(5..5, &name(3), Arc::new(Echo(3))).unwrap_err().to_string();
        assert!(refused.contains("'echo3'"), "{refused}");
        // Two spaces: the same numbers are other places.
        bus.add_ports(0x1800..0x2800, &name(2), Arc::new(Echo(2))).unwrap();
    }

    #[test]
    fn the_last_port_can_be_had() {
        let mut bus = Bus::default();
        bus.add_ports(0xffff..0x1_0000, &name(1), Arc::new(Echo(1))).unwrap();
        let mut byte = [0];
        bus.port_read(0xffff, &mut byte);
        assert_eq!(byte, [0x10]);
    }
}
