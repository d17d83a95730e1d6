//! Reading what the guest says.

use serde::Deserialize;

use crate::device_report::{BadBlock, Balloon, Devices, Disk, DiskDone, Free, Hostile, Net, NetDone, RandomBytes};
use crate::report::{Ack, Bad, CheckedAll, Error, Panic, Ready, Report, Touched};

/// A line of the guest's console.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::large_enum_variant, reason = "a line is read and looked at, not kept: a box would only be in the way")]
pub enum Line {
    /// Booted; every page is written.
    Ready(Ready),
    /// How the work goes, ten times a second.
    Report(Report),
    /// The answer to `check`.
    CheckedAll(CheckedAll),
    /// The answer to `touch-cold`.
    Touched(Touched),
    /// A page that lost its contents.
    Bad(Bad),
    /// Which devices there are.
    Devices(Devices),
    /// How the disk goes, with each report.
    Disk(Disk),
    /// The end of a job of the disk.
    DiskDone(DiskDone),
    /// A block of the disk that is not as written.
    BadBlock(BadBlock),
    /// How the network goes, with each report.
    Net(Net),
    /// The end of a job of the network.
    NetDone(NetDone),
    /// The answer to `free-fill`, `free-report` and `free-check`.
    Free(Free),
    /// The answer to `balloon`.
    Balloon(Balloon),
    /// The answer to `random`.
    Random(RandomBytes),
    /// The answer to `hostile`.
    Hostile(Hostile),
    /// An exception; the machine powers off.
    Panic(Panic),
    /// A command line or command was refused.
    Error(Error<String>),
    /// A command was understood.
    Ack(Ack<String>),
}

impl Line {
    /// Reads one line, with or without its line end. Fields that this version does not know are passed over.
    ///
    /// # Errors
    ///
    /// The text is not JSON or not one of the lines above: firmware noise, or the tail of a line whose start was missed.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text.trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extents::Extents;
    use crate::report::{State, TscSource};
    use proptest::prelude::*;

    #[test]
    fn reads_what_the_image_writes() {
        let ready = Ready {
            cpus: 2,
            seed: u64::MAX,
            working_set: Extents::try_from(vec![(4 << 20, 8 << 20), (4 << 30, 4096)]).unwrap(),
            cold: Extents::default(),
            table: Extents::try_from(vec![(2 << 20, 8192)]).unwrap(),
            tsc_khz: 2_100_000,
            tsc_from: TscSource::Kvmclock,
            boot_us: 12_345,
        };
        assert_eq!(Line::parse(&ready.to_string()).unwrap(), Line::Ready(ready));
        for state in [State::Running, State::Stopped] {
            let report = Report { state, iterations: 1, checked: 2, errors: 3, longest_stall_us: 4, now_us: 5 };
            assert_eq!(Line::parse(&format!("{report}\r\n")).unwrap(), Line::Report(report));
        }
        let all = CheckedAll { pages: 1, errors: 2, took_us: 3 };
        assert_eq!(Line::parse(&all.to_string()).unwrap(), Line::CheckedAll(all));
        let touched = Touched { pages: 1, errors: 2, took_us: 3, longest_us: 4 };
        assert_eq!(Line::parse(&touched.to_string()).unwrap(), Line::Touched(touched));
        let bad = Bad { page: 4096, word: 511, expected: u64::MAX, found: 0 };
        assert_eq!(Line::parse(&bad.to_string()).unwrap(), Line::Bad(bad));
        let free = Free { pages: 1, zeros: 2, kept: 3, errors: 4, took_us: 5 };
        assert_eq!(Line::parse(&free.to_string()).unwrap(), Line::Free(free));
        let bytes = RandomBytes { bytes: 1, ones: 2, took_us: 3 };
        assert_eq!(Line::parse(&bytes.to_string()).unwrap(), Line::Random(bytes));
        let hostile = Hostile { status: 1, answered: 2, request_status: 3, works: 4, took_us: 5 };
        assert_eq!(Line::parse(&hostile.to_string()).unwrap(), Line::Hostile(hostile));
        let panic = Panic { vector: 14, code: 2, rip: 0x10_0000, cr2: u64::MAX, cpu: 1 };
        assert_eq!(Line::parse(&panic.to_string()).unwrap(), Line::Panic(panic));
    }

    #[test]
    fn unknown_fields_pass_and_noise_does_not() {
        let line = r#"{"checked_all":{"pages":1,"errors":0,"took_us":9,"later":true}}"#;
        assert!(matches!(Line::parse(line), Ok(Line::CheckedAll(all)) if all.pages == 1));
        for noise in ["", "SeaBIOS", "{", r#"{"report":{}}"#, r#"{"later":{}}"#] {
            assert!(Line::parse(noise).is_err(), "{noise}");
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_quoting(text: String) {
            let line = Ack { command: text.clone() }.to_string();
            prop_assert_eq!(line.lines().count(), 1);
            prop_assert_eq!(Line::parse(&line).unwrap(), Line::Ack(Ack { command: text.clone() }));
            let line = Error { message: text.clone() }.to_string();
            prop_assert_eq!(Line::parse(&line).unwrap(), Line::Error(Error { message: text }));
        }

        #[test]
        fn parsing_never_panics(text: String) {
            let _ = Line::parse(&text);
        }
    }
}
