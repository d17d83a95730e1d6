//! Progress of a migration: a bar on a terminal, plain lines otherwise, JSON for machines.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use command_line::{Output, OutputError, note};
use indicatif::{ProgressBar, ProgressStyle};
use memory_agent::{ByteSize, PAGE_SIZE};

use crate::migration::progress::{Phase, Progress};

/// Plain lines come this often.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Where progress is shown.
pub(super) enum Shown {
    /// As JSON on standard output, and whether that still works.
    Json(Output, Result<(), OutputError>),
    /// As a bar on the terminal.
    Bar(ProgressBar),
    /// As lines on standard error.
    Lines {
        /// Phase of the last line, and when it was.
        last: Option<(Phase, Instant)>,
    },
}

impl Shown {
    pub(super) fn new(json: bool) -> Self {
        if json {
            return Self::Json(Output::default(), Ok(()));
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { last: None };
        }
        let bar = ProgressBar::new(1);
        let style = ProgressStyle::with_template("{bar:32.cyan/blue} {percent:>3}% {msg}");
        Self::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        match self {
            // The migration goes on, whatever becomes of those who look on.
            Self::Json(_, Err(_)) => {}
            Self::Json(output, written) => *written = output.print_json(&serde_json::json!({ "progress": progress })),
            Self::Bar(bar) => {
                bar.set_length(progress.pages_total);
                bar.set_position(
                    progress.pages_total - (progress.owed_hot + progress.owed_cold).min(progress.pages_total),
                );
                bar.set_message(line(progress));
            }
            Self::Lines { last } => {
                let due = last.is_none_or(|(phase, at)| phase != progress.phase || at.elapsed() >= LINE_EVERY);
                if due {
                    *last = Some((progress.phase, Instant::now()));
                    note(line(progress));
                }
            }
        }
    }

    /// The end of progress; gives standard output for what comes behind it.
    pub(super) fn finish(self) -> Result<Output, OutputError> {
        match self {
            Self::Json(output, written) => written.map(|()| output),
            Self::Bar(bar) => {
                bar.finish_and_clear();
                Ok(Output::default())
            }
            Self::Lines { .. } => Ok(Output::default()),
        }
    }
}

fn line(progress: &Progress) -> String {
    let phase = match progress.phase {
        Phase::Negotiating => "agreeing with the destination",
        Phase::Hot => "resident pages",
        Phase::Cold => "cold pages, a window at a time",
        Phase::Converging => "what the guest writes meanwhile",
        Phase::Switchover => "switchover",
        Phase::PostCopy => "the guest runs there; the rest comes by post-copy",
        Phase::PostCopyPaused => {
            "the guest runs there; the connection is gone, and what it needs is here: waiting for a new one"
        }
        Phase::PagingOut => "the guest runs there; its cold pages are paged out",
    };
    if let Some(post_copy) = &progress.post_copy {
        return format!(
            "{phase}: {} left here, {} given back, the guest waited for {} pages",
            ByteSize(progress.owed_cold * PAGE_SIZE),
            ByteSize(post_copy.given_back),
            post_copy.requested,
        );
    }
    let left = progress.left_ms.map_or(String::new(), |ms| format!(", {:.1} s left", ms as f64 / 1000.0));
    format!(
        "{phase}: round {}, {} sent at {}/s, guest writes {}/s, owed {} hot and {} cold{left}",
        progress.round,
        ByteSize(progress.bytes_sent),
        ByteSize(progress.bytes_per_second),
        ByteSize(progress.dirty_bytes_per_second),
        ByteSize(progress.owed_hot * PAGE_SIZE),
        ByteSize(progress.owed_cold * PAGE_SIZE),
    )
}
