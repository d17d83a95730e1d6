//! `memory-agent daemon`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use command_line::{End, print, print_json};
use memory_agent::{Agent, AgentOptions, Metrics, ProbeChoice, Process, Target, TargetError};
use serde_json::json;

use super::exit::{Coded, ExitCode, end_of};
use super::metrics::MetricsFile;
use super::opened::Opened;
use super::options::{Memory, duration};
use super::output::say;
use super::stop::Stop;

/// Options of `memory-agent daemon`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    memory: Memory,
    /// How much of one core it may use.
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    budget: f64,
    /// How often to look, at most, and to print a line.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    interval: Duration,
    /// How to ask: see `map --help`.
    #[arg(long, value_name = "PROBE", default_value_t = ProbeChoice::Auto)]
    probe: ProbeChoice,
    /// Leave in memory what readers other than the process have swapped in.
    #[arg(long)]
    no_restore: bool,
    /// Keep this file, for the textfile collector of node_exporter; its name should end in `.prom`. It is removed at
    /// the end.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Print JSON objects, one a line.
    #[arg(long)]
    json: bool,
}

pub(super) fn main(arguments: &Arguments) -> Result<(), End> {
    let stop = Stop::on_signals()?;
    let agent = Agent::new(AgentOptions {
        probe: arguments.probe,
        budget: arguments.budget,
        interval: arguments.interval,
        restore: !arguments.no_restore,
    })
    .map_err(end_of)?;
    let opened = arguments.memory.open()?;
    let targets: Vec<&dyn Target> = opened.memories.iter().map(|memory| memory as &dyn Target).collect();
    let Some(process) = opened.memories.first().map(|memory| memory.process()) else { return Ok(()) };
    let (told, watched) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let end = agent.watch(&targets);
            stop.ask();
            end
        });
        let told = tell(arguments, &agent, &opened, process, &stop);
        agent.stop();
        (told, watching.join())
    });
    told?;
    let watched = watched.map_err(|_| End::text(ExitCode::Failure, "the agent panicked: please report it"))?;
    match watched {
        // Its memory goes before it does, and either can be noticed first.
        Err(e) if e.is_end_of_process() => say(e),
        Ok(()) if process.has_ended() => say(TargetError::Exited(process.pid())),
        other => other.map_err(end_of)?,
    }
    Ok(())
}

/// Says what the agent knows until it is time to stop.
fn tell(arguments: &Arguments, agent: &Agent, opened: &Opened, process: &Process, stop: &Stop) -> Result<(), End> {
    let file = arguments.metrics.as_deref().map(MetricsFile::new);
    while !stop.wait(arguments.interval) && !process.has_ended() {
        let now = Metrics { pid: process.pid(), map: agent.counts(), cost: agent.cost() };
        if let Some(file) = &file {
            file.write(&now)?;
        }
        if arguments.json {
            print_json(&opened.object(&object(&now, agent.probe())))?;
        } else {
            print(&line(&now))?;
        }
    }
    Ok(())
}

fn object(now: &Metrics, probe: &str) -> serde_json::Value {
    json!({
        "pid": now.pid,
        "probe": probe,
        "counts": now.map.map(|(counts, _)| counts),
        "map_age_seconds": now.map.map(|(_, age)| age.as_secs_f64()),
        "cpu_percent": now.cost.percent(),
        "cost": now.cost,
    })
}

fn line(now: &Metrics) -> String {
    let cost = &now.cost;
    let known = match now.map {
        Some((counts, age)) => format!(
            "resident {}  swapped {}  hole {} pages, {:.1} s old",
            counts.resident,
            counts.swapped,
            counts.hole,
            age.as_secs_f64()
        ),
        None => "not all seen yet".into(),
    };
    format!(
        "{known}; {:.2} % of a core, {} pages looked at in {} rounds; {} swapped in, {} restored\n",
        cost.percent(),
        cost.pages,
        cost.rounds,
        cost.swapped_in,
        cost.restored
    )
}

#[cfg(test)]
mod tests {
    use memory_agent::{AgentCost, Counts};

    use super::*;

    #[test]
    fn a_line_says_what_is_known() {
        let cost =
            AgentCost { rounds: 2, pages: 14, cpu_ns: 5, elapsed_ns: 1000, swapped_in: 3, ..AgentCost::default() };
        let counts = Counts { hole: 1, resident: 2, swapped: 4 };
        let now = Metrics { pid: 7, map: Some((counts, Duration::from_millis(250))), cost };
        assert_eq!(
            line(&now),
            "resident 2  swapped 4  hole 1 pages, 0.2 s old; 0.50 % of a core, 14 pages looked at in 2 rounds; \
             3 swapped in, 0 restored\n"
        );
        assert!(line(&Metrics { map: None, ..now }).starts_with("not all seen yet; 0.50 %"));
        assert_eq!(object(&now, "page-cache")["counts"]["swapped"], 4);
    }
}
