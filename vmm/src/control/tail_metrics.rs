//! What Prometheus is told of memory that follows a guest.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::FollowingStatus;
use crate::migration::destination::TailStatus;

/// In the Prometheus text format; nothing when nothing follows.
pub(super) fn text(tail: Option<&TailStatus>, following: Option<&FollowingStatus>) -> Result<String, std::fmt::Error> {
    let mut all = Registry::default();
    let registry = all.sub_registry_with_prefix("thermocline_tail");
    let mut gauge = |name: &str, help: &str, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value.cast_signed());
        registry.register(name, help, gauge);
    };
    if let Some(following) = following {
        gauge("left_pages", "Pages of a guest elsewhere that are only here", following.left);
        gauge("connected", "Whether there is a connection to the other side", following.connected.into());
    }
    if let Some(tail) = tail {
        gauge("missing_pages", "Pages of the guest that have not come", tail.missing);
        gauge("waited_for_pages", "Pages of these that the guest waits for", tail.waited_for);
        gauge("connected", "Whether there is a connection to the other side", tail.connected.into());
        gauge("source_lost", "Whether the guest was stopped because its source stays away", tail.source_lost.into());
        gauge("faults", "Pages that the guest has waited for so far", tail.faults.count);
        gauge("filled_holes", "Holes filled with zeros for the guest so far", tail.faults.holes);
        let waits = Family::<[(&str, &str); 1], Gauge<f64, AtomicU64>>::default();
        for (quantile, us) in [("0.5", tail.faults.p50_us), ("0.99", tail.faults.p99_us), ("1", tail.faults.max_us)] {
            waits.get_or_create(&[("quantile", quantile)]).set(us as f64 / 1e6);
        }
        registry.register("wait_seconds", "How long the guest waited for a page", waits);
    }
    let mut text = String::new();
    encode(&mut text, &all)?;
    Ok(text.lines().filter(|line| *line != "# EOF").map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_follows() {
        assert_eq!(text(None, None).unwrap(), "");
        let tail = TailStatus { missing: 5, connected: true, ..TailStatus::default() };
        let text = text(Some(&tail), None).unwrap();
        assert!(text.contains("thermocline_tail_missing_pages 5\n"), "{text}");
        assert!(text.contains("thermocline_tail_wait_seconds{quantile=\"0.99\"} 0"), "{text}");
    }
}
