//! Which side runs the guest: exactly one, by what both consoles say.

use anyhow::{Context, Result, ensure};
use thermocline::control::RunState;

use crate::machine::Machine;
use crate::process::Ended;

/// Checks that the source still runs the guest and the destination, which has ended with `code`, never did. Gives the
/// destination's sentence.
///
/// # Errors
/// When it is otherwise.
pub fn source_only(source: &mut Machine, destination: &Machine, code: i32) -> Result<String> {
    let ended = destination.process.wait().context("the destination")?;
    let sentence = ended.sentence(code).context("the destination")?.to_owned();
    gone_without_guest(destination, &ended)?;
    source.must_go_on().context("the source")?;
    Ok(sentence)
}

/// Checks that a destination that has ended never ran the guest, and left no socket behind.
///
/// # Errors
/// When it did.
pub fn gone_without_guest(destination: &Machine, ended: &Ended) -> Result<()> {
    destination.console.must_be_silent().context("the destination")?;
    // Killed, it could not clean up.
    ensure!(ended.code().is_none() || !destination.api.exists(), "the destination left its API socket behind");
    Ok(())
}

/// Checks that the destination runs the guest and the source, which was told so, has ended.
///
/// # Errors
/// When it is otherwise.
pub fn destination_only(source: &Machine, destination: &mut Machine) -> Result<()> {
    let ended = source.process.wait().context("the source")?;
    ensure!(ended.code() == Some(0), "the source ended with {}: {:?}", ended.status, ended.stderr);
    ensure!(!source.api.exists(), "the source left its API socket behind");
    destination.must_go_on().context("the destination")?;
    crate::console::must_continue(source.console.output(), destination.console.output())
}

/// Checks that the source holds the guest, standing, because it may run elsewhere.
///
/// # Errors
/// When it is otherwise.
pub fn source_paused(source: &Machine) -> Result<()> {
    let state = source.status()?.state;
    ensure!(state == RunState::HandedOver, "the source is {state:?}");
    source.console.must_be_paused().context("the source")?;
    let (refused, _) = source.ctl(&["resume"])?;
    let sentence = refused.sentence(1).context("resume without --force")?;
    ensure!(sentence.contains("--force"), "{sentence:?} does not say what to do");
    source.console.must_be_paused().context("the source")
}
