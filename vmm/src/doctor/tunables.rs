//! Settings of the kernel that change what becomes of cold pages.

use memory_agent::SwapDevice;

use super::swap::any_keeps;
use super::{Area, Findings, State};
use crate::host::text;

type Judgement = (State, String);

pub(super) fn examine(found: &mut Findings, devices: &[SwapDevice]) {
    let disk = any_keeps(devices);
    let mut setting = |name: &str, value: Option<String>, judge: &dyn Fn(&str) -> Judgement| {
        if let Some(value) = value {
            let (state, consequence) = judge(&value);
            found.add(Area::Swap, name, state, value, consequence);
        }
    };
    let sysctl = |name: &str| text::read(&format!("/proc/sys/vm/{name}"));
    setting("vm.page-cluster", sysctl("page-cluster"), &|value| page_cluster(value, disk));
    setting("vm.swappiness", sysctl("swappiness"), &swappiness);
    setting("vm.overcommit_memory", sysctl("overcommit_memory"), &overcommit);
    let huge = text::read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    setting("shmem huge pages", huge.and_then(|text| text::chosen(&text).map(str::to_owned)), &shmem_enabled);
}

fn page_cluster(value: &str, disk: bool) -> Judgement {
    match value.parse::<u32>() {
        Ok(0) => (State::Ok, "a swap-in brings the page that was asked for and no other".into()),
        Ok(shift) => {
            let pages = 1_u64.checked_shl(shift).unwrap_or(u64::MAX);
            let what = format!("a swap-in brings up to {pages} pages from disk, and from zram on some kernels");
            // With zram alone the trial tells whether it matters.
            (State::ok_or(!disk, State::Limited), format!("{what}; sysctl vm.page-cluster=0 ends that"))
        }
        Err(_) => (State::Limited, "not understood".into()),
    }
}

fn swappiness(value: &str) -> Judgement {
    match value.parse::<u32>() {
        Ok(0) => (State::Limited, "the kernel pages out nothing by itself; only what is asked for gets cold".into()),
        Ok(_) => (State::Ok, "under pressure the kernel pages out what a guest does not use".into()),
        Err(_) => (State::Limited, "not understood".into()),
    }
}

fn overcommit(value: &str) -> Judgement {
    match value {
        "0" | "1" => (State::Ok, "a guest may have more memory than it touches".into()),
        "2" => (
            State::Limited,
            "every page a guest touches counts against CommitLimit: a guest that goes beyond it is stopped".into(),
        ),
        _ => (State::Limited, "not understood".into()),
    }
}

fn shmem_enabled(value: &str) -> Judgement {
    match value {
        "never" | "advise" | "deny" => (State::Ok, "guest RAM is of 4 KiB pages, each hot or cold by itself".into()),
        "always" | "within_size" | "force" => (
            State::Limited,
            "guest RAM gets huge pages: one byte written fills 2 MiB of hole, and reclaim has to split them first"
                .into(),
        ),
        _ => (State::Limited, "not understood".into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn settings_mean_what_the_kernel_says() {
        assert_eq!(page_cluster("0", true).0, State::Ok);
        assert_eq!(page_cluster("3", true).0, State::Limited);
        assert!(page_cluster("3", false).1.contains("up to 8 pages"));
        assert_eq!(swappiness("0").0, State::Limited);
        assert_eq!(overcommit("2").0, State::Limited);
        assert_eq!(shmem_enabled("always").0, State::Limited);
        assert_eq!(shmem_enabled("never").0, State::Ok);
    }

    proptest! {
        #[test]
        fn any_setting_is_judged(value in "(\\PC*|[0-9]{1,30})", disk: bool) {
            for (_, consequence) in
                [page_cluster(&value, disk), swappiness(&value), overcommit(&value), shmem_enabled(&value)]
            {
                prop_assert!(!consequence.is_empty());
            }
        }
    }
}
