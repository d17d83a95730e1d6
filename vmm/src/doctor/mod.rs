//! What this host offers a virtual machine, and what follows from it.
//!
//! Everything is looked at or tried, nothing is changed: the one machine and the few pages that are made for a trial
//! are given back before the answer.

mod kvm;
mod memory;
mod network;
mod pages;
mod paravirtual;
mod rights;
mod swap;
mod sys;
mod tunables;
mod userfault;

use std::fmt;

use serde::Serialize;

use pages::ColdPages;

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Area {
    /// The virtual machine monitor in the kernel.
    Kvm,
    /// Where cold pages go.
    Swap,
    /// What the host tells of pages, and does with them.
    Pages,
    /// Handling a guest's page faults.
    Userfault,
    /// How much there is, and for whom.
    Memory,
    /// What this process is allowed to do.
    Rights,
    /// The other ends of guests' network interfaces.
    Network,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "KVM",
            Self::Swap => "swap",
            Self::Pages => "pages",
            Self::Userfault => "userfaultfd",
            Self::Memory => "memory",
            Self::Rights => "rights",
            Self::Network => "network",
        })
    }
}

/// Whether what was looked for is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Guests run and can be migrated, but something costs more or is not possible.
    Limited,
    /// Without this no guest runs, or none can be migrated.
    Missing,
}

impl State {
    /// [`State::Ok`], or else the other.
    fn ok_or(good: bool, otherwise: Self) -> Self {
        if good { Self::Ok } else { otherwise }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at.
    pub name: String,
    /// Whether it is as it should be.
    pub state: State,
    /// What was found.
    pub value: String,
    /// What follows from it.
    pub consequence: String,
}

/// What a host can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Guests run here and can be migrated.
    pub guests: bool,
    /// What happens to cold pages here.
    pub cold_pages: ColdPages,
    /// A guest whose cold pages come later, when they are touched, could be received.
    pub lazy: bool,
    /// The same in a sentence.
    pub sentence: String,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// In the order of [`Area`].
    pub findings: Vec<Finding>,
    /// What it adds up to.
    pub verdict: Verdict,
}

/// Where the parts of the examination put what they find.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    /// Control characters are made visible: names of devices and files in `/proc` are whatever somebody called them,
    /// and this ends up in a terminal.
    fn add(&mut self, area: Area, name: &str, state: State, value: impl fmt::Display, consequence: impl fmt::Display) {
        let plain = |text: String| text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        self.0.push(Finding {
            area,
            name: plain(name.to_owned()),
            state,
            value: plain(value.to_string()),
            consequence: plain(consequence.to_string()),
        });
    }
}

/// Whether this host's KVM emulates ring 0 of its guests, so that their kernels are too slow to be of use.
pub fn emulates_ring_0() -> bool {
    kvm::emulates_ring_0()
}

/// Looks at everything.
pub fn examine() -> Diagnosis {
    let mut found = Findings::default();
    kvm::examine(&mut found);
    let devices = swap::examine(&mut found);
    tunables::examine(&mut found, &devices);
    let cold_pages = pages::examine(&mut found, &devices);
    let lazy = userfault::examine(&mut found);
    memory::examine(&mut found, &devices);
    rights::examine(&mut found);
    network::examine(&mut found);
    let verdict = verdict(&found.0, cold_pages, lazy);
    Diagnosis { findings: found.0, verdict }
}

fn verdict(findings: &[Finding], cold_pages: ColdPages, lazy: bool) -> Verdict {
    let missing: Vec<_> = findings.iter().filter(|f| f.state == State::Missing).map(|f| f.name.as_str()).collect();
    let guests = missing.is_empty();
    let sentence = if guests {
        let lazy = if lazy { "can be received" } else { "cannot be received" };
        format!("Guests run here and can be migrated; {cold_pages}; a lazy migration {lazy}.")
    } else {
        format!("No guest can be run and migrated here, for lack of: {}.", missing.join(", "))
    };
    Verdict { guests, cold_pages, lazy: guests && lazy, sentence }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(state: State) -> Finding {
        let mut found = Findings::default();
        found.add(Area::Swap, "a\x1b[2Jb", state, "1\n2", "none");
        found.0.remove(0)
    }

    #[test]
    fn nothing_found_can_control_the_terminal() {
        let finding = finding(State::Ok);
        assert_eq!((finding.name.as_str(), finding.value.as_str()), ("a\u{fffd}[2Jb", "1\u{fffd}2"));
    }

    #[test]
    fn one_thing_missing_is_enough_to_say_no() {
        let good = [finding(State::Ok), finding(State::Limited)];
        let yes = verdict(&good, ColdPages::Freed, true);
        assert!(yes.guests && yes.lazy, "{yes:?}");
        let no = verdict(&[finding(State::Ok), finding(State::Missing)], ColdPages::Freed, true);
        assert!(!no.guests && !no.lazy && no.sentence.starts_with("No guest"), "{no:?}");
    }

    #[test]
    fn any_host_can_be_examined() {
        let diagnosis = examine();
        assert!(diagnosis.findings.iter().all(|f| !f.name.is_empty() && !f.value.is_empty()));
        assert!(diagnosis.findings.is_sorted_by_key(|f| f.area as u8));
        assert_eq!(diagnosis.verdict.guests, diagnosis.findings.iter().all(|f| f.state != State::Missing));
        assert!(serde_json::to_string(&diagnosis).unwrap().contains("\"area\":\"kvm\""));
    }
}
