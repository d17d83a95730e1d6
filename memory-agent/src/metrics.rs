//! What Prometheus is told of a process's memory.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::agent::AgentCost;
use crate::page_state::Counts;

/// What is told of one process.
#[derive(Clone, Copy, Debug)]
pub struct Metrics {
    /// The process.
    pub pid: u32,
    /// Counts and their age, once all is seen.
    pub map: Option<(Counts, Duration)>,
    /// What the agent has done and what that cost.
    pub cost: AgentCost,
}

impl Metrics {
    /// In the Prometheus text format.
    ///
    /// # Errors
    /// Never, as far as is known: it is written to memory.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let pid = self.pid.to_string();
        let mut all = Registry::with_labels([("pid".into(), pid.into())].into_iter());
        let registry = all.sub_registry_with_prefix("memory_agent");
        if let Some((counts, age)) = self.map {
            let pages = Family::<[(&str, &str); 1], Gauge>::default();
            for (state, count) in [("hole", counts.hole), ("resident", counts.resident), ("swapped", counts.swapped)] {
                pages.get_or_create(&[("state", state)]).set(count.cast_signed());
            }
            registry.register("pages", "Pages of shared memory in each state", pages);
            let seconds = Gauge::<f64, AtomicU64>::default();
            seconds.set(age.as_secs_f64());
            registry.register("map_age_seconds", "How long ago the part looked at longest ago was", seconds);
        }
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by(self.cost.cpu_ns as f64 / 1e9);
        registry.register("cpu_seconds", "CPU time used for looking and for paging out", cpu);
        for (name, help, value) in [
            ("swapped_in_pages", "Pages found swapped in by their owner or by a reader", self.cost.swapped_in),
            ("restored_pages", "Pages that a reader swapped in and that were paged out again", self.cost.restored),
            ("rounds", "Complete looks at all memory", self.cost.rounds),
        ] {
            let counter = Counter::<u64>::default();
            counter.inc_by(value);
            registry.register(name, help, counter);
        }
        let mut text = String::new();
        encode(&mut text, &all)?;
        Ok(as_text_format(&text))
    }
}

/// OpenMetrics calls a counter `rounds` whose sample is `rounds_total`; the text format, which the collector reads, has
/// one name for both, and would take such a counter for a metric of no type.
fn as_text_format(open_metrics: &str) -> String {
    let lines: Vec<_> = open_metrics.lines().filter(|line| *line != "# EOF").collect();
    let is_counter = |name: &str| lines.contains(&format!("# TYPE {name} counter").as_str());
    let mut text = String::new();
    for line in &lines {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind), Some(name), Some(rest)) if is_counter(name) => {
                text += &format!("# {kind} {name}_total {rest}\n");
            }
            _ => text += &format!("{line}\n"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        let cost = AgentCost { rounds: 3, cpu_ns: 1_500_000_000, swapped_in: 10, restored: 9, ..AgentCost::default() };
        let counts = Counts { hole: 1, resident: 2, swapped: 4 };
        Metrics { pid: 7, map: Some((counts, Duration::from_millis(250))), cost }
    }

    #[test]
    fn the_text_is_what_the_collector_reads() {
        let text = metrics().text().unwrap();
        let mut samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        samples.sort_unstable();
        assert_eq!(
            samples,
            [
                "memory_agent_cpu_seconds_total{pid=\"7\"} 1.5",
                "memory_agent_map_age_seconds{pid=\"7\"} 0.25",
                "memory_agent_pages{pid=\"7\",state=\"hole\"} 1",
                "memory_agent_pages{pid=\"7\",state=\"resident\"} 2",
                "memory_agent_pages{pid=\"7\",state=\"swapped\"} 4",
                "memory_agent_restored_pages_total{pid=\"7\"} 9",
                "memory_agent_rounds_total{pid=\"7\"} 3",
                "memory_agent_swapped_in_pages_total{pid=\"7\"} 10",
            ]
        );
        assert!(text.contains("# TYPE memory_agent_rounds_total counter\n"), "{text}");
        assert!(text.contains("# TYPE memory_agent_pages gauge\n") && !text.contains("# EOF"), "{text}");
    }
}
