//! The network between two hosts' guests, and the stream that crosses it, without a guest: without it nobody could tell a fault of
//! theirs from one of a migration's.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use harness::network::Network;
use linux_guest::stream::{OF_GUEST, OF_HOST, receive, send};
use thermocline_tests::console::eventually;
use thermocline_tests::stream_peer::{Bytes, StreamPeer};
use thermocline_tests::{Trials, trial};

const ADDRESS: [u8; 4] = [172, 31, 10, 1];
const SECOND: &str = "172.31.10.2/24";
const BYTES: u64 = 1 << 20;

pub(crate) fn add(trials: &mut Trials) {
    trial!(trials, [Root, Tap], a_stream_crosses_the_network_of_guests);
    trial!(trials, [Root, Tap], a_byte_that_changes_ends_the_stream);
}

/// A connection from the second host to a peer on the first.
fn connect() -> Result<(Network, StreamPeer, TcpStream)> {
    let network = Network::new()?;
    network.add_guest_network("tap0", &format!("{}/24", IpAddr::from(ADDRESS)))?;
    let [ip, words @ ..] = network.prefix(1);
    let added = Command::new(ip).args(words).args(["ip", "address", "add", SECOND, "dev", "b0"]).status()?;
    ensure!(added.success(), "the second host has no address: {added}");
    let address = SocketAddr::from((ADDRESS, 7007));
    let peer = StreamPeer::listen(address, || network.enter(0))?;
    let connection = std::thread::scope(|scope| {
        let connect = || {
            network.enter(1)?;
            TcpStream::connect(address).context("no connection")
        };
        scope.spawn(connect).join().map_err(|_| anyhow!("panicked"))?
    })?;
    Ok((network, peer, connection))
}

fn a_stream_crosses_the_network_of_guests() -> Result<()> {
    let (_network, peer, connection) = connect()?;
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let (sent, received, peer) = std::thread::scope(|scope| {
        let sender =
            scope.spawn(|| send(&connection, OF_GUEST, Duration::ZERO, &sent, || over.load(Ordering::Relaxed)));
        let receiver = scope.spawn(|| {
            let received = receive(&connection, OF_HOST, &AtomicU64::new(0));
            over.store(true, Ordering::Relaxed);
            received
        });
        let enough = eventually("bytes go both ways", || {
            let now = peer.so_far();
            Ok(now.received > BYTES && now.sent > BYTES)
        });
        let peer = peer.end();
        let joined = (sender.join(), receiver.join());
        enough?;
        let (Ok(sent), Ok(received)) = joined else { return Err(anyhow!("panicked")) };
        Ok((sent.map_err(anyhow::Error::msg)?, received.map_err(anyhow::Error::msg)?, peer?))
    })?;
    ensure!(peer == Bytes { received: sent, sent: received }, "{peer:?}, not {sent} and {received}");
    Ok(())
}

fn a_byte_that_changes_ends_the_stream() -> Result<()> {
    let (_network, peer, connection) = connect()?;
    // Of another stream.
    let _ = send(&connection, OF_HOST, Duration::ZERO, &AtomicU64::new(0), || false);
    let end = peer.end();
    let why = format!("{:#}", end.err().context("nobody has noticed")?);
    ensure!(why.starts_with("the guest's stream: byte 0 is"), "{why}");
    Ok(())
}
