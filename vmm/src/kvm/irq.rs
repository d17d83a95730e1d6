//! Interrupts and I/O events of a VM: KVM's routing table, irqfds and ioeventfds.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::Vm;
use crate::arch::x86_64::layout::IRQCHIP_LINES;
use crate::devices::host::{Interrupts, IoEvents, Message, MessageInterrupts};

/// Most routes of a VM (include/linux/kvm_host.h, `KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: usize = 4096;
/// Lines of the two PICs, eight pins each.
const PIC_LINES: u32 = 16;
const PIC_PINS: u32 = 8;

/// The messages of all GSIs behind the irqchip's lines, `None` for those that have none yet.
#[derive(Debug, Default)]
pub(super) struct MessageRoutes(Mutex<Vec<Option<Message>>>);

impl MessageRoutes {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Message>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn io_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

fn to_pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let u = kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
}

fn to_message(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let Message { address, data } = message;
    let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
    let msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

/// The whole table: the irqchip's lines as KVM has them from the start (arch/x86/kvm/irq.c, `default_routing`), then messages.
fn table(messages: &[Option<Message>]) -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for line in 0..IRQCHIP_LINES {
        entries.push(to_pin(line, KVM_IRQCHIP_IOAPIC, line));
        if line < PIC_LINES {
            let pic = if line < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            entries.push(to_pin(line, pic, line % PIC_PINS));
        }
    }
    let routed = (IRQCHIP_LINES..).zip(messages).filter_map(|(gsi, message)| Some(to_message(gsi, (*message)?)));
    entries.extend(routed);
    entries
}

/// Message interrupts with consecutive GSIs.
#[derive(Debug)]
struct Messages {
    vm: Vm,
    /// Where its messages begin among all.
    first: usize,
    /// An irqfd each, from when it has a message.
    events: Vec<OnceLock<EventFd>>,
}

impl Messages {
    /// Makes the interrupt's irqfd, if it has none yet.
    fn connect(&self, interrupt: u16) -> io::Result<()> {
        let event = self.event(interrupt)?;
        if event.get().is_none() {
            let made = EventFd::new(libc::EFD_NONBLOCK)?;
            let gsi = IRQCHIP_LINES + (self.first + usize::from(interrupt)) as u32;
            self.vm.fd().register_irqfd(&made, gsi).map_err(io_error)?;
            // Nobody else sets it: whoever routes holds the table's lock.
            let _ = event.set(made);
        }
        Ok(())
    }

    fn event(&self, interrupt: u16) -> io::Result<&OnceLock<EventFd>> {
        self.events.get(usize::from(interrupt)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl MessageInterrupts for Messages {
    fn route(&self, messages: &[(u16, Message)]) -> io::Result<()> {
        let mut routes = self.vm.message_routes().lock();
        let mut changed = routes.clone();
        for (interrupt, message) in messages {
            self.event(*interrupt)?;
            changed[self.first + usize::from(*interrupt)] = Some(*message);
        }
        // Costs KVM a grace period of all who use the table.
        if changed != *routes {
            let entries = KvmIrqRouting::from_entries(&table(&changed)).map_err(|_| io::ErrorKind::OutOfMemory)?;
            self.vm.fd().set_gsi_routing(&entries).map_err(io_error)?;
            *routes = changed;
        }
        messages.iter().try_for_each(|(interrupt, _)| self.connect(*interrupt))
    }

    fn trigger(&self, interrupt: u16) -> io::Result<()> {
        self.event(interrupt)?.get().map_or(Ok(()), |event| event.write(1))
    }
}

impl Interrupts for Vm {
    fn line(&self, line: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK)?;
        self.fd().register_irqfd(&event, line).map_err(io_error)?;
        Ok(event)
    }

    fn messages(&self, count: u16) -> io::Result<Arc<dyn MessageInterrupts>> {
        let mut routes = self.message_routes().lock();
        let (first, end) = (routes.len(), routes.len() + usize::from(count));
        if end + table(&[]).len() > MAX_ROUTES {
            return Err(io::Error::other("the machine has too many message interrupts"));
        }
        routes.resize(end, None);
        let events = (0..count).map(|_| OnceLock::new()).collect();
        Ok(Arc::new(Messages { vm: self.clone(), first, events }))
    }
}

impl IoEvents for Vm {
    fn add(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.fd().register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io_error)
    }

    fn remove(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.fd().unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io_error)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvm_bindings::{kvm_irqchip, kvm_lapic_state};
    use kvm_ioctls::VcpuFd;

    use super::*;
    use crate::ram::GuestRam;

    /// Offsets of the local APIC's registers (Intel SDM, volume 3, table 11-1).
    const SPURIOUS: usize = 0xf0;
    const REQUESTED: usize = 0x200;

    fn vm() -> Option<(Vm, VcpuFd)> {
        let vm = Vm::new(Arc::new(GuestRam::new(16 << 20).unwrap()));
        let vm = vm.inspect_err(|e| command_line::note(format_args!("not run: {e}"))).ok()?;
        let vcpu = vm.fd().create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // Enabled by software.
        lapic.regs[SPURIOUS + 1] |= 1;
        vcpu.set_lapic(&lapic).unwrap();
        Some((vm, vcpu))
    }

    fn is_requested(lapic: &kvm_lapic_state, vector: u8) -> bool {
        lapic.regs[REQUESTED + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8)] as u8 >> (vector % 8) & 1
            == 1
    }

    fn arrives(vcpu: &VcpuFd, vector: u8) -> bool {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !is_requested(&vcpu.get_lapic().unwrap(), vector) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    #[test]
    fn messages_and_lines_both_arrive() {
        let Some((vm, vcpu)) = vm() else { return };
        let line = vm.line(10).unwrap();
        let (one, two) = (vm.messages(2).unwrap(), vm.messages(3).unwrap());
        one.trigger(0).unwrap();
        let to = |vector: u32| Message { address: 0xfee0_0000, data: vector };
        one.route(&[(1, to(0x41))]).unwrap();
        two.route(&[(0, to(0x52)), (2, to(0x63))]).unwrap();
        one.trigger(1).unwrap();
        two.trigger(2).unwrap();
        assert!(arrives(&vcpu, 0x41) && arrives(&vcpu, 0x63));
        assert!(!is_requested(&vcpu.get_lapic().unwrap(), 0x52));
        two.route(&[(0, to(0x74)), (2, to(0x63))]).unwrap();
        two.trigger(0).unwrap();
        assert!(arrives(&vcpu, 0x74));

        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        vm.fd().get_irqchip(&mut chip).unwrap();
        let mut io_apic = crate::kvm::convert::io_apic_from_kvm(&chip).unwrap();
        // Vector 0x85, an edge, to the first vCPU, not masked.
        io_apic.redirtbl[10] = 0x85;
        vm.fd().set_irqchip(&crate::kvm::convert::io_apic_to_kvm(&io_apic)).unwrap();
        line.write(1).unwrap();
        assert!(arrives(&vcpu, 0x85), "the irqchip's lines are still routed");
    }

    #[test]
    fn there_are_not_endless_messages_nor_two_events_at_one_address() {
        let Some((vm, _)) = vm() else { return };
        assert!(vm.messages(4000).is_ok());
        assert!(vm.messages(100).is_err());
        assert!(vm.messages(10).unwrap().route(&[(10, Message::default())]).is_err());
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        vm.add(0xc000_3000, &event).unwrap();
        assert!(vm.add(0xc000_3000, &event).is_err());
        vm.remove(0xc000_3000, &event).unwrap();
        assert!(vm.remove(0xc000_3000, &event).is_err());
        vm.add(0xc000_3000, &event).unwrap();
    }
}
