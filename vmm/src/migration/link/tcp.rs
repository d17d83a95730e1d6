//! TCP.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// A connection that comes about in less than this stays in one building.
const NEAR: Duration = Duration::from_millis(1);

/// Connects to the first address of the host that answers.
pub(super) fn connect(host_port: &str, limit: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in host_port.to_socket_addrs()? {
        let started = Instant::now();
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => {
                if started.elapsed() < NEAR {
                    do_not_pace(&stream);
                }
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Takes plain congestion control where the host's default is one that paces (BBR): its timers took a sixth of a migration's
/// time over a link whose round trip is too short to need pacing.
fn do_not_pace(stream: &TcpStream) {
    if rustix::net::sockopt::tcp_congestion(stream).is_ok_and(|name| name.starts_with("bbr")) {
        // Where cubic is not allowed, the default goes on to serve.
        let _ = rustix::net::sockopt::set_tcp_congestion(stream, "cubic");
    }
}

/// Small messages leave at once, and a peer whose host is gone is noticed though nothing is written.
pub(super) fn set_up(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, silence / 3)?;
    sockopt::set_tcp_keepintvl(stream, silence / 6)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, silence.as_millis() as u32)?;
    Ok(())
}
