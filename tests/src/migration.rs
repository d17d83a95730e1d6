//! One migration, as `thermocline migrate --json` shows it.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use thermocline::migration::progress::{Phase, Progress, Report};

use crate::binary;
use crate::process::{Ended, Process, SLOWER, Standard};

/// Longer than any migration of the trials takes.
const LIMIT: Duration = Duration::from_secs(45 * SLOWER);

/// Far less than the half minute after which silence is taken for an end, on a busy machine too.
const AT_ONCE: Duration = Duration::from_secs(10 * SLOWER);

/// How to migrate: arguments after `--to`.
#[derive(Clone, Debug, Default)]
pub struct How(Vec<String>);

impl How {
    /// As it is without arguments.
    pub fn usual() -> Self {
        Self::default()
    }

    /// With these.
    pub fn with(arguments: &[&str]) -> Self {
        Self(arguments.iter().map(ToString::to_string).collect())
    }
}

/// A migration under way.
#[derive(Debug)]
pub struct Migration {
    /// The client.
    pub process: Process,
}

/// What a migration that succeeded said.
#[derive(Clone, Debug)]
pub struct Migrated {
    /// All progress.
    pub progress: Vec<Progress>,
    /// The result.
    pub report: Report,
}

fn parse<T: DeserializeOwned>(line: &str, key: &str) -> Option<Result<T>> {
    let value: serde_json::Value = match serde_json::from_str(line) {
        Ok(value) => value,
        Err(e) => return Some(Err(anyhow::anyhow!("not JSON: {line:?}: {e}"))),
    };
    let inner = value.get(key)?.clone();
    Some(serde_json::from_value(inner).with_context(|| format!("not a {key}: {line}")))
}

impl Migration {
    /// Starts it at the machine behind `api`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(api: &Path, to: &str, how: &How) -> Result<Self> {
        let mut command: Vec<OsString> = vec![binary::thermocline()?.into(), "migrate".into(), "--json".into()];
        command.extend(["--api-socket".into(), api.into(), "--to".into(), to.into()]);
        command.extend(how.0.iter().map(Into::into));
        Ok(Self { process: Process::start("migrate", &command, Standard::Pipes)? })
    }

    /// Waits until it shows something that `wanted` takes.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_for(&self, wanted: impl Fn(&Progress) -> bool) -> Result<Progress> {
        let found = self.process.stdout.wait_for(0, LIMIT, |line| match parse::<Progress>(line, "progress")? {
            Ok(progress) if wanted(&progress) => Some(Ok(progress)),
            Ok(_) => None,
            Err(e) => Some(Err(e)),
        });
        found.context("no such progress")?.1
    }

    /// Waits until it is in `phase`.
    ///
    /// # Errors
    /// When it does not come so far.
    pub fn wait_for_phase(&self, phase: Phase) -> Result<Progress> {
        self.wait_for(|progress| progress.phase == phase)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(&self) -> Result<Ended> {
        self.process.wait_within(LIMIT)
    }

    /// Waits for its end, which is a failure with `code` and one clear line; gives the line.
    ///
    /// # Errors
    /// When it is something else.
    pub fn fails(&self, code: i32) -> Result<String> {
        Ok(self.end()?.sentence(code)?.to_owned())
    }

    /// The same, at once: an end that can be seen is not waited for as silence is.
    ///
    /// # Errors
    /// As [`Migration::fails`], and when it takes longer than `AT_ONCE`.
    pub fn fails_at_once(&self, code: i32) -> Result<String> {
        let started = Instant::now();
        let sentence = self.fails(code)?;
        let took = started.elapsed();
        ensure!(took < AT_ONCE, "it took {took:?} to see: {sentence}");
        Ok(sentence)
    }

    /// Waits for its success, and checks that what it said on the way is sane.
    ///
    /// # Errors
    /// When it is none.
    pub fn succeeds(&self) -> Result<Migrated> {
        let ended = self.end()?;
        ensure!(ended.code() == Some(0), "the migration failed: {} {:?}", ended.status, ended.stderr);
        let lines = self.process.stdout.lines();
        let Some((last, before)) = lines.split_last() else { bail!("it said nothing") };
        let report = parse(last, "migrated").with_context(|| format!("the last line is {last:?}"))??;
        let progress = before
            .iter()
            .map(|line| parse::<Progress>(line, "progress").with_context(|| format!("not progress: {line:?}"))?)
            .collect::<Result<Vec<_>>>()?;
        let migrated = Migrated { progress, report };
        migrated.must_be_sane()?;
        Ok(migrated)
    }
}

impl Migrated {
    fn must_be_sane(&self) -> Result<()> {
        let Some(last) = self.progress.last() else { bail!("no progress") };
        let mut before: Option<&Progress> = None;
        for now in &self.progress {
            let shown = || format!("{now:?} after {before:?}");
            let delivered = now.pages.hole + now.pages.zero + now.pages.hot + now.pages.cold;
            ensure!(delivered <= now.pages_total, "more delivered than there is: {}", shown());
            ensure!(now.owed_hot + now.owed_cold <= now.pages_total, "more owed than there is: {}", shown());
            if let Some(before) = before {
                ensure!(now.elapsed_ms >= before.elapsed_ms, "time goes backwards: {}", shown());
                ensure!(now.bytes_sent >= before.bytes_sent, "bytes are taken back: {}", shown());
                ensure!(now.round >= before.round, "rounds are taken back: {}", shown());
                ensure!(now.resent >= before.resent, "pages are taken back: {}", shown());
                // Connections that break are made anew.
                let is_anew = (before.phase, now.phase) == (Phase::PostCopyPaused, Phase::PostCopy);
                ensure!(is_anew || now.phase as u8 >= before.phase as u8, "phases are taken back: {}", shown());
                ensure!(now.pages_total == before.pages_total, "the machine changes its size: {}", shown());
            }
            before = Some(now);
        }
        let report = &self.report;
        let classes = report.pages;
        let sum = classes.hole + classes.zero + classes.hot + classes.cold;
        ensure!(sum == last.pages_total, "{classes:?} is not {} pages", last.pages_total);
        let needless = report.post_copy.map_or(0, |post_copy| post_copy.needless);
        ensure!(
            report.bytes_sent >= (classes.hot + classes.cold - needless) * 4096,
            "fewer bytes than pages: {report:?}"
        );
        ensure!(report.bytes_sent >= last.bytes_sent, "bytes are taken back: {report:?}");
        ensure!(report.downtime_us / 1000 <= report.total_ms, "paused for longer than all of it took: {report:?}");
        let steps: u64 = report.downtime.steps.iter().map(|step| step.step.us).sum();
        ensure!((report.downtime.us, steps) == (report.downtime_us, report.downtime_us), "{:?}", report.downtime);
        ensure!(report.source.resident_peak >= report.source.resident_before, "{report:?}");
        ensure!(report.rounds >= 1 && report.rounds >= last.round, "{report:?}");
        if let Some(there) = report.destination {
            ensure!(there.total() == last.pages_total, "{there:?} is not {} pages", last.pages_total);
        }
        Ok(())
    }
}
