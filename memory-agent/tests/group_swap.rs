//! Control groups that may not swap, or not much.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops with what it saw")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]

mod support;

use harness::host::skip;
use memory_agent::{MemoryGroup, PageOutError, page_out};
use support::group::LimitedGroup;
use support::{Memory, with_swap};

const PAGES: u64 = 1024;
const TEST: &str = "what_a_group_may_not_swap_is_told";

#[test]
fn what_a_group_may_not_swap_is_told() {
    with_swap(TEST, || {
        let group = match LimitedGroup::enter(1 << 30) {
            Ok(group) => group,
            Err(why) => return skip(TEST, why),
        };
        let memory = Memory::new("may-not-swap", PAGES);
        (0..PAGES).for_each(|page| memory.write(page, page + 1));
        assert_eq!(MemoryGroup::own().unwrap().limit(), Some(1 << 30));
        if group.is_version_2() { version_2(&group, &memory) } else { version_1(&group, &memory) }
    });
}

/// A limit on memory and swap together, and a wish not to swap, do not keep pages from being paged out: it must not be said that
/// they do.
fn version_1(group: &LimitedGroup, memory: &Memory) {
    group.set("memory.memsw.limit_in_bytes", &(1_u64 << 30).to_string());
    group.set("memory.swappiness", "0");
    assert_eq!(MemoryGroup::own().unwrap().swap_limit(), None);
    let report = page_out(&memory.mapping(), &[0..PAGES]).unwrap();
    assert_eq!((report.swapped, report.left), (PAGES, 0), "{report:?}");
    group.set("memory.memsw.limit_in_bytes", "-1");
}

fn version_2(group: &LimitedGroup, memory: &Memory) {
    group.set("memory.swap.max", "0");
    match page_out(&memory.mapping(), &[0..PAGES]) {
        Err(PageOutError::GroupSwapFull(limit)) => assert_eq!(limit.max, 0),
        other => panic!("{other:?}"),
    }
    // The tool says so, with the code for it.
    let mut tool = support::tool();
    tool.args(["page-out", "--all", "--name", "may-not-swap", "--pid", &std::process::id().to_string()]);
    let output = tool.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("memory.swap.max"), "{said}");

    // Some room: it is used, and then it is at an end.
    group.set("memory.swap.max", &(PAGES * 4096 / 4).to_string());
    let report = page_out(&memory.mapping(), &[0..PAGES]).unwrap();
    assert!(report.swapped > 0 && report.left > PAGES / 2, "{report:?}");
    group.set("memory.swap.max", "max");
    let report = page_out(&memory.mapping(), &[0..PAGES]).unwrap();
    assert_eq!(report.left, 0, "{report:?}");
}
