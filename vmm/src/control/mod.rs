//! The API socket: one JSON object a line each way over a Unix socket.
//!
//! A client sends one [`Request`] and reads [`Response`]s: any number of `progress`, then `ok` or `error`.

pub mod client;
pub mod controller;
pub mod error;
pub mod failure;
mod life;
mod memory;
mod migration;
mod postcopy_metrics;
pub mod server;

pub use failure::{Failure, FailureKind, MigrationFailure};
pub use life::ExitReason;
pub use migration::{MigrationState, MigrationStatus};

use std::path::PathBuf;
use std::time::Duration;

use memory_agent::{AgentCost, ByteSize, Counts, PageOutReport};
use serde::{Deserialize, Serialize};

use crate::devices::virtio::balloon::BalloonStatus;
use crate::dump::DumpReport;
use crate::migration::destination::PostCopyStatus;
use crate::migration::plan::ColdPolicy;
use crate::migration::progress::{Progress, Report};
use crate::migration::source::{Options, Switchover};
use crate::ram::RamWatch;

/// Most parts that a picture may have.
const MAX_CELLS: u32 = 1 << 16;

/// What a client may ask. Empty requests are structs, since serde lets unit variants have any fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the machine is doing.
    Status {},
    /// Stop the guest.
    Pause {},
    /// Let the guest go on.
    Resume {
        /// Even though it was handed over and may run elsewhere.
        #[serde(default)]
        force: bool,
    },
    /// Press the power button: the guest is asked to shut down.
    PowerButton {},
    /// End the machine and this process.
    Quit {
        /// Even though pages of a guest that runs elsewhere are only here.
        #[serde(default)]
        force: bool,
    },
    /// What guest RAM is.
    Pages {
        /// Into how many parts of equal size the picture divides guest RAM; 0 for the sums alone.
        #[serde(default)]
        cells: u32,
        /// As the memory agent saw it last, in place of looking now.
        #[serde(default)]
        from_agent: bool,
    },
    /// What Prometheus wants to know.
    Metrics {},
    /// Page out what is resident.
    PageOut {
        /// Guest physical addresses and lengths in bytes; all of guest RAM when left out.
        #[serde(default)]
        ranges: Option<Vec<(u64, u64)>>,
    },
    /// What the balloon holds and what the guest says of its memory.
    Balloon {
        /// How much the guest is to give from now on; as before when left out.
        #[serde(default)]
        size: Option<ByteSize>,
    },
    /// Migrate to another host. Unless it is detached, the answer comes when that has ended; it goes on without whoever
    /// asked.
    Migrate(MigrateRequest),
    /// What the migration under way is doing, or the last one has come to.
    Migration {},
    /// Wait for a migration's end, as whoever started it does.
    WaitMigration {
        /// Which one; the last when left out.
        #[serde(default)]
        id: Option<u64>,
    },
    /// Give a migration up.
    CancelMigration {},
    /// Keep what there is of a paused guest: its memory and its state, in new files.
    Dump {
        /// Where guest memory goes; the state goes to the same name with `.json` behind it.
        to: PathBuf,
    },
    /// Go on with a migration whose connection is gone: pages of the guest are still to come.
    Reconnect {
        /// Where the other side listens.
        #[serde(default)]
        to: Option<String>,
        /// Where to listen for the other side.
        #[serde(default)]
        listen: Option<String>,
    },
}

/// How to migrate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where to, as `tcp:HOST:PORT` or `unix:PATH`.
    pub to: String,
    /// What happens to cold pages.
    #[serde(default = "default_cold")]
    pub cold: ColdPolicy,
    /// How many bytes of cold pages may be resident at a time.
    #[serde(default = "default_window")]
    pub window: ByteSize,
    /// How long the guest may be paused, milliseconds.
    #[serde(default = "default_downtime_limit_ms")]
    pub downtime_limit_ms: u64,
    /// How many rounds to try.
    #[serde(default = "default_max_rounds")]
    pub max_rounds: u32,
    /// Whether the process stays, with the guest's memory, until [`Request::Quit`].
    #[serde(default)]
    pub stay: bool,
    /// Whether the answer is [`Answer::Migration`], at once.
    #[serde(default)]
    pub detach: bool,
    /// When the guest is switched over.
    #[serde(default)]
    pub switchover: Switchover,
    /// How many bytes a second post-copy sends that the guest does not wait for; 0 for no limit.
    #[serde(default = "default_cold_rate")]
    pub cold_rate: ByteSize,
}

fn default_cold() -> ColdPolicy {
    Options::default().cold
}

fn default_window() -> ByteSize {
    Options::default().window
}

fn default_downtime_limit_ms() -> u64 {
    Options::default().downtime_limit.as_millis() as u64
}

fn default_max_rounds() -> u32 {
    Options::default().max_rounds
}

fn default_cold_rate() -> ByteSize {
    Options::default().cold_rate
}

impl From<&MigrateRequest> for Options {
    fn from(request: &MigrateRequest) -> Self {
        Self {
            cold: request.cold,
            window: request.window,
            downtime_limit: Duration::from_millis(request.downtime_limit_ms),
            max_rounds: request.max_rounds,
            switchover: request.switchover,
            cold_rate: request.cold_rate,
        }
    }
}

/// What the machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// No guest has come yet.
    Waiting,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest is on its way elsewhere and still runs here.
    Migrating,
    /// The guest was handed over and nobody has confirmed that it runs.
    HandedOver,
    /// The guest runs elsewhere, and pages that it may need are still here.
    PostCopy,
}

/// The answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What the machine is doing.
    pub state: RunState,
    /// Guest RAM, bytes.
    pub memory: ByteSize,
    /// Number of vCPUs.
    pub cpus: u8,
    /// This process.
    pub pid: u32,
    /// The memory agent, if there is one.
    #[serde(default)]
    pub agent: Option<AgentStatus>,
    /// What is outstanding of the guest's memory, in post-copy.
    #[serde(default)]
    pub post_copy: Option<PostCopyStatus>,
    /// What is outstanding for the guest that runs elsewhere.
    #[serde(default)]
    pub post_copy_source: Option<PostCopySourceStatus>,
}

/// What is outstanding for a guest that runs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopySourceStatus {
    /// Pages that are only here.
    pub left: u64,
    /// Whether there is a connection.
    pub connected: bool,
    /// Where the other side is tried.
    pub to: Option<String>,
}

/// What the memory agent has done and what that cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The probe that it uses.
    pub probe: String,
    /// How old its map is, milliseconds; nothing before it has seen everything once.
    pub age_ms: Option<u64>,
    /// What it has used of one core, percent.
    pub percent: f64,
    /// All of it.
    #[serde(flatten)]
    pub cost: AgentCost,
}

impl AgentStatus {
    fn of(watch: &RamWatch) -> Self {
        let cost = watch.cost();
        let age_ms = watch.counts().map(|(_, age)| age.as_millis() as u64);
        Self { probe: watch.probe().to_owned(), age_ms, percent: cost.percent(), cost }
    }
}

/// The answer to [`Request::Pages`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesReport {
    /// All of guest RAM.
    pub counts: Counts,
    /// Its parts in order, when they were asked for.
    pub cells: Vec<Counts>,
    /// How long ago the part of it looked at longest ago was, milliseconds; 0 for now.
    #[serde(default)]
    pub age_ms: u64,
}

/// What a server answers with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// How far it is.
    Progress(Progress),
    /// Done.
    Ok(Answer),
    /// Not done.
    Error(Failure),
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Pages`].
    Pages(PagesReport),
    /// To [`Request::Metrics`]: text in Prometheus's format.
    Metrics(String),
    /// To [`Request::PageOut`].
    PageOut(PageOutReport),
    /// To [`Request::Balloon`].
    Balloon(BalloonStatus),
    /// To [`Request::Dump`].
    Dump(DumpReport),
    /// To [`Request::Migrate`] and [`Request::WaitMigration`].
    Migrated(Report),
    /// To [`Request::Migration`], and to [`Request::Migrate`] with `detach`.
    Migration(Box<MigrationStatus>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_guide_says() {
        let text = r#"{"command":"page-out","ranges":[[4096,8192]]}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::PageOut { ranges: Some(vec![(4096, 8192)]) });
        assert_eq!(serde_json::from_str::<Request>(r#"{"command":"status"}"#).unwrap(), Request::Status {});
        let text = r#"{"command":"migrate","to":"unix:/x"}"#;
        let Request::Migrate(request) = serde_json::from_str(text).unwrap() else { panic!("another request") };
        assert_eq!(Options::from(&request), Options::default());
        assert!(!request.stay);
        assert!(serde_json::from_str::<Request>(r#"{"command":"format-disk"}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"command":"status","more":1}"#).is_err());
    }
}
