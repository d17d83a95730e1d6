//! What is run inside: a shell script, one trial a command.

use std::fmt::Write;

use anyhow::{Result, bail};

use super::kernel::{Flavour, Series, Variant};

/// What a trial runs, which decides on what machine it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// Programs of the lab's own.
    Programs,
    /// The embedded guest.
    Guests,
    /// Stock Linux guests: minutes each, so that they run where they are named.
    LinuxGuests,
}

impl Load {
    pub(super) const ALL: [Self; 3] = [Self::Programs, Self::Guests, Self::LinuxGuests];
}

/// What is run, name, and the command as the lab's shell runs it, in the folder that has the programs; `{expected}` is the
/// selftests' word for what to expect of the kernel, `{probes}` the probes that it must offer.
const TRIALS: &[(Load, &str, &str)] = &[
    (Load::Programs, "kernel selftests", "with_zram ./pm_swap_test {expected}"),
    (Load::Programs, "kernel soak", "with_zram ./pm_swap_test {expected} --soak 20"),
    // A disk keeps pages in the swap cache, so that only content and write tracking can be told, and not where a page is.
    (Load::Programs, "kernel soak with swap on a disk", "with_disk ./pm_swap_test {expected} --only none --soak 15"),
    (Load::Programs, "probes against the truth", "without_readahead ./differential --show-output"),
    (
        Load::Programs,
        "probes against the truth with huge pages",
        "without_readahead with_huge_pages ./differential agrees_with_the_kernel --show-output",
    ),
    (
        Load::Programs,
        "pages land alone under each huge page setting",
        "under_each_huge_page_setting ./missing a_page_lands_alone --show-output",
    ),
    (
        Load::Guests,
        "post-copy while the huge page setting changes",
        "while_huge_pages_change ./postcopy --show-output && \
         while_huge_pages_change ./migrate a_guest_that_needs_everything_gets_it --show-output",
    ),
    // With the kernel's own readahead: what it brings in besides goes again.
    (
        Load::Programs,
        "neighbours of what is read",
        "./differential what_comes_along scanning_leaves a_failing_reader --show-output",
    ),
    (Load::Programs, "hints against the truth", "without_readahead ./hints --show-output"),
    (Load::Programs, "residency under memory pressure", "without_readahead ./pressure --show-output"),
    (Load::Programs, "a control group that may not swap", "without_readahead ./group_swap --show-output"),
    (Load::Programs, "swap on a disk", "MEMORY_AGENT_TESTS_DISK=/dev/vda ./disk_swap --show-output"),
    (Load::Programs, "memory of another process", "without_readahead ./process --show-output"),
    (Load::Programs, "doctor", "with_zram ./thermocline doctor"),
    (Load::Guests, "a guest works and rests", "./launch two_vcpus_work --show-output"),
    (
        Load::Guests,
        "cold guests move whichever probe tells",
        "THERMOCLINE_TESTS_PROBES='{probes}' ./migrate cold_stays_cold_whichever_probe_tells --show-output",
    ),
    (Load::Guests, "idle pages of a guest", "./agent idle_pages_are_paged_out_or_it_says_why_not --show-output"),
    (
        Load::Guests,
        "swap goes away while a cold guest moves",
        "./migrate swap_goes_away_while_cold_pages_move --show-output",
    ),
    (Load::LinuxGuests, "linux 6.12 as a guest", "with_linux 6.12 ./linux --skip migrates --show-output"),
    (Load::LinuxGuests, "linux 6.1 as a guest", "with_linux 6.1 ./linux --skip migrates --show-output"),
    (Load::LinuxGuests, "linux-migrate 6.12", "with_linux 6.12 ./linux migrates --show-output"),
    (Load::LinuxGuests, "linux-migrate 6.1", "with_linux 6.1 ./linux migrates --show-output"),
];

/// What is in the commands of trials that boot Linux guests.
const LINUX: &str = "with_linux ";

/// What a stock kernel answers otherwise than a patched one.
pub(super) const ON_STOCK_TOO: &[&str] = &["kernel selftests", "hints against the truth", "cold guests move"];

/// What the trials' commands use.
const FUNCTIONS: &str = r#"
export THERMOCLINE_BIN=/lab/thermocline MEMORY_AGENT_BIN=/lab/memory-agent THERMOCLINE_TESTS_USE_HOST=1
with_zram() {
    echo 512M > /sys/block/zram0/disksize && mkswap /dev/zram0 > /dev/null && swapon /dev/zram0 || return 1
    "$@"
    code=$?
    swapoff /dev/zram0 && echo 1 > /sys/block/zram0/reset || return 1
    return $code
}
with_disk() {
    mkswap /dev/vda > /dev/null && swapon /dev/vda || return 1
    "$@"
    code=$?
    swapoff /dev/vda || return 1
    return $code
}
# Tests that count pages one by one: a neighbour that is read along is awake, and nobody's fault.
without_readahead() {
    cluster=$(cat /proc/sys/vm/page-cluster)
    echo 0 > /proc/sys/vm/page-cluster || return 1
    "$@"
    result=$?
    echo $cluster > /proc/sys/vm/page-cluster
    return $result
}
# khugepaged fills holes and wakes swapped pages where it makes a huge page; here only of pages that are all in memory.
with_huge_pages() {
    huge=/sys/kernel/mm/transparent_hugepage
    for limit in none swap; do
        echo 0 > $huge/khugepaged/max_ptes_$limit || return 1
    done
    echo always > $huge/shmem_enabled || return 1
    "$@"
    code=$?
    echo never > $huge/shmem_enabled
    echo 511 > $huge/khugepaged/max_ptes_none
    echo 64 > $huge/khugepaged/max_ptes_swap
    return $code
}
under_each_huge_page_setting() {
    for setting in never advise within_size always force; do
        echo $setting > /sys/kernel/mm/transparent_hugepage/shmem_enabled || return 1
        MEMORY_AGENT_TESTS_SHMEM_ENABLED=$setting "$@"
        code=$?
        echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled
        [ $code = 0 ] || return $code
    done
}
with_linux() {
    series=$1
    shift
    THERMOCLINE_LINUX_GUEST=/lab/linux-$series THERMOCLINE_TESTS_QEMU=/lab/qemu/run "$@"
}
# Before, in the middle of, and behind each step of what is run.
while_huge_pages_change() {
    while :; do
        for setting in always never force advise within_size; do
            echo $setting > /sys/kernel/mm/transparent_hugepage/shmem_enabled
            sleep 0.1
        done
    done &
    changes=$!
    "$@"
    code=$?
    kill $changes
    wait $changes
    echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled
    return $code
}
"#;

/// The script that runs one command of the user's, with the same functions at hand.
pub(super) fn script_of(command: &str) -> String {
    // In lines of its own: the command may end in a comment.
    format!(
        "cd /lab\n{FUNCTIONS}echo 'LAB-BEGIN command'\n(\n{command}\n) 2>&1\ncode=$?\necho \"LAB-END $code command\"\nexit $code\n"
    )
}

/// The script that runs the trials of this load whose names contain one of `filter`; without one all but Linux guests. None
/// where there is none of them.
pub(super) fn script(variant: Variant, load: Load, filter: &[String]) -> Option<String> {
    let expected = match (variant.flavour, variant.series) {
        (Flavour::Patched, Series::V6_12) => "--expect-marker --expect-exact",
        (Flavour::Patched, Series::V6_1) => "--expect-marker",
        (Flavour::Stock, _) => "--expect-stock",
    };
    let probes = match (variant.flavour, variant.series) {
        (Flavour::Patched, Series::V6_12) => "page-cache exact-scan marker uffd-marker",
        (Flavour::Stock, Series::V6_12) => "page-cache uffd-marker",
        (Flavour::Patched, Series::V6_1) => "page-cache marker",
        (Flavour::Stock, Series::V6_1) => "page-cache",
    };
    let mut script = format!("cd /lab\nfailed=0\n{FUNCTIONS}");
    let mut is_empty = true;
    for (name, command) in chosen(load, filter) {
        is_empty = false;
        let command = command.replace("{expected}", expected).replace("{probes}", probes);
        // Writing to a String does not fail.
        let _ = writeln!(
            script,
            "echo 'LAB-BEGIN {name}'\n{command} 2>&1\ncode=$?\n[ $code = 0 ] || failed=1\necho \"LAB-END $code {name}\""
        );
    }
    (!is_empty).then(|| script + "exit $failed\n")
}

/// Names and commands.
fn chosen(load: Load, filter: &[String]) -> impl Iterator<Item = (&'static str, &'static str)> {
    let is_chosen = move |name: &str| {
        filter.is_empty() && load != Load::LinuxGuests || filter.iter().any(|part| name.contains(part.as_str()))
    };
    let of_load = TRIALS.iter().filter(move |(of, name, _)| *of == load && is_chosen(name));
    of_load.map(|(_, name, command)| (*name, *command))
}

/// Whether a script boots Linux guests, whose files it needs then, and QEMU.
pub(super) fn needs_linux(script: &str) -> bool {
    // Behind the functions, one of which has that name.
    script.lines().any(|line| line.contains(LINUX))
}

/// Tells when a filter would choose nothing, before a kernel is built for it.
///
/// # Errors
/// When a part is in no trial's name.
pub(super) fn check(filter: &[String]) -> Result<()> {
    let unknown = filter.iter().find(|part| !TRIALS.iter().any(|(_, name, _)| name.contains(part.as_str())));
    let names = || TRIALS.iter().map(|(_, name, _)| *name).collect::<Vec<_>>().join("\n  ");
    unknown.map_or(Ok(()), |part| bail!("there is no trial with \"{part}\" in its name; there are\n  {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::kernel::Checks;

    #[test]
    fn a_filter_chooses() {
        let variant = |flavour| Variant { series: Series::V6_12, flavour, checks: Checks::Vm };
        let of = |load, filter: &[String]| script(variant(Flavour::Stock), load, filter).unwrap_or_default();
        let linux = of(Load::LinuxGuests, &["linux".into()]);
        let [all, guests] = [Load::Programs, Load::Guests].map(|load| of(load, &[]));
        let scripts = [&all, &guests, &linux];
        assert_eq!(scripts.iter().map(|script| script.matches("LAB-BEGIN").count()).sum::<usize>(), TRIALS.len());
        assert_eq!(of(Load::LinuxGuests, &[]), "");
        for program in ["./migrate", "./agent", "./launch"] {
            assert!(!all.contains(program) && guests.contains(program), "{program} runs guests");
        }
        assert!(all.contains("--expect-stock") && !all.contains("{expected}"));
        let filter = ["hints".into(), "soak with swap".into()];
        let some = script(variant(Flavour::Patched), Load::Programs, &filter).unwrap_or_default();
        assert_eq!(script(variant(Flavour::Patched), Load::Guests, &filter), None);
        assert_eq!(some.matches("LAB-BEGIN").count(), 2);
        assert!(some.contains("--expect-marker --expect-exact --only none"));
        assert!(needs_linux(&linux) && !needs_linux(&guests) && !needs_linux(&some));
        assert!(check(&[]).is_ok() && check(&["hints".into(), "soak".into()]).is_ok());
        let e = check(&["hints".into(), "hint s".into()]).unwrap_err().to_string();
        assert!(e.starts_with("there is no trial with \"hint s\"") && e.contains("\n  kernel soak\n"), "{e}");
    }
}
