//! Being asked to stop, by SIGINT or SIGTERM.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use command_line::End;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::exit::ExitCode;

/// Whether, and by what, this program has been asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<(Mutex<Asked>, Condvar)>);

#[derive(Debug, Default)]
struct Asked {
    stop: bool,
    terminate: bool,
}

impl Stop {
    /// From now on these signals ask, and end nothing by themselves.
    ///
    /// # Errors
    /// When they cannot be caught.
    pub(crate) fn on_signals() -> Result<Self, End> {
        let stop = Self::default();
        let signals = Signals::new([SIGINT, SIGTERM]);
        let mut signals = signals.map_err(|e| End::text(ExitCode::Failure, format!("cannot catch signals: {e}")))?;
        let asked = stop.clone();
        std::thread::spawn(move || {
            for signal in signals.forever() {
                asked.lock().terminate |= signal == SIGTERM;
                asked.ask();
            }
        });
        Ok(stop)
    }

    /// Asks to stop.
    pub(crate) fn ask(&self) {
        self.lock().stop = true;
        self.0.1.notify_all();
    }

    /// Whether it was asked for.
    pub(crate) fn is_asked(&self) -> bool {
        self.lock().stop
    }

    /// Whether SIGTERM was among the signals, which nobody types, and which was therefore meant for this process alone;
    /// tells it once.
    pub(crate) fn take_terminate(&self) -> bool {
        std::mem::take(&mut self.lock().terminate)
    }

    /// Waits so long, or until it is asked for; whether it was.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let waited = self.0.1.wait_timeout_while(self.lock(), time, |asked| !asked.stop);
        waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
