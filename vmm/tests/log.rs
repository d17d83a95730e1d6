//! What is logged of a migration says which one, and which side of it, in whatever thread it happens.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop with what it saw")]

mod support;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use support::{Fake, receive};
use thermocline::migration::SourceMachine;
use thermocline::migration::cancel::Cancel;
use thermocline::migration::link::{Link, Listener};
use thermocline::migration::progress::Progress;
use thermocline::migration::source::{self, Options};

/// A log that can be read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What stands between these two in a line.
fn between<'l>(line: &'l str, before: &str, behind: &str) -> Option<&'l str> {
    Some(line.split_once(before)?.1.split_once(behind)?.0)
}

#[test]
fn a_migration_has_one_name_in_both_logs() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).init();
    for _ in 0..2 {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let receiving = receive(listener, true, |_| Ok(Arc::new(Fake::new())));
        let source = Fake::new();
        SourceMachine::resume(&source);
        let (link, cancel) = (Link::connect(&address).unwrap(), Cancel::default());
        source::migrate(&source, link, &Options::default(), None, &cancel, &mut |_: &Progress| {}).unwrap();
        receiving.arrives().unwrap();
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let mut sides: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in text.lines() {
        let id = between(line, "migration{id=", " side=").unwrap_or_else(|| panic!("of no migration: {line}"));
        sides.entry(id).or_default().push(between(line, " side=\"", "\"").unwrap());
    }
    assert_eq!(sides.len(), 2, "{text}");
    for said in sides.values() {
        assert!(said.contains(&"source") && said.contains(&"destination"), "{text}");
    }
}
