//! Somebody between two hosts who passes on every connection, and can cut them all and let nobody through for a while.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use crate::stop::locked;

/// The connections between two hosts.
#[derive(Debug)]
pub struct Cutter {
    address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
    closed: Arc<AtomicBool>,
}

impl Cutter {
    /// Passes on what comes to `to`, a `tcp:` address.
    ///
    /// # Errors
    /// When the host has no port left.
    pub fn new(to: &str) -> Result<Self> {
        let to = to.strip_prefix("tcp:").context("not a TCP address")?.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        let open = Arc::new(Mutex::new(Vec::new()));
        let closed = Arc::new(AtomicBool::new(false));
        let cutter = Self { address, open: Arc::clone(&open), closed: Arc::clone(&closed) };
        std::thread::spawn(move || {
            for from in listener.incoming().map_while(Result::ok) {
                let Ok(to) = TcpStream::connect(&to) else { continue };
                if closed.load(Ordering::SeqCst) || pass(&from, &to).is_err() {
                    continue;
                }
                locked(&open).extend([from, to]);
            }
        });
        Ok(cutter)
    }

    /// Where to connect in place of the other host.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        for stream in locked(&self.open).drain(..) {
            // One that is over already is cut enough.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Cuts all connections and lets nobody through.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.cut();
    }
}

/// Copies both ways until either ends.
fn pass(a: &TcpStream, b: &TcpStream) -> Result<()> {
    for (from, to) in [(a, b), (b, a)] {
        from.set_nodelay(true)?;
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
