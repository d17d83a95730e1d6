//! The other side of a migration, played by a trial: whoever is not Thermocline, or is and behaves otherwise.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use thermocline::machine::MachineState;
use thermocline::migration::wire::message::{Incoming, receive, receive_message};
use thermocline::migration::wire::{Accepted, FrameReader, FrameWriter, Message, Offer, Refusal, preamble};

use crate::machine::Machine;
use crate::migration::How;
use crate::process::TIMEOUT;

/// A server for one connection.
#[derive(Debug)]
pub struct Server {
    /// Where it listens, for `--to`.
    pub address: String,
    thread: JoinHandle<Result<()>>,
}

impl Server {
    /// Takes one connection and does `serve` with it.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(serve: impl FnOnce(TcpStream) -> Result<()> + Send + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        listener.set_nonblocking(true)?;
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + TIMEOUT;
            let stream = loop {
                match listener.accept() {
                    Ok((stream, _)) => break stream,
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                        ensure!(Instant::now() < deadline, "nobody came");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(e) => return Err(e.into()),
                }
            };
            stream.set_nonblocking(false)?;
            set_limits(&stream)?;
            serve(stream)
        });
        Ok(Self { address, thread })
    }

    /// Waits until it has done its part.
    ///
    /// # Errors
    /// When it could not.
    pub fn finish(self) -> Result<()> {
        self.thread.join().ok().context("the server panicked")?.context("the server")
    }
}

fn set_limits(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(())
}

/// Connects to a machine that waits for its guest.
///
/// # Errors
/// When nobody answers.
pub fn connect(address: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(address.strip_prefix("tcp:").context("a TCP address")?)?;
    set_limits(&stream)?;
    Ok(stream)
}

/// Reads whatever comes until the other side ends the connection, or resets it.
pub fn read_to_end(mut stream: &TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut bytes) {
        all.extend_from_slice(&bytes[..n]);
    }
    all
}

/// Says `bytes`, then nothing more, and hears the other side out.
///
/// # Errors
/// When it cannot say them.
pub fn say(mut stream: TcpStream, bytes: &[u8]) -> Result<Vec<u8>> {
    // The other side may have heard enough before the end.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    Ok(read_to_end(&stream))
}

/// What a source offers: the offer itself, taken from a migration that is refused.
///
/// # Errors
/// When it offers nothing.
pub fn offer_of(source: &Machine, refusal: Refusal) -> Result<(Offer, String)> {
    let code =
        thermocline::exit::ExitCode::of_source(&thermocline::migration::source::SourceError::Refused(refusal.clone()));
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = Server::start(move |mut stream| {
        preamble::receive(&mut stream)?;
        preamble::send(&mut stream)?;
        let mut reader = FrameReader::new(stream.try_clone()?);
        let mut writer = FrameWriter::new(stream);
        match receive_message(&mut reader, "offer")? {
            Message::Offer(offer) => sender.send(offer)?,
            other => bail!("{} instead of an offer", other.name()),
        }
        Message::Refuse(refusal).send(&mut writer)?;
        read_to_end(writer.link());
        Ok(())
    })?;
    let sentence = source.migrate(&server.address, &How::usual())?.fails(code as i32)?;
    server.finish()?;
    Ok((receiver.recv()?, sentence))
}

/// A machine's state, taken from a migration to a destination that takes everything and then is gone.
///
/// # Errors
/// When no state comes.
pub fn state_of(source: &Machine) -> Result<MachineState> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = Server::start(move |mut stream| {
        preamble::receive(&mut stream)?;
        preamble::send(&mut stream)?;
        let mut reader = FrameReader::new(stream.try_clone()?);
        let mut writer = FrameWriter::new(stream);
        let mut payload = Vec::new();
        loop {
            match receive(&mut reader, &mut payload, u64::MAX)? {
                Incoming::Message(Message::Offer(_)) => {
                    Message::Accept(Accepted { can_page_out: false }).send(&mut writer)?;
                }
                Incoming::Message(Message::RoundEnd(round)) => Message::RoundDone(round).send(&mut writer)?,
                Incoming::Message(Message::State(state)) => return Ok(sender.send(state)?),
                _ => {}
            }
        }
    })?;
    source.migrate(&server.address, &How::usual())?.fails(16)?;
    server.finish()?;
    Ok(receiver.recv()?)
}

/// Offers a machine to a destination and gives what it answers.
///
/// # Errors
/// When it does not answer.
pub fn answer_to(address: &str, offer: Offer) -> Result<Message> {
    let mut stream = connect(address)?;
    preamble::send(&mut stream)?;
    preamble::receive(&mut stream)?;
    let mut reader = FrameReader::new(stream.try_clone()?);
    Message::Offer(offer).send(&mut FrameWriter::new(stream))?;
    Ok(receive_message(&mut reader, "accept")?)
}
