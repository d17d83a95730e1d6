//! What Prometheus is told, as a file for the textfile collector of node_exporter.

use std::path::{Path, PathBuf};

use command_line::End;
use memory_agent::Metrics;

use super::exit::ExitCode;
use super::scan::Part;

/// The file; removed at the end, because what it says is true of a running process only.
#[derive(Debug)]
pub(super) struct MetricsFile(PathBuf);

impl MetricsFile {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Writes it anew. Whoever reads meanwhile has the old one, whole.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self, metrics: &Metrics) -> Result<(), End> {
        let failed =
            |e: std::io::Error| End::text(ExitCode::Failure, format!("cannot write {}: {e}", self.0.display()));
        let text = metrics.text().map_err(|e| End::new(ExitCode::Failure, e))?;
        let part = Part::beside(&self.0);
        std::fs::write(part.path(), text).map_err(failed)?;
        part.becomes(&self.0).map_err(failed)
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        // Nobody can do anything about it.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use memory_agent::{AgentCost, Counts};

    use super::*;

    fn metrics() -> Metrics {
        let counts = Counts { hole: 1, resident: 2, swapped: 4 };
        Metrics { pid: 7, map: Some((counts, Duration::from_millis(250))), cost: AgentCost::default() }
    }

    #[test]
    fn a_file_is_replaced_and_goes_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory.prom");
        let file = MetricsFile::new(&path);
        file.write(&Metrics { map: None, ..metrics() }).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("memory_agent_pages"));
        file.write(&metrics()).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("memory_agent_pages"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(file);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
