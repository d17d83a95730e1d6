//! A network namespace with taps of its own, and the two ends of a tap: frames of its interface, and its file.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use rustix::net::netdevice::name_to_index;
use rustix::net::{
    AddressFamily, MMsgHdr, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, recv, sendmmsg,
    socket_with, sockopt,
};

use crate::network::{add_bridge, add_tap, enter, remove, run, there};
use crate::sys;

/// IEEE Std 802's first ethertype for local experiments, which the embedded guest's frames have.
pub const ETHERTYPE: u16 = 0x88b5;
/// Every ethertype, and both directions (include/uapi/linux/if_ether.h, `ETH_P_ALL`).
pub const ALL: u16 = 3;
/// The address of a network's bridge.
pub const BRIDGE: &str = "02:00:00:00:00:01";
/// Bytes that wait to be received.
const BUFFER: usize = 8 << 20;

/// A network namespace with taps, gone when this is dropped.
#[derive(Debug)]
pub struct TapNetwork {
    name: String,
}

impl TapNetwork {
    /// Taps of these names that nobody else sees: they are up, and have vnet headers.
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn new(taps: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tct{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let network = Self { name };
        let name = &network.name;
        there().push(name.clone());
        run(&format!("ip netns add {name}"))?;
        run(&format!("ip -n {name} link set lo up"))?;
        taps.iter().try_for_each(|tap| add_tap(name, tap))?;
        Ok(network)
    }

    /// Joins the taps by a bridge `b0`, so that what comes from one goes to the others; it is a station of its own, [`BRIDGE`].
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn bridge(&self, taps: &[&str]) -> Result<()> {
        add_bridge(&self.name, taps)?;
        run(&format!("ip -n {} link set b0 address {BRIDGE}", self.name))
    }

    /// What a command begins with that is to see the taps.
    pub fn prefix(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.name]
    }

    /// An interface of it, for whichever thread: its frames of this ethertype, or [all of them](ALL). A bridge takes
    /// what comes in at its ports before whoever wants one ethertype of a port sees it.
    ///
    /// # Errors
    /// When it is not there, or the kernel refuses.
    pub fn interface(&self, name: &str, ethertype: u16) -> Result<Interface> {
        self.within(|| Interface::of_type(name, ethertype))
    }

    /// Does something in the namespace. Sockets that are made there stay there, and so do threads that are started.
    ///
    /// # Errors
    /// When the kernel refuses, or the work fails.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                self.enter()?;
                work()
            });
            there.join().ok().context("the thread in the network panicked")?
        })
    }

    /// Gives an interface another MTU.
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn set_mtu(&self, name: &str, bytes: u16) -> Result<()> {
        run(&format!("ip -n {} link set {name} mtu {bytes}", self.name))
    }

    /// Takes an interface away, as an administrator would.
    ///
    /// # Errors
    /// When `ip` cannot do it.
    pub fn delete(&self, name: &str) -> Result<()> {
        run(&format!("ip -n {} link del {name}", self.name))
    }

    /// Puts the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        enter(&self.name)
    }
}

impl Drop for TapNetwork {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Frames of the embedded guest's kind, as they come and go at an interface.
#[derive(Debug)]
pub struct Interface(OwnedFd);

impl Interface {
    /// The interface of this name where the calling thread is. Without `receives` it only sends, and nothing of what
    /// goes by is copied.
    ///
    /// # Errors
    /// When it is not there, or the kernel refuses.
    pub fn open(name: &str, receives: bool) -> Result<Self> {
        Self::of_type(name, if receives { ETHERTYPE } else { 0 })
    }

    fn of_type(name: &str, ethertype: u16) -> Result<Self> {
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        let index = name_to_index(&socket, name).with_context(|| format!("the interface {name}"))?;
        if ethertype != 0 {
            // What a guest sends at once is to have room before anybody takes it.
            sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        }
        sys::bind_packet(&socket, index, ethertype)?;
        Ok(Self(socket))
    }

    /// Sends frames, all at once; how many of them went.
    ///
    /// # Errors
    /// When there is no room for the first, or the kernel refuses.
    pub fn send(&self, frames: &[Vec<u8>]) -> io::Result<usize> {
        let slices: Vec<_> = frames.iter().map(|frame| [IoSlice::new(frame)]).collect();
        let mut ancillary: Vec<_> = frames.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> =
            slices.iter().zip(&mut ancillary).map(|(slice, none)| MMsgHdr::new(slice, none)).collect();
        Ok(sendmmsg(&self.0, &mut messages, SendFlags::empty())?)
    }

    /// The next frame; `None` when there is none now.
    ///
    /// # Errors
    /// When the interface is down or gone.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [MaybeUninit::uninit(); 2048];
        match recv(&self.0, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(((bytes, _), _)) => Ok(Some(bytes.to_vec())),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Opens the file of a tap where the calling thread is, as a monitor does. Frames have a vnet header of 10 bytes.
///
/// # Errors
/// When it is not there, or the kernel refuses.
pub fn open_tap(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    sys::attach_tap(&file, name).with_context(|| format!("the tap {name}"))?;
    Ok(file)
}
