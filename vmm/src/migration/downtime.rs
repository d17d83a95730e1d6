//! Where a guest's downtime goes: how long each step between its stop here and its first instruction there took, by the clock of
//! the side that did it. What is left of the whole is the network's and the waiting of one side for the other.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bounded::at_most;
use crate::record::Name;
use crate::stopwatch::{Step, Work};

/// Most steps that a destination may tell of: each of its devices, restored and resumed.
const MOST_STEPS: usize = 1024;

/// What is no device of a machine and takes part in its switchover.
const RAM: &str = "ram";
const STATE: &str = "state";
const NETWORK: &str = "network";

/// Steps of a side, as they travel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps(#[serde(deserialize_with = "at_most::<_, _, MOST_STEPS>")] pub Vec<Step>);

impl Steps {
    /// One more.
    fn add(&mut self, work: Work, part: &str, took: Duration) {
        // These names are ones.
        self.0.extend(Name::try_from(part).ok().map(|part| Step::new(work, part, took)));
    }

    /// What was measured, as much of it as a message may say.
    pub(super) fn of(mut steps: Vec<Step>) -> Self {
        steps.truncate(MOST_STEPS);
        Self(steps)
    }

    /// More of them, behind these.
    pub(super) fn extend(&mut self, steps: Vec<Step>) {
        self.0.extend(steps);
        self.0.truncate(MOST_STEPS);
    }

    /// One more, about guest RAM, that began then.
    pub(super) fn add_ram(&mut self, work: Work, since: Instant) {
        self.add(work, RAM, since.elapsed());
    }

    /// One more, about all that is saved, that began then.
    pub(super) fn add_state(&mut self, work: Work, since: Instant) {
        self.add(work, STATE, since.elapsed());
    }

    fn us(&self) -> u64 {
        self.0.iter().fold(0, |sum, step| sum.saturating_add(step.us))
    }
}

/// Which side did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The host that the guest leaves.
    Source,
    /// Neither: bytes on their way, and one side that waits for the other.
    Between,
    /// The host that it comes to.
    Destination,
}

/// A step and whose it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideStep {
    /// Which side.
    pub side: Side,
    /// What it did.
    #[serde(flatten)]
    pub step: Step,
}

/// A downtime by its steps, in their order. They add up to all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the guest's stop at the source to the destination's word that it runs, microseconds.
    pub us: u64,
    /// What took how long.
    pub steps: Vec<SideStep>,
}

impl Downtime {
    /// Of so long in all, with what each side says of its own. A destination may say nothing.
    pub(super) fn new(all: Duration, source: Steps, destination: Steps) -> Self {
        let us = all.as_micros() as u64;
        let rest = us.saturating_sub(source.us().saturating_add(destination.us()));
        let mut between = Steps::default();
        between.add(Work::Transfer, NETWORK, Duration::from_micros(rest));
        let sides = [(Side::Source, source), (Side::Between, between), (Side::Destination, destination)];
        let steps = sides
            .into_iter()
            .flat_map(|(side, Steps(steps))| steps.into_iter().map(move |step| SideStep { side, step }));
        Self { us, steps: steps.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(us: &[u64]) -> Steps {
        let mut steps = Steps::default();
        us.iter().for_each(|us| steps.add(Work::Stop, "net0", Duration::from_micros(*us)));
        steps
    }

    #[test]
    fn what_nobody_did_is_the_networks() {
        let downtime = Downtime::new(Duration::from_micros(100), steps(&[10, 20]), steps(&[30]));
        let told: Vec<_> = downtime.steps.iter().map(|step| (step.side, step.step.us)).collect();
        assert_eq!(told, [(Side::Source, 10), (Side::Source, 20), (Side::Between, 40), (Side::Destination, 30)]);
        // Whatever the other side says.
        let hostile = Downtime::new(Duration::from_micros(100), steps(&[10]), steps(&[u64::MAX, u64::MAX]));
        assert_eq!(hostile.steps[1].step.us, 0);
    }

    #[test]
    fn steps_are_bounded_where_they_come_from_elsewhere() {
        let bytes = postcard::to_stdvec(&steps(&[1; MOST_STEPS])).unwrap();
        assert_eq!(postcard::from_bytes::<Steps>(&bytes).unwrap().0.len(), MOST_STEPS);
        let bytes = postcard::to_stdvec(&steps(&[1; MOST_STEPS + 1])).unwrap();
        assert!(postcard::from_bytes::<Steps>(&bytes).is_err());
    }

    #[test]
    fn json_has_one_object_a_step() {
        let downtime = Downtime::new(Duration::from_micros(7), steps(&[7]), Steps::default());
        assert_eq!(
            serde_json::to_string(&downtime).unwrap(),
            r#"{"us":7,"steps":[{"side":"source","work":"stop","part":"net0","us":7},{"side":"between","work":"transfer","part":"network","us":0}]}"#
        );
    }
}
