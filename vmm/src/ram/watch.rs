//! The memory agent of a machine: a thread that knows about what guest RAM is.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memory_agent::{Agent, AgentCost, AgentError, AgentMap, AgentOptions, Counts, Hint, Residency, Suspended, Target};

use super::{GuestRam, RamLayout, RamPage};

/// A map that is older is of no use to a migration.
const FRESH: Duration = Duration::from_secs(60);

/// A thread that keeps a map of guest RAM. It ends with this, or soon after: nobody waits for it, since on a busy host it
/// may not run for a while.
#[derive(Debug)]
pub struct RamWatch {
    agent: Arc<Agent>,
    layout: RamLayout,
}

impl RamWatch {
    /// Starts to watch.
    ///
    /// # Errors
    /// When the options are not possible.
    pub fn start(ram: Arc<GuestRam>, options: AgentOptions) -> Result<Self, AgentError> {
        let agent = Arc::new(Agent::new(options)?);
        let layout = ram.layout().clone();
        let watching = Arc::clone(&agent);
        let work = move || {
            let mappings = match ram.mappings() {
                Ok(mappings) => mappings,
                Err(e) => return tracing::warn!("guest RAM is not watched: {e}"),
            };
            let targets: Vec<_> = mappings.iter().map(|mapping| mapping as &dyn Target).collect();
            if let Err(e) = watching.watch(&targets) {
                tracing::warn!("guest RAM is not watched any more: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("memory-agent".into()).spawn(work) {
            tracing::warn!("guest RAM is not watched: {e}");
        }
        Ok(Self { agent, layout })
    }

    /// What the agent knows of guest RAM, all regions in one, and how old that is; `None` before it has seen everything.
    pub fn map(&self) -> Option<(Residency<RamPage>, Duration)> {
        let AgentMap { maps, age } = self.agent.map()?;
        let mut all = Residency::default();
        for (part, map) in self.layout.parts().zip(maps) {
            all.append(&map.renumbered(part.pages.start));
        }
        Some((all, age))
    }

    /// How many pages are in each state, and how old that is; `None` before the agent has seen everything.
    pub fn counts(&self) -> Option<(Counts, Duration)> {
        self.agent.counts()
    }

    /// The map as a hint, unless it is too old.
    pub fn hint(&self) -> Option<Hint<RamPage>> {
        self.map().filter(|(_, age)| *age < FRESH).map(|(map, _)| Hint::of(map))
    }

    /// What it has done and what that cost.
    pub fn cost(&self) -> AgentCost {
        self.agent.cost()
    }

    /// The probe it uses; empty before it has begun.
    pub fn probe(&self) -> &'static str {
        self.agent.probe()
    }

    /// Has it stand aside until the answer is dropped.
    pub fn suspend(&self) -> Suspended<'_> {
        self.agent.suspend()
    }
}

impl Drop for RamWatch {
    fn drop(&mut self) {
        self.agent.stop();
    }
}
