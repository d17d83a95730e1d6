//! What the guest says on its console: one JSON object a line, named by its only key.
//!
//! The image writes these with `Display`, the host library reads them with serde (see `Line`); the same types serve
//! both, so that neither can drift from the other.

use core::fmt;

use crate::extents::{Extent, Extents};

/// Defines a line's type with its `Display`: the key, and fields in order, each with its JSON form.
macro_rules! lines {
    ($($(#[$doc:meta])* $key:literal $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(not(workload_image), derive(serde::Deserialize))]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut comma = "";
                f.write_str(concat!("{\"", $key, "\":{"))?;
                $(
                    write!(f, concat!("{}\"", stringify!($field), "\":{}"), comma, Json(&self.$field))?;
                    comma = ",";
                )*
                let _ = comma;
                f.write_str("}}")
            }
        }
    )*};
}
pub(crate) use lines;

lines! {
    /// The first line after a good boot: every page is written and the work begins.
    "ready" Ready {
        /// vCPUs at work.
        cpus: u32,
        /// Seed of the page contents.
        seed: u64,
        /// Where the working set lies.
        working_set: Extents,
        /// Where the cold pages lie.
        cold: Extents,
        /// Where the generations of the working set's pages lie: a little-endian `u32` a page.
        table: Extents,
        /// Ticks of the time-stamp counter a millisecond.
        tsc_khz: u64,
        /// How that was found.
        tsc_from: TscSource,
        /// Time from the image's first instruction to this line.
        boot_us: u64,
    }

    /// Ten times a second: how the work goes.
    "report" Report {
        /// Whether the pages are being worked on.
        state: State,
        /// Page operations since boot, over all vCPUs.
        iterations: u64,
        /// Pages compared since boot: operations, checks of everything and touches.
        checked: u64,
        /// Pages found to be other than written, since boot.
        errors: u64,
        /// The longest time any vCPU was kept from running since `reset-stall` or boot.
        longest_stall_us: u64,
        /// Time since the image's first instruction.
        now_us: u64,
    }

    /// The answer to `check`.
    "checked_all" CheckedAll {
        /// Pages compared, working set and cold.
        pages: u64,
        /// How many of them were wrong.
        errors: u64,
        /// How long it took.
        took_us: u64,
    }

    /// The answer to `touch-cold`.
    "touched" Touched {
        /// Pages read and compared.
        pages: u64,
        /// How many of them were wrong.
        errors: u64,
        /// How long it took.
        took_us: u64,
        /// The longest that one page took: what a fault on it costs.
        longest_us: u64,
    }

    /// A page that does not hold what was written; only the first few are told.
    "bad" Bad {
        /// Its guest physical address.
        page: u64,
        /// The first wrong word, 0 to 511.
        word: u32,
        /// What was written there.
        expected: u64,
        /// What is there.
        found: u64,
    }

    /// An exception; the machine powers off.
    "panic" Panic {
        /// Exception number.
        vector: u64,
        /// Error code, 0 for exceptions that have none.
        code: u64,
        /// Where it happened.
        rip: u64,
        /// The address of the last page fault.
        cr2: u64,
        /// vCPU it happened on.
        cpu: u32,
    }
}

/// Whether the guest works on its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(workload_image), derive(serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum State {
    /// Pages are checked and rewritten.
    Running,
    /// After `stop`.
    Stopped,
}

/// Where the guest learned how fast its time-stamp counter runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(workload_image), derive(serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum TscSource {
    /// The hypervisor's paravirtual clock.
    Kvmclock,
    /// A CPUID leaf.
    Cpuid,
    /// Measured against the programmable interval timer.
    Pit,
    /// Nothing to measure by: 1 GHz is a guess and times are wrong.
    Assumed,
}

/// A command was understood and is being obeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(workload_image), derive(serde::Deserialize))]
pub struct Ack<T> {
    /// The command's text.
    pub command: T,
}

impl<T: fmt::Display> fmt::Display for Ack<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"ack\":{{\"command\":{}}}}}", Quoted(&self.command))
    }
}

/// Something was refused: a command line, and then the machine powers off, or a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(workload_image), derive(serde::Deserialize))]
pub struct Error<T> {
    /// What, and what would be accepted.
    pub message: T,
}

impl<T: fmt::Display> fmt::Display for Error<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"error\":{{\"message\":{}}}}}", Quoted(&self.message))
    }
}

/// A field's JSON form.
pub(crate) struct Json<'a, T>(pub(crate) &'a T);

macro_rules! json {
    ($($type:ty: $format:expr),* $(,)?) => {$(
        impl fmt::Display for Json<'_, $type> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let format: fn(&$type, &mut fmt::Formatter<'_>) -> fmt::Result = $format;
                format(self.0, f)
            }
        }
    )*};
}

json! {
    u32: |value, f| write!(f, "{value}"),
    u64: |value, f| write!(f, "{value}"),
    Extents: |value, f| write!(f, "{value}"),
    State: |value, f| f.write_str(match value {
        State::Running => "\"running\"",
        State::Stopped => "\"stopped\"",
    }),
    TscSource: |value, f| f.write_str(match value {
        TscSource::Kvmclock => "\"kvmclock\"",
        TscSource::Cpuid => "\"cpuid\"",
        TscSource::Pit => "\"pit\"",
        TscSource::Assumed => "\"assumed\"",
    }),
}

/// A JSON string.
struct Quoted<T>(T);

impl<T: fmt::Display> fmt::Display for Quoted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        f.write_char('"')?;
        write!(Escape(f), "{}", self.0)?;
        f.write_char('"')
    }
}

struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(self.0, "\\{c}"),
            '\0'..' ' => write!(self.0, "\\u{:04x}", c as u32),
            _ => self.0.write_char(c),
        })
    }
}

impl From<Extent> for Extents {
    fn from(extent: Extent) -> Self {
        let mut extents = Self::default();
        let _ = extents.push(extent);
        extents
    }
}
