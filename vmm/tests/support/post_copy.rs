//! What post-copy sends, between two machines without KVM: the guest is a thread that reads and writes its memory where it
//! runs, faults are the kernel's own, and the connections go through somebody in the middle who cuts them.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use memory_agent::{ByteSize, Counts, Hint, PageNumber, PageState, Residency};
use thermocline::migration::cancel::Cancel;
use thermocline::migration::channels::Channels;
use thermocline::migration::link::{Address, Link, Listener};
use thermocline::migration::plan::ColdPolicy;
use thermocline::migration::progress::{Progress, Report};
use thermocline::migration::source::{self, Options, PostCopyControl, Switchover};
use thermocline::migration::wire::MigrationId;
use thermocline::migration::{Belief, SourceMachine};
use thermocline::ram::RamPage;
use vm_memory::{Bytes, GuestAddress};

use super::{Fake, PAGE, PAGES, Receiving, receive};

/// A guest that knows what is in its memory, wherever it runs.
pub(crate) struct Guest {
    pub(crate) truth: Vec<u8>,
    pub(crate) random: u64,
}

impl Guest {
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    /// Reads a page, checks it, and writes it now and then.
    pub(crate) fn step(&mut self, machine: &Fake) {
        let page = self.below(PAGES);
        let mut bytes = [0; PAGE];
        machine.ram.memory().read_slice(&mut bytes, GuestAddress(page * PAGE as u64)).unwrap();
        let expected = self.truth[page as usize];
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}: {} where {expected} was", bytes[0]);
        if self.below(3) == 0 {
            let value = self.below(200) as u8;
            machine.write(page, value);
            self.truth[page as usize] = value;
        }
    }
}

/// What becomes of a connection once so many bytes have gone to the destination over it.
#[derive(Clone, Copy)]
pub(crate) enum Fate {
    Cut(u64),
    /// It stays, and nothing more comes.
    Stall(u64),
}

/// Passes connections on, and cuts all of them when told to.
pub(crate) struct Middle {
    open: Arc<Mutex<Vec<UnixStream>>>,
    refuses: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    /// The connection of which each side keeps its end, whatever becomes of the other's.
    kept: Arc<AtomicUsize>,
}

impl Middle {
    /// `fates` are those of the first connections; all others live.
    pub(crate) fn new(here: &Path, there: &Path, fates: Vec<Fate>) -> Self {
        let listener = UnixListener::bind(here).unwrap();
        let open = Arc::new(Mutex::new(Vec::new()));
        let refuses = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let kept = Arc::new(AtomicUsize::new(usize::MAX));
        let (counter, keeping) = (Arc::clone(&connections), Arc::clone(&kept));
        let (there, passing, refusing) = (there.to_owned(), Arc::clone(&open), Arc::clone(&refuses));
        thread::spawn(move || {
            for (number, from) in listener.incoming().map_while(Result::ok).enumerate() {
                counter.fetch_add(1, Ordering::SeqCst);
                if refusing.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(to) = UnixStream::connect(&there) else { continue };
                let fate = fates.get(number).copied().unwrap_or(Fate::Cut(u64::MAX));
                for (from, mut to, fate) in [
                    (from.try_clone().unwrap(), to.try_clone().unwrap(), fate),
                    (to.try_clone().unwrap(), from.try_clone().unwrap(), Fate::Cut(u64::MAX)),
                ] {
                    let keeping = Arc::clone(&keeping);
                    thread::spawn(move || {
                        let (Fate::Cut(limit) | Fate::Stall(limit)) = fate;
                        let _ = std::io::copy(&mut (&from).take(limit), &mut to);
                        if let Fate::Stall(_) = fate {
                            // Until somebody cuts it.
                            let _ = std::io::copy(&mut &from, &mut std::io::sink());
                        }
                        if keeping.load(Ordering::SeqCst) != number {
                            let _ = to.shutdown(Shutdown::Both);
                            let _ = from.shutdown(Shutdown::Both);
                        }
                    });
                }
                passing.lock().unwrap().extend([from, to]);
            }
        });
        Self { open, refuses, connections, kept }
    }

    /// How many connections there have been so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// From now on nobody gets through, or somebody does again.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Cuts one of the connections that there are, counted from the first.
    pub(crate) fn cut_one(&self, number: usize) {
        let open = self.open.lock().unwrap();
        open.iter().skip(2 * number).take(2).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    /// What becomes of one end of this connection, counted from the first, is not seen at the other.
    pub(crate) fn keep(&self, number: usize) {
        self.kept.store(number, Ordering::SeqCst);
    }

    /// Cuts one of the connections that there are where the destination has it, and there alone.
    pub(crate) fn cut_at_destination(&self, number: usize) {
        self.keep(number);
        let open = self.open.lock().unwrap();
        open.iter().skip(2 * number + 1).take(1).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    pub(crate) fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

pub(crate) fn can_handle_faults() -> bool {
    let Some(why) = thermocline::ram::why_no_faults() else { return true };
    let must = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!must, "{why}");
    eprintln!("skipped: {why}");
    false
}

/// Holes that nobody takes for anything else; so few and far between that nobody looks at what is beside them.
pub(crate) const HOLES: [u64; 2] = [5, 250];

/// A machine whose pages come by post-copy, all but these holes: somebody believes that they are swapped.
pub(crate) fn believed_cold() -> Fake {
    let source = Fake::new();
    for page in (0..PAGES).filter(|page| page % 5 != 0) {
        source.write(page, page as u8 | 1);
    }
    let mut believed = Residency::uniform(PAGES, PageState::Swapped);
    HOLES.into_iter().for_each(|hole| believed.set(RamPage(hole).run(1), PageState::Hole));
    let believed = Hint::of(believed);
    *source.believed.lock().unwrap() = Some(Belief { hint: believed, probe: "liar" });
    SourceMachine::resume(&source);
    source
}

pub(crate) const LAZY: Options = Options {
    cold: ColdPolicy::Lazy,
    window: ByteSize::mib(16),
    downtime_limit: Duration::from_millis(300),
    max_rounds: 50,
    switchover: Switchover::Now,
    cold_rate: ByteSize(0),
};

/// Receives a machine and all that comes by post-copy.
pub(crate) fn receive_as(listener: Listener, once: bool, destination: &Arc<Fake>) -> Receiving {
    let destination = Arc::clone(destination);
    receive(listener, once, move |_| Ok(Arc::clone(&destination)))
}

pub(crate) struct Moved {
    pub(crate) report: Report,
    pub(crate) source: Arc<Fake>,
    pub(crate) destination: Arc<Fake>,
    pub(crate) truth: Vec<u8>,
}

/// Moves a guest whose every page is believed to be swapped, so that all of them come by post-copy; cuts the connections `cuts` times
/// once it runs there.
pub(crate) fn migrate(cold_rate: ByteSize, cuts: u32) -> Option<Moved> {
    migrate_among(cold_rate, cuts, 0)
}

/// The same, to this machine.
pub(crate) fn migrate_to(destination: Arc<Fake>, cold_rate: ByteSize, cuts: u32) -> Moved {
    move_guest(destination, cold_rate, cuts, 0)
}

/// The same while `strangers` more are connected to the destination at any time who have nothing to say.
pub(crate) fn migrate_among(cold_rate: ByteSize, cuts: u32, strangers: usize) -> Option<Moved> {
    can_handle_faults().then(|| move_guest(Arc::new(Fake::new()), cold_rate, cuts, strangers))
}

fn move_guest(destination: Arc<Fake>, cold_rate: ByteSize, cuts: u32, strangers: usize) -> Moved {
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front"), directory.path().join("back"));
    let listener = Listener::bind(&Address::Unix(back.clone())).unwrap();
    let middle = Middle::new(&front, &back, Vec::new());
    let source = Arc::new(believed_cold());
    let mut guest = Guest { truth: vec![0; PAGES as usize], random: 0x7e57 + u64::from(cuts) };
    for page in (0..PAGES).filter(|page| page % 5 != 0) {
        guest.truth[page as usize] = page as u8 | 1;
    }
    let ended = Arc::new(AtomicBool::new(false));
    let guest = thread::spawn({
        let (source, destination, ended) = (Arc::clone(&source), Arc::clone(&destination), Arc::clone(&ended));
        move || {
            while !ended.load(Ordering::SeqCst) {
                if destination.runs() {
                    guest.step(&destination);
                } else {
                    let _executing = source.executing.lock().unwrap();
                    if source.runs() {
                        guest.step(&source);
                    }
                }
                thread::sleep(Duration::from_micros(50));
            }
            guest.truth
        }
    });
    let receiving = receive_as(listener, strangers == 0, &destination);
    let crowd = move |there: &Path| -> Vec<_> { (0..strangers).map(|_| UnixStream::connect(there).unwrap()).collect() };
    let before = crowd(&back);
    let cutting = thread::spawn({
        let destination = Arc::clone(&destination);
        move || {
            let mut meanwhile = before;
            while !destination.runs() {
                thread::sleep(Duration::from_millis(1));
            }
            for n in 0..cuts {
                thread::sleep(Duration::from_millis(u64::from(2 + n * 7 % 11)));
                meanwhile = crowd(&back);
                middle.cut();
            }
            (middle, meanwhile)
        }
    });
    let address = Address::Unix(front);
    let post_copy_source = PostCopyControl::new(Channels::new(MigrationId::new().unwrap()), Some(address.clone()));
    let options = Options { cold_rate, ..LAZY };
    let report = source::migrate(
        source.as_ref(),
        Link::connect(&address).unwrap(),
        &options,
        Some(&Arc::new(post_copy_source)),
        &Cancel::default(),
        &mut |_: &Progress| {},
    )
    .unwrap();
    receiving.arrives().unwrap();
    ended.store(true, Ordering::SeqCst);
    let truth = guest.join().unwrap();
    drop(cutting.join().unwrap());
    Moved { report, source, destination, truth }
}

impl Moved {
    pub(crate) fn must_be_whole(&self) {
        assert!(!self.source.runs() && self.destination.runs());
        assert_eq!(
            self.source.ram.counts().unwrap(),
            Counts { hole: PAGES, ..Counts::default() },
            "left at the source"
        );
        let content = self.destination.content();
        for (page, (bytes, expected)) in content.chunks(PAGE).zip(&self.truth).enumerate() {
            assert!(bytes.iter().all(|byte| byte == expected), "page {page}");
        }
    }
}
