//! What Prometheus is told of post-copy.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::PostCopySourceStatus;
use crate::migration::destination::PostCopyStatus;

/// In the Prometheus text format; nothing without post-copy.
pub(super) fn text(
    post_copy: Option<&PostCopyStatus>,
    post_copy_source: Option<&PostCopySourceStatus>,
) -> Result<String, std::fmt::Error> {
    let mut all = Registry::default();
    let registry = all.sub_registry_with_prefix("thermocline_post_copy");
    let mut gauge = |name: &str, help: &str, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value.cast_signed());
        registry.register(name, help, gauge);
    };
    if let Some(post_copy_source) = post_copy_source {
        gauge("left_pages", "Pages of a guest elsewhere that are only here", post_copy_source.left);
        gauge("connected", "Whether there is a connection to the other side", post_copy_source.connected.into());
    }
    if let Some(post_copy) = post_copy {
        gauge("missing_pages", "Pages of the guest that have not come", post_copy.missing);
        gauge("waited_for_pages", "Pages of these that the guest waits for", post_copy.waited_for);
        gauge("connected", "Whether there is a connection to the other side", post_copy.connected.into());
        gauge(
            "source_lost",
            "Whether the guest was stopped because its source stays away",
            post_copy.source_lost.into(),
        );
        gauge("faults", "Pages that the guest has waited for so far", post_copy.faults.count);
        gauge("filled_holes", "Holes filled with zeros for the guest so far", post_copy.faults.holes);
        let waits = Family::<[(&str, &str); 1], Gauge<f64, AtomicU64>>::default();
        for (quantile, us) in
            [("0.5", post_copy.faults.p50_us), ("0.99", post_copy.faults.p99_us), ("1", post_copy.faults.max_us)]
        {
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
        let post_copy = PostCopyStatus { missing: 5, connected: true, ..PostCopyStatus::default() };
        let text = text(Some(&post_copy), None).unwrap();
        assert!(text.contains("thermocline_post_copy_missing_pages 5\n"), "{text}");
        assert!(text.contains("thermocline_post_copy_wait_seconds{quantile=\"0.99\"} 0"), "{text}");
    }
}
