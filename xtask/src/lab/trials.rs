//! What is run inside: a shell script, one trial a command.

use std::fmt::Write;

use super::kernel::{Flavour, Series, Variant};

/// Name, and the command as the lab's shell runs it, in the folder that has the programs; `{expected}` is the selftests' word for
/// what to expect of the kernel.
const TRIALS: &[(&str, &str)] = &[
    ("kernel selftests", "./pm_swap_test {expected}"),
    ("kernel soak", "./pm_swap_test {expected} --soak 20"),
    ("probes against the truth", "./differential --show-output"),
    ("hints against the truth", "./hints --show-output"),
    ("residency under memory pressure", "./pressure --show-output"),
    ("swap on a disk", "./disk_swap --show-output"),
    ("memory of another process", "./process --show-output"),
    ("doctor", "./thermocline doctor"),
];

/// The script that runs the trials whose names contain one of `filter`, or all.
pub(super) fn script(variant: Variant, filter: &[String]) -> String {
    let expected = match (variant.flavour, variant.series) {
        (Flavour::Patched, Series::V6_12) => "--expect-marker --expect-exact",
        (Flavour::Patched, Series::V6_1) => "--expect-marker",
        (Flavour::Stock, _) => "--expect-stock",
    };
    let mut script = String::from("cd /lab\nfailed=0\n");
    for (name, command) in TRIALS {
        if !filter.is_empty() && !filter.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let command = command.replace("{expected}", expected);
        // Writing to a String does not fail.
        let _ = writeln!(
            script,
            "echo 'LAB-BEGIN {name}'\n{command} 2>&1\ncode=$?\n[ $code = 0 ] || failed=1\necho \"LAB-END $code {name}\""
        );
    }
    script + "exit $failed\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::kernel::Checks;

    #[test]
    fn a_filter_chooses() {
        let variant = |flavour| Variant { series: Series::V6_12, flavour, checks: Checks::Vm };
        let all = script(variant(Flavour::Stock), &[]);
        assert_eq!(all.matches("LAB-BEGIN").count(), TRIALS.len());
        assert!(all.contains("--expect-stock") && !all.contains("{expected}"));
        let some = script(variant(Flavour::Patched), &["hints".into(), "soak".into()]);
        assert_eq!(some.matches("LAB-BEGIN").count(), 2);
        assert!(some.contains("--expect-marker --expect-exact --soak"));
    }
}
