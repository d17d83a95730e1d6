//! What a run of `cargo test` came to, read from what the test programs write.

use std::fmt;

/// In the reason of a test that this machine could not run and the lab does.
const ONLY_IN_LAB: &str = "only in the lab: ";

/// Sums over all test programs of a run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TestCounts {
    /// Test programs that reported, one for each crate, integration test and set of documentation tests.
    programs: u32,
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<String>,
    /// Left to the lab, whose machine can run them.
    left_to_lab: Vec<String>,
    in_successes: bool,
}

impl TestCounts {
    /// Takes in a line; whether a person wants to see it.
    ///
    /// What passing tests wrote is not worth showing, except why a test was skipped. That is why the tests run with
    /// `--show-output`: the harness would keep it to itself.
    pub(crate) fn read(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.in_successes = true;
        } else if let Some(sums) = line.strip_prefix("test result: ") {
            self.in_successes = false;
            self.programs += 1;
            self.passed += number_before(sums, " passed").unwrap_or(0);
        } else if line == "failures:" {
            self.in_successes = false;
        }
        if line.trim_start().starts_with("skipped") {
            self.skipped.push(line.trim().to_owned());
            return true;
        }
        if let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            if result.starts_with("FAILED") {
                self.failed.push(name.trim_end().to_owned());
            } else if let Some(why) = result.strip_prefix("ignored") {
                let entry = format!("{}: {}", name.trim_end(), why.trim_start_matches(", "));
                let list = if why.contains(ONLY_IN_LAB) { &mut self.left_to_lab } else { &mut self.skipped };
                list.push(entry);
            }
        }
        !self.in_successes
    }

    /// What was skipped, with the reasons the tests gave.
    pub(crate) fn skipped(&self) -> &[String] {
        &self.skipped
    }
}

/// The number that stands before `word`.
fn number_before(text: &str, word: &str) -> Option<u64> {
    let (before, _) = text.split_once(word)?;
    before.rsplit(' ').next()?.parse().ok()
}

impl fmt::Display for TestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { programs, passed, failed, skipped, left_to_lab, .. } = self;
        for (title, list) in [("left to the lab", left_to_lab), ("skipped", skipped), ("failed", failed)] {
            for entry in list {
                writeln!(f, "  {title}: {}", entry.trim_start_matches("skipped ").trim_end_matches(": "))?;
            }
        }
        write!(f, "{programs} test programs: {passed} tests passed, {} failed, {} skipped", failed.len(), skipped.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (TestCounts, String) {
        let mut outcome = TestCounts::default();
        let shown = text.lines().filter(|line| outcome.read(line)).collect::<Vec<_>>().join("\n");
        (outcome, shown)
    }

    #[test]
    fn what_the_lab_runs_is_not_skipped() {
        let (outcome, _) = read("test e ... ignored,  (only in the lab: KVM here emulates ring 0)");
        assert!(outcome.skipped().is_empty());
        let shown = outcome.to_string();
        assert!(shown.contains("left to the lab: e") && shown.ends_with(" 0 skipped"), "{shown}");
    }

    #[test]
    fn counts_what_the_harness_says() {
        let (outcome, shown) = read(
            "running 3 tests\ntest a::b ... ok\ntest c   ... FAILED\ntest d ... ignored, no swap\n\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        );
        assert_eq!((outcome.programs, outcome.passed), (1, 1));
        assert_eq!((outcome.failed, outcome.skipped), (vec!["c".into()], vec!["d: no swap".into()]));
        assert!(shown.contains("test d ... ignored, no swap"));
    }

    #[test]
    fn of_passing_tests_only_skips_are_shown() {
        let (outcome, shown) = read(
            "test a ... ok\nsuccesses:\n\n---- a stdout ----\nchatter\nskipped a: no /dev/kvm\n\n\
             successes:\n    a\n\ntest result: ok. 1 passed; 0 failed\nRunning b",
        );
        assert_eq!(outcome.skipped, ["skipped a: no /dev/kvm"]);
        assert_eq!(shown, "test a ... ok\nskipped a: no /dev/kvm\ntest result: ok. 1 passed; 0 failed\nRunning b");
    }

    #[test]
    fn the_summary_names_what_did_not_pass() {
        let (mut outcome, _) = read("test c ... FAILED\nskipped d: no swap");
        outcome.passed = 4;
        assert_eq!(
            outcome.to_string(),
            "  skipped: d: no swap\n  failed: c\n0 test programs: 4 tests passed, 1 failed, 1 skipped"
        );
    }
}
