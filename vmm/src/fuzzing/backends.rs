//! Devices whose other ends are sockets of this process.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use super::queues::queues_of;
use crate::devices::host::Backends;
use crate::devices::table;
use crate::devices::virtio::net::{self, NetConfig, Tap};
use crate::devices::virtio::vsock::{self, VsockConfig, VsockSocket};

/// Most frames that come to the guest in one run.
const FRAMES: usize = 8;

/// One run with a network interface, for which some frames are waiting.
pub fn net(data: &[u8]) {
    let (ours, peer) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    peer.set_nonblocking(true).unwrap();
    let (&frames, data) = data.split_first().unwrap_or((&0, data));
    for number in 0..usize::from(frames) % FRAMES {
        // One that the socket does not take is lost.
        let _ = peer.send(&vec![7; 12 + 900 * number]);
    }
    let config = NetConfig { mac: [2; 6].into(), mtu: 1500, pairs: 1, udp_segmentation: true };
    let description = table::describe("net0", net::KIND).unwrap().with_config(&config).unwrap();
    let tap = Arc::new(Tap::of_descriptors(vec![ours.into()]));
    let backends = Backends { nets: [(description.id.clone(), tap.into())].into(), ..Backends::default() };
    queues_of(&description, &backends, data);
}

thread_local! {
    static SOCKET: Arc<VsockSocket> = Arc::new(VsockSocket::bind(&socket_path()).unwrap());
}

fn socket_path() -> PathBuf {
    std::env::temp_dir().join(format!("thermocline-fuzz-{}", std::process::id()))
}

/// One run with sockets, to which a program of the host connects, and where the guest reaches nobody.
pub fn vsock(data: &[u8]) {
    let socket = SOCKET.with(Arc::clone);
    let program = UnixStream::connect(socket.path()).unwrap();
    let _ = std::io::Write::write(&mut &program, b"CONNECT 52\nsome bytes");
    let config = VsockConfig { cid: 3 };
    let description = table::describe("vsock0", vsock::KIND).unwrap().with_config(&config).unwrap();
    let backends = Backends { vsocks: [(description.id.clone(), socket)].into(), ..Backends::default() };
    queues_of(&description, &backends, data);
}
