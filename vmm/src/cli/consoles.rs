//! Where a machine's consoles go.

use anyhow::Context;
use clap::Args;
use command_line::End;

use crate::PROGRAM;
use crate::console::{ConsoleTarget, Consoles};
use crate::devices::table;
use crate::exit::ExitCode;

/// Where a machine's consoles go.
#[derive(Clone, Debug, Args)]
pub(super) struct ConsoleArguments {
    /// Where the serial port goes: `stdio`, `file=PATH` or `pty`.
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    serial: String,
    /// Where the virtio console (`hvc0`) goes: as the serial port, or `off` for none.
    #[arg(long, value_name = "TARGET", default_value = "off")]
    console: String,
}

impl ConsoleArguments {
    /// Whether there is a virtio console.
    pub(super) fn has_virtio(&self) -> bool {
        self.console != "off"
    }

    /// Checks what can be checked of them before they are opened.
    ///
    /// # Errors
    /// When one is not possible.
    pub(super) fn check(&self) -> Result<(), End> {
        self.targets().map(drop).map_err(|e| End::new(ExitCode::Usage, e))
    }

    /// Opens them, and says where pseudo-terminals are, for others to open.
    ///
    /// # Errors
    /// When one is not possible, or cannot be opened.
    pub(super) fn open(&self) -> Result<Consoles, End> {
        let targets = self.targets().map_err(|e| End::new(ExitCode::Usage, e))?;
        let consoles = Consoles::open(&targets).context("no console")?;
        for (id, pty) in consoles.ptys() {
            let what = if id.as_str() == table::SERIAL { "serial console" } else { "virtio console" };
            PROGRAM.say(format_args!("{what} on {}", pty.display()));
        }
        Ok(consoles)
    }

    fn targets(&self) -> anyhow::Result<Vec<(crate::record::Name, ConsoleTarget)>> {
        let mut targets = vec![(table::SERIAL.try_into()?, self.serial.parse()?)];
        if self.has_virtio() {
            targets.push((table::CONSOLE.try_into()?, self.console.parse()?));
        }
        Ok(targets)
    }
}
