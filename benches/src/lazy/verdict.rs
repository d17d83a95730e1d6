//! A figure held against its target.

use std::fmt;

use serde_json::{Value, json};

/// What a figure must be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    AtMost(f64),
    Exactly(f64),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "at most {}", rounded(*most)),
            Self::Exactly(number) => write!(f, "{}", rounded(*number)),
        }
    }
}

/// What came of a target.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    /// What is held against it, for people.
    what: String,
    figure: f64,
    target: Target,
    /// What people have to know to judge it.
    note: String,
}

impl Verdict {
    /// `figure` is to be `target` at most.
    pub(super) fn at_most(what: impl Into<String>, figure: f64, target: f64) -> Self {
        Self { what: what.into(), figure, target: Target::AtMost(target), note: String::new() }
    }

    /// `figure` is to be `target`.
    pub(super) fn exactly(what: impl Into<String>, figure: f64, target: f64) -> Self {
        Self { what: what.into(), figure, target: Target::Exactly(target), note: String::new() }
    }

    /// With a remark.
    pub(super) fn noting(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }

    fn is_met(&self) -> bool {
        match self.target {
            Target::AtMost(most) => self.figure <= most,
            // Numbers that are counted.
            Target::Exactly(number) => (self.figure - number).abs() < 0.5,
        }
    }

    /// As an object.
    pub(super) fn json(&self) -> Value {
        json!({
            "verdict": self.what,
            "figure": rounded(self.figure),
            "target": self.target.to_string(),
            "met": self.is_met(),
            "note": self.note,
        })
    }
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let met = if self.is_met() { "met" } else { "MISSED" };
        write!(f, "{met:6} {}: {}, target {}", self.what, rounded(self.figure), self.target)?;
        if self.note.is_empty() { Ok(()) } else { write!(f, " ({})", self.note) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_whether_it_is_met() {
        let met = Verdict::exactly("pages", 0.0, 0.0);
        assert_eq!(met.to_string(), "met    pages: 0, target 0");
        assert_eq!(met.json()["met"], true);
        let missed = Verdict::at_most("share", 0.3514, 0.35).noting("of eager's");
        assert_eq!(missed.to_string(), "MISSED share: 0.351, target at most 0.35 (of eager's)");
        assert_eq!(missed.json()["met"], false);
    }
}
