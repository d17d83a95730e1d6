//! A connection: bytes both ways, each wait bounded.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::{Address, CONNECT_LIMIT, LinkError, SILENCE_LIMIT, tcp, unix};

/// A connection.
///
/// A read or a write waits for [`SILENCE_LIMIT`] at most, or until the deadline of this handle, if it has one. A write that has
/// to wait ends as soon as the other side has hung up: nobody in this protocol says its last word and goes on to listen for long.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    deadline: Option<Instant>,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// When nobody answers in time.
    pub fn connect(address: &Address) -> Result<Self, LinkError> {
        match address {
            Address::Tcp(host_port) => tcp::connect(host_port, CONNECT_LIMIT).map(Self::of_tcp),
            Address::Unix(path) => unix::connect(path, CONNECT_LIMIT).map(Self::of_unix),
        }
        .map_err(|cause| LinkError::Connect { address: address.clone(), cause })?
        .map_err(LinkError::Setup)
    }

    /// Sets up a connection over TCP.
    pub(super) fn of_tcp(stream: TcpStream) -> io::Result<Self> {
        tcp::set_up(&stream, SILENCE_LIMIT)?;
        Self::new(stream.into())
    }

    /// Sets up a connection over a Unix socket.
    pub(super) fn of_unix(stream: UnixStream) -> io::Result<Self> {
        unix::set_up(&stream)?;
        Self::new(stream.into())
    }

    fn new(socket: OwnedFd) -> io::Result<Self> {
        set_socket_timeout(&socket, Timeout::Recv, Some(SILENCE_LIMIT))?;
        Ok(Self { socket, deadline: None })
    }

    /// A second handle of the same connection, to read with while the first writes, with the same deadline.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, deadline: self.deadline })
    }

    /// Ends one or both directions.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        // Fails when the connection is gone, which is what was wanted.
        let _ = rustix::net::shutdown(&self.socket, how);
    }

    /// Until when everything that is read or written through this handle has to be done, however it comes: a byte at a time does
    /// not make it later.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Lets reads wait for as long as the connection lives: that the other side's host is gone is noticed all the same.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn wait_for_ever(&self) -> io::Result<()> {
        Ok(set_socket_timeout(&self.socket, Timeout::Recv, None)?)
    }

    /// Reads what has come, and waits for nothing: `WouldBlock` when that is nothing.
    ///
    /// # Errors
    /// When the connection has failed.
    pub fn read_now(&self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self, bytes, RecvFlags::DONTWAIT)?.0)
    }

    /// Waits until one of `events` is there; which are.
    fn wait(&self, events: PollFlags) -> io::Result<PollFlags> {
        let limit = match self.deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()).min(SILENCE_LIMIT),
            None => SILENCE_LIMIT,
        };
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.socket, events)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            // Whoever waits tries again, and finds that the time is over if it is.
            Ok(_) | Err(Errno::INTR) => Ok(fds[0].revents()),
            Err(e) => Err(e.into()),
        }
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

impl TryFrom<TcpStream> for Link {
    type Error = io::Error;

    fn try_from(stream: TcpStream) -> io::Result<Self> {
        Self::of_tcp(stream)
    }
}

impl TryFrom<UnixStream> for Link {
    type Error = io::Error;

    fn try_from(stream: UnixStream) -> io::Result<Self> {
        Self::of_unix(stream)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.deadline.is_none() {
            return Ok(rustix::net::recv(&self.socket, bytes, RecvFlags::empty())?.0);
        }
        loop {
            if self.is_late() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.read_now(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN)?,
                done => return done,
            };
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            if self.is_late() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.socket, slices, &mut SendAncillaryBuffer::default(), flags) {
                Err(Errno::AGAIN) => {}
                done => return Ok(done?),
            }
            // With an error there is room: the next attempt says which.
            let events = self.wait(PollFlags::OUT | PollFlags::RDHUP)?;
            if events.contains(PollFlags::RDHUP) && !events.contains(PollFlags::OUT) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the other side has hung up"));
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Far less than anybody waits for silence.
    const AT_ONCE: Duration = Duration::from_secs(5);

    /// Both ends of a connection: ours, and what another program would have.
    fn connections() -> Vec<(Link, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        vec![(Link::try_from(ours).unwrap(), theirs.into()), (Link::try_from(tcp).unwrap(), accepted.into())]
    }

    /// Writes until that has to wait, tells so, and gives what became of it.
    fn write_until_it_fails(mut link: Link, is_full: impl FnOnce()) -> io::Error {
        let bytes = vec![0; 1 << 20];
        let probe = link.try_clone().unwrap();
        let mut is_full = Some(is_full);
        loop {
            if probe.wait_now(PollFlags::OUT).is_empty()
                && let Some(tell) = is_full.take()
            {
                tell();
            }
            if let Err(e) = link.write(&bytes) {
                return e;
            }
        }
    }

    impl Link {
        fn wait_now(&self, events: PollFlags) -> PollFlags {
            let mut fds = [PollFd::new(&self.socket, events)];
            poll(&mut fds, Some(&Timespec::default())).unwrap();
            fds[0].revents()
        }
    }

    #[test]
    fn a_writer_that_waits_sees_at_once_that_the_other_side_has_hung_up() {
        for how in [rustix::net::Shutdown::Write, rustix::net::Shutdown::Both] {
            for (link, theirs) in connections() {
                let (full, is_full) = channel();
                let writer =
                    thread::spawn(move || write_until_it_fails(link, move || full.send(Instant::now()).unwrap()));
                is_full.recv().unwrap();
                // The window is full and nobody reads: what is in it stays there.
                rustix::net::shutdown(&theirs, how).unwrap();
                let started = Instant::now();
                let error = writer.join().unwrap();
                assert!(started.elapsed() < AT_ONCE, "{how:?}: {error}");
                assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{how:?}: {error}");
            }
        }
    }

    #[test]
    fn last_words_behind_a_full_window_are_read() {
        for (mut link, theirs) in connections() {
            let (full, is_full) = channel();
            let writing = link.try_clone().unwrap();
            let writer = thread::spawn(move || write_until_it_fails(writing, move || full.send(()).unwrap()));
            is_full.recv().unwrap();
            rustix::io::write(&theirs, b"no").unwrap();
            rustix::net::shutdown(&theirs, rustix::net::Shutdown::Write).unwrap();
            writer.join().unwrap();
            let mut word = String::new();
            link.read_to_string(&mut word).unwrap();
            assert_eq!(word, "no");
        }
    }

    #[test]
    fn a_deadline_is_not_made_later_by_a_byte_now_and_then() {
        const SOON: Duration = Duration::from_millis(300);
        for (mut link, theirs) in connections() {
            let started = Instant::now();
            link.set_deadline(Some(started + SOON));
            let ticking = thread::spawn(move || {
                while rustix::net::send(&theirs, b".", SendFlags::NOSIGNAL).is_ok() {
                    thread::sleep(SOON / 20);
                }
            });
            let error = link.read_exact(&mut [0; 1000]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!((SOON..SOON + AT_ONCE).contains(&started.elapsed()), "{:?}", started.elapsed());
            drop(link);
            ticking.join().unwrap();
        }
    }
}
