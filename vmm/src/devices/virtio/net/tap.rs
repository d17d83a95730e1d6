//! The other end of the cable: a tap interface of the host (Linux, Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, netdevice};

use super::config::NetConfig;
use super::sys;

/// Bytes of the header before each frame (VIRTIO 1.2, 5.1.6, `struct virtio_net_hdr` with `num_buffers`).
pub(super) const HEADER: usize = 12;
/// By which taps are made.
const TUN: &str = "/dev/net/tun";
/// Most frames of a queue that are dropped at once: more than wait where nobody has changed `txqueuelen`, which is 1000.
const MOST_WAITING: usize = 4096;
/// How a queue of a tap is opened, but for `IFF_MULTI_QUEUE`.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Which tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// The interface of this name.
    Name(String),
    /// A descriptor that whoever has started this program has opened.
    Descriptor(i32),
}

/// Why a tap cannot be the other end.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No driver.
    #[error(
        "{TUN} cannot be opened, by which taps are made: {cause}; load the kernel's module tun (`modprobe tun`), and in a container pass the device in"
    )]
    NoDriver {
        /// What the host said.
        cause: io::Error,
    },
    /// No such interface.
    #[error("there is no interface '{name}' on this host; make one: {}", make(.name, *.queues))]
    Missing {
        /// Its name.
        name: String,
        /// How many queues it needs.
        queues: u16,
    },
    /// Somebody else has it.
    #[error("the tap '{0}' is in use by another program: take another tap for each guest, or end that program")]
    Busy(String),
    /// It is somebody else's.
    #[error("the tap '{name}' is not this user's, who may not open it; make it anew: ip link del {name}; {}", make(.name, *.queues))]
    NotOurs {
        /// Its name.
        name: String,
        /// How many queues it needs.
        queues: u16,
    },
    /// It is something else.
    #[error("the interface '{name}' is not a tap; make one of another name: {}", make("NAME", *.queues))]
    NotATap {
        /// Its name.
        name: String,
        /// How many queues it needs.
        queues: u16,
    },
    /// It has one queue.
    #[error("the tap '{name}' has one queue, and {queues} are asked for; make it anew: ip link del {name}; {}", make(.name, *.queues))]
    OneQueue {
        /// Its name.
        name: String,
        /// How many queues it needs.
        queues: u16,
    },
    /// The descriptor is none.
    #[error(
        "the descriptor {0} is not open: whoever starts this program opens the tap and leaves it open (no FD_CLOEXEC)"
    )]
    NotOpen(i32),
    /// The descriptor is of something else.
    #[error(
        "the descriptor {0} is not an open tap: it has to be {TUN} with TUNSETIFF and IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    NotATapDescriptor(i32),
    /// A descriptor is one queue.
    #[error("a descriptor is one queue, and {0} are asked for: leave queues out, or name the tap")]
    OneDescriptor(u16),
    /// The host refuses.
    #[error("the tap '{name}' cannot be used ({call}): {cause}")]
    Host {
        /// Its name.
        name: String,
        /// The call.
        call: &'static str,
        /// What the host said.
        cause: io::Error,
    },
    /// Another MTU.
    #[error(
        "the tap '{name}' has an MTU of {tap} bytes, and the guest would have {asked}; make them one: ip link set {name} mtu {asked}"
    )]
    Mtu {
        /// Its name.
        name: String,
        /// What it has.
        tap: u32,
        /// What was asked for.
        asked: u16,
    },
}

/// The command that makes a tap which can be used.
fn make(name: &str, queues: u16) -> String {
    let multi_queue = if queues > 1 { " multi_queue" } else { "" };
    format!("ip tuntap add dev {name} mode tap user $USER vnet_hdr{multi_queue}; ip link set {name} up")
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<OwnedFd>,
    mtu: u32,
    has_udp_segmentation: bool,
}

impl Tap {
    /// Opens this many queues of the tap.
    ///
    /// # Errors
    /// When there is no such tap, or it cannot be used.
    pub fn open(source: &TapSource, queues: u16) -> Result<Self, TapError> {
        let (name, queues) = match source {
            TapSource::Name(name) => (name.clone(), open_named(name, queues)?),
            TapSource::Descriptor(_) if queues != 1 => return Err(TapError::OneDescriptor(queues)),
            TapSource::Descriptor(number) => open_descriptor(*number)?,
        };
        let host = |call| {
            let name = &name;
            move |cause| TapError::Host { name: name.clone(), call, cause }
        };
        for queue in &queues {
            sys::set_header_size(queue.as_fd(), HEADER as i32).map_err(host("TUNSETVNETHDRSZ"))?;
        }
        let mtu = mtu(&name).map_err(host("SIOCGIFMTU"))?;
        let set = |offload| queues.first().map_or(Ok(()), |queue| sys::set_offload(queue.as_fd(), offload));
        let has_udp_segmentation = set(libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        set(0).map_err(host("TUNSETOFFLOAD"))?;
        Ok(Self { name, queues, mtu, has_udp_segmentation })
    }

    /// One whose queues are these descriptors, whatever they are.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of_descriptors(queues: Vec<OwnedFd>) -> Self {
        Self { name: "test".into(), queues, mtu: 1500, has_udp_segmentation: true }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Most bytes of a packet.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Whether it cuts datagrams of UDP, and leaves them whole.
    pub fn has_udp_segmentation(&self) -> bool {
        self.has_udp_segmentation
    }

    /// Number of queues that are open.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Drops the frames that wait.
    ///
    /// # Errors
    /// When it has gone.
    pub(super) fn discard_waiting(&self) -> io::Result<()> {
        // What does not fit of a frame is dropped with it.
        let mut head = [0; 64];
        self.queues.iter().try_for_each(|queue| {
            for _ in 0..MOST_WAITING {
                match rustix::io::read(queue, &mut head) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(())
        })
    }

    /// What an interface like this needs of it and it has not: the end of a sentence.
    pub(super) fn why_not(&self, config: &NetConfig) -> Option<String> {
        let NetConfig { mtu, pairs, udp_segmentation, .. } = *config;
        let (name, opened) = (&self.name, self.queues());
        if opened < usize::from(pairs) {
            return Some(format!(
                "it has {pairs} pairs of queues, and the tap '{name}' is open {opened} times; say queues={pairs}"
            ));
        }
        if self.mtu < u32::from(mtu) {
            let tap = self.mtu;
            return Some(format!(
                "its MTU is {mtu} bytes, and that of the tap '{name}' {tap}; say ip link set {name} mtu {mtu}"
            ));
        }
        let is_missing = udp_segmentation && !self.has_udp_segmentation;
        is_missing.then(|| "the guest sends datagrams in one piece, for which the host needs Linux 6.2 or later".into())
    }

    /// One of its queues.
    pub(super) fn queue(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(index).map(AsFd::as_fd)
    }

    /// What is left for the reader of frames to do, for all queues.
    pub(super) fn set_offload(&self, offload: u32) -> io::Result<()> {
        self.queues.first().map_or(Ok(()), |queue| sys::set_offload(queue.as_fd(), offload))
    }

    /// Has the first `count` queues take part in what arrives, and no other. One that does so already stays.
    pub(super) fn attach(&self, count: usize) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            match sys::set_attached(queue.as_fd(), index < count) {
                // What it is already (tun_set_queue).
                Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
                attached => attached?,
            }
        }
        Ok(())
    }
}

fn open_named(name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    let missing = || TapError::Missing { name: name.into(), queues };
    let host = |cause: io::Error| TapError::Host { name: name.into(), call: "socket", cause };
    // The call that opens a tap makes one where there is none.
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(|e| host(e.into()))?;
    netdevice::name_to_index(&socket, name).map_err(|_| missing())?;
    let open = |flags: i32| -> Result<Result<OwnedFd, io::Error>, TapError> {
        let tun = open_tun()?;
        Ok(sys::set_interface(tun.as_fd(), name, flags).map(|()| tun))
    };
    let (one, many) = (FLAGS, FLAGS | libc::IFF_MULTI_QUEUE);
    let is_invalid =
        |opened: &Result<OwnedFd, io::Error>| opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL));
    // One with several queues says so each time that it is opened, and one without does not.
    let mut flags = if queues > 1 { many } else { one };
    let mut first = open(flags)?;
    if is_invalid(&first) && queues == 1 {
        flags = many;
        first = open(many)?;
    } else if is_invalid(&first) && !is_invalid(&open(one)?) {
        return Err(TapError::OneQueue { name: name.into(), queues });
    }
    let refused = |cause: io::Error| refusal(name, queues, cause);
    let mut opened = vec![first.map_err(refused)?];
    for _ in 1..queues {
        opened.push(open(flags)?.map_err(refused)?);
    }
    Ok(opened)
}

/// What the call that opens a tap means by its errors (Linux, `tun_set_iff`, `tun_attach`).
pub(super) fn refusal(name: &str, queues: u16, cause: io::Error) -> TapError {
    let name = name.to_owned();
    match cause.raw_os_error() {
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name),
        Some(libc::EPERM) => TapError::NotOurs { name, queues },
        Some(libc::EINVAL) => TapError::NotATap { name, queues },
        _ => TapError::Host { name, call: "TUNSETIFF", cause },
    }
}

fn open_tun() -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(TUN, flags, Mode::empty()).map_err(|e| TapError::NoDriver { cause: e.into() })
}

fn open_descriptor(number: i32) -> Result<(String, Vec<OwnedFd>), TapError> {
    let queue = sys::duplicate(number).map_err(|_| TapError::NotOpen(number))?;
    let (name, flags) = sys::interface(queue.as_fd()).map_err(|_| TapError::NotATapDescriptor(number))?;
    if flags & (FLAGS | libc::IFF_TUN) != FLAGS {
        return Err(TapError::NotATapDescriptor(number));
    }
    let host = |e: Errno| TapError::Host { name: name.clone(), call: "F_SETFL", cause: e.into() };
    let status = rustix::fs::fcntl_getfl(&queue).map_err(host)?;
    rustix::fs::fcntl_setfl(&queue, status | OFlags::NONBLOCK).map_err(host)?;
    Ok((name, vec![queue]))
}

fn mtu(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    sys::mtu(socket.as_fd(), name)
}
