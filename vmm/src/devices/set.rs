//! The devices of one machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::{Host, Ports};
use super::{Bus, Device, DeviceDescription, DeviceError, Handover, table};
use crate::record::{Parts, Record, RecordError};
use crate::stopwatch::{Stopwatch, Work};

/// All devices of a machine, in the order in which they were described.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    devices: Vec<Arc<dyn Device>>,
    bus: Bus,
    ports: Ports,
    stopwatch: Stopwatch,
}

impl Devices {
    /// Makes the devices of these descriptions, at rest.
    ///
    /// # Errors
    /// When one is not known, two are at the same place or of the same name, or the host refuses.
    pub fn new(descriptions: &[DeviceDescription], mut host: Host) -> Result<Self, DeviceError> {
        let made = descriptions.iter().map(|device| table::kind_of(device)?.make(device, &mut host));
        let devices = made.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { ports: host.ports, ..Self::of(devices)? })
    }

    fn of(devices: Vec<Arc<dyn Device>>) -> Result<Self, DeviceError> {
        let mut bus = Bus::default();
        for (number, device) in devices.iter().enumerate() {
            let id = &device.description().id;
            if devices[..number].iter().any(|other| other.description().id == *id) {
                return Err(DeviceError::Twice(id.clone()));
            }
            for (ports, access) in Arc::clone(device).ports() {
                bus.add_ports(ports, id, access)?;
            }
            for (addresses, access) in Arc::clone(device).memory() {
                bus.add_memory(addresses, id, access)?;
            }
        }
        Ok(Self { devices, bus, ports: Ports::default(), stopwatch: Stopwatch::default() })
    }

    /// Where vCPUs find them.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// What measures how long each takes to come to rest, to be restored and to go on.
    pub(crate) fn stopwatch(&self) -> &Stopwatch {
        &self.stopwatch
    }

    /// Those that somebody outside works with.
    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    /// What another host must be able to make.
    pub fn describe(&self) -> Vec<DeviceDescription> {
        self.devices.iter().map(|device| device.description().clone()).collect()
    }

    /// Has all of them come to rest, in order. The vCPUs are paused.
    ///
    /// # Errors
    /// When one is still at work after `limit`. All have been told, and the others are at rest.
    pub fn pause(&self, limit: Duration) -> Result<(), DeviceError> {
        let deadline = Instant::now() + limit;
        let mut result = Ok(());
        for device in &self.devices {
            let paused = self.stopwatch.time(Work::Stop, &device.description().id, || device.pause(deadline));
            if paused.is_err() && result.is_ok() {
                result = Err(DeviceError::Busy { id: device.description().id.clone(), limit });
            }
        }
        result
    }

    /// Lets all of them go on, the last one first.
    pub fn resume(&self) {
        for device in self.devices.iter().rev() {
            self.stopwatch.time(Work::Resume, &device.description().id, || device.resume());
        }
    }

    /// Has all of them take a step of their guest's way to another host, or back.
    ///
    /// # Errors
    /// The first that could not, or had not within `limit`. The others may have.
    pub fn hand_over(&self, step: Handover, limit: Duration) -> Result<(), DeviceError> {
        let deadline = Instant::now() + limit;
        self.devices.iter().map(|device| device.hand_over(step, deadline)).fold(Ok(()), Result::and)
    }

    /// Makes all of them what they were at the start. They are at rest.
    pub fn reset(&self) {
        for device in &self.devices {
            device.reset();
        }
    }

    /// The state of each. They are at rest.
    ///
    /// # Errors
    /// When one cannot be written down.
    pub fn save(&self) -> Result<Vec<Record>, RecordError> {
        self.devices.iter().map(|device| device.save()).collect()
    }

    /// Takes the record of each, and reads it; nothing is changed.
    ///
    /// # Errors
    /// When one is missing or makes no sense.
    pub fn check<'a>(&self, parts: &mut Parts<'a>) -> Result<Vec<&'a Record>, DeviceError> {
        let taken = self.devices.iter().map(|device| {
            let description = device.description();
            let record = parts.take(description.id.as_str(), description.kind.as_str())?;
            table::kind_of(description)?.check(record)?;
            Ok(record)
        });
        taken.collect()
    }

    /// Makes each what its record says, which [`Devices::check`] gave.
    ///
    /// # Errors
    /// When one says what cannot be.
    pub fn restore(&self, records: &[&Record]) -> Result<(), DeviceError> {
        self.devices.iter().zip(records).try_for_each(|(device, record)| {
            self.stopwatch.time(Work::Restore, &device.description().id, || device.restore(record))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::super::device::StillBusy;
    use super::super::testing::FakeVm;
    use super::super::{RegisterAccess, StopReason};
    use super::*;

    /// Works in a thread of somebody else's, and writes down what it is told.
    #[derive(Debug)]
    struct Worker {
        description: DeviceDescription,
        told: Arc<Mutex<Vec<String>>>,
        requests: Mutex<u32>,
        done: Condvar,
    }

    impl Worker {
        fn new(id: &str, told: &Arc<Mutex<Vec<String>>>) -> Arc<Self> {
            let description = DeviceDescription {
                id: id.try_into().unwrap(),
                kind: "worker".try_into().unwrap(),
                version: 1,
                features: 0,
                config: Vec::new(),
            };
            let (requests, done) = (Mutex::new(0), Condvar::new());
            Arc::new(Self { description, told: Arc::clone(told), requests, done })
        }

        fn tell(&self, what: &str) {
            self.told.lock().unwrap().push(format!("{what} {}", self.description.id));
        }

        fn finish(&self) {
            *self.requests.lock().unwrap() = 0;
            self.done.notify_all();
        }
    }

    impl Device for Worker {
        fn description(&self) -> &DeviceDescription {
            &self.description
        }
        fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
            self.tell("pause");
            let limit = deadline.saturating_duration_since(Instant::now());
            let requests = self.requests.lock().unwrap();
            let (requests, _) = self.done.wait_timeout_while(requests, limit, |requests| *requests > 0).unwrap();
            if *requests > 0 { Err(StillBusy) } else { Ok(()) }
        }
        fn resume(&self) {
            self.tell("resume");
        }
        fn reset(&self) {
            self.tell("reset");
        }
        fn save(&self) -> Result<Record, RecordError> {
            unreachable!("not asked here")
        }
        fn restore(&self, _: &Record) -> Result<(), DeviceError> {
            unreachable!("not asked here")
        }
        fn memory(self: Arc<Self>) -> Vec<(std::ops::Range<u64>, Arc<dyn RegisterAccess>)> {
            vec![(0x1000..0x2000, self)]
        }
    }

    impl RegisterAccess for Worker {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn write(&self, _: u64, _: &[u8]) -> Option<StopReason> {
            None
        }
    }

    /// Without registers, so that there can be several.
    #[derive(Debug)]
    struct Inner(Arc<Worker>);

    impl Device for Inner {
        fn description(&self) -> &DeviceDescription {
            self.0.description()
        }
        fn pause(&self, deadline: Instant) -> Result<(), StillBusy> {
            self.0.pause(deadline)
        }
        fn resume(&self) {
            self.0.resume();
        }
        fn reset(&self) {
            self.0.reset();
        }
        fn save(&self) -> Result<Record, RecordError> {
            self.0.save()
        }
        fn restore(&self, saved: &Record) -> Result<(), DeviceError> {
            self.0.restore(saved)
        }
    }

    fn two() -> (Arc<Worker>, Devices, Arc<Mutex<Vec<String>>>) {
        let told = Arc::default();
        let (first, second) = (Worker::new("worker0", &told), Worker::new("worker1", &told));
        let devices = Devices::of(vec![Arc::clone(&first) as _, Arc::new(Inner(second))]).unwrap();
        (first, devices, told)
    }

    #[test]
    fn they_stop_in_order_and_go_on_in_reverse() {
        let (_, devices, told) = two();
        devices.pause(Duration::from_secs(5)).unwrap();
        devices.reset();
        devices.resume();
        let order = ["pause worker0", "pause worker1", "reset worker0", "reset worker1", "resume worker1"];
        assert_eq!(told.lock().unwrap()[..5], order);
    }

    #[test]
    fn one_that_does_not_come_to_rest_is_named_and_the_others_are_told() {
        let (busy, devices, told) = two();
        *busy.requests.lock().unwrap() = 1;
        let refused = devices.pause(Duration::from_millis(1)).unwrap_err().to_string();
        assert!(refused.contains("'worker0'"), "{refused}");
        assert_eq!(told.lock().unwrap().len(), 2);
    }

    #[test]
    fn one_that_finishes_in_time_is_waited_for() {
        let (busy, devices, _) = two();
        *busy.requests.lock().unwrap() = 1;
        std::thread::scope(|scope| {
            scope.spawn(|| busy.finish());
            devices.pause(Duration::from_secs(60)).unwrap();
        });
    }

    #[test]
    fn they_answer_in_memory() {
        let (_, devices, _) = two();
        let mut byte = [0];
        devices.bus().memory_read(0x1fff, &mut byte);
        assert_eq!(byte, [7]);
        let told = Arc::default();
        let same = || Arc::new(Inner(Worker::new("worker0", &told))) as Arc<dyn Device>;
        assert!(matches!(Devices::of(vec![same(), same()]), Err(DeviceError::Twice(_))));
    }

    #[test]
    fn every_standard_device_is_made_and_restored_from_what_it_saved() {
        let standard = table::standard().unwrap();
        let make = || Devices::new(&standard, FakeVm::host()).unwrap();
        let devices = make();
        let serial = Arc::clone(&devices.ports().consoles[&"serial0".try_into().unwrap()]);
        assert_eq!(devices.describe(), standard);
        serial.receive(b"typed");
        let records = crate::record::Records(devices.save().unwrap());
        let other = make();
        let mut parts = records.by_part().unwrap();
        let taken = other.check(&mut parts).unwrap();
        parts.finish().unwrap();
        other.restore(&taken).unwrap();
        assert_eq!(crate::record::Records(other.save().unwrap()), records);
        other.reset();
        assert_eq!(other.save().unwrap(), make().save().unwrap());
        let twice = [standard.clone(), standard].concat();
        assert!(Devices::new(&twice, FakeVm::host()).is_err());
    }
}
