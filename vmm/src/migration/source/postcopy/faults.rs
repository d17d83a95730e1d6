//! The thread that the guest waits for, at the source: reads and sends what is wanted, over a channel of its own.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::sender::{ConnectionEnd, Shared};
use crate::host::adaptive_poll::{AdaptivePoll, sleep};
use crate::migration::fault_priority::BURST;
use crate::migration::link::Link;
use crate::migration::plan::BLOCK;
use crate::migration::stoppable::Stoppable;
use crate::migration::wire::message::{check_ranges, receive_message};
use crate::migration::wire::{FrameReader, FrameWriter, Lane, Message, WireError};
use crate::ram::RamPage;
use memory_agent::{PageNumber, PageRange};

/// Neighbours sent at a time.
const PIECE: u64 = 4;
/// A guest that has wanted nothing for about so long is sent the neighbours of what it wanted last.
const QUIET: Duration = Duration::from_millis(2);

/// What the guest waits for comes and goes over this.
struct FaultChannel {
    reader: FrameReader<Link>,
    writer: FrameWriter<Link>,
    adaptive_poll: AdaptivePoll,
    payload: Vec<u8>,
}

impl FaultChannel {
    /// Whether something comes, or the connection ends, while this side polls, and within `limit`.
    fn look(&mut self, limit: Option<Duration>) -> Result<bool, WireError> {
        Ok(self.adaptive_poll.look(&mut [PollFd::new(self.reader.link(), PollFlags::IN)], limit)?)
    }

    /// Whether something comes, or the connection ends, within `limit`.
    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool, WireError> {
        Ok(sleep(&mut [PollFd::new(self.reader.link(), PollFlags::IN)], limit)?)
    }
}

impl Shared {
    /// Starts that thread, for one connection.
    pub(super) fn spawn_faults(self: &Arc<Self>, link: Link) -> Result<Stoppable, WireError> {
        let ender = link.try_clone()?;
        let shared = Arc::clone(self);
        let stop = move || ender.shutdown(std::net::Shutdown::Both);
        Ok(Stoppable::spawn("serve-faults", stop, move || {
            // Once everything has been confirmed the destination closes this channel, and has its last words on the other.
            if let Err(e) = shared.serve_faults(link)
                && shared.lock().outstanding.left() > 0
            {
                shared.end(ConnectionEnd::Broken(e));
            }
        })?)
    }

    /// Serves one connection until it ends.
    fn serve_faults(&self, link: Link) -> Result<(), WireError> {
        link.wait_for_ever()?;
        let mut channel = FaultChannel {
            writer: FrameWriter::new(link.try_clone()?),
            reader: FrameReader::new(link),
            adaptive_poll: AdaptivePoll::default(),
            payload: Vec::new(),
        };
        let mut last = None;
        loop {
            while !self.is_asked(&mut channel, None)? {}
            let requested = match receive_message(&mut channel.reader, "page request")? {
                Message::PageRequest(ranges) => ranges,
                other => return Err(WireError::Unexpected { found: other.name(), expected: "page request" }),
            };
            check_ranges(&requested, self.ram.pages(), channel.reader.last_sequence())?;
            channel.adaptive_poll.keep_polling();
            let mut requested = requested.into_iter().flat_map(|run| run.pages()).peekable();
            while let Some(page) = requested.next() {
                let neighbours = self.serve(page, &mut channel)?;
                // A guest that goes through its memory in order wants the neighbours next; one that does not gets them
                // once it wants nothing else, so that it need not wait for them.
                let is_in_order = last.is_some_and(|last| (last..=last + BLOCK).contains(&page));
                last = Some(page);
                let goes_along =
                    requested.peek().is_none() && (is_in_order || !self.is_asked(&mut channel, Some(QUIET))?);
                self.send_neighbours(neighbours, goes_along, &mut channel)?;
            }
        }
    }

    /// Whether the guest wants something within `limit`, or the connection has ended.
    fn is_asked(&self, channel: &mut FaultChannel, limit: Option<Duration>) -> Result<bool, WireError> {
        if channel.look(limit)? || channel.sleep(Some(BURST))? {
            return Ok(true);
        }
        self.fault_priority.give_back();
        channel.sleep(limit)
    }

    /// Sends a page that the guest waits for, by itself and first, and returns its neighbours.
    fn serve(&self, page: RamPage, channel: &mut FaultChannel) -> Result<Vec<Range<RamPage>>, WireError> {
        self.fault_priority.take();
        let is_to_be_sent = {
            let mut state = self.lock();
            let is_to_be_sent = state.outstanding.requested(page);
            state.totals.requested += u64::from(is_to_be_sent);
            is_to_be_sent
        };
        if is_to_be_sent {
            self.send(&mut channel.writer, Lane::Hot, &[page.run(1)], &mut channel.payload)?;
        }
        Ok(self.lock().outstanding.neighbours(page))
    }

    /// Sends neighbours a few at a time, for as long as the guest wants nothing else.
    fn send_neighbours(
        &self,
        neighbours: Vec<Range<RamPage>>,
        mut goes_along: bool,
        channel: &mut FaultChannel,
    ) -> Result<(), WireError> {
        for run in neighbours {
            for start in run.pages().step_by(PIECE as usize) {
                let piece = run.intersection(&start.run(PIECE));
                if goes_along {
                    self.lock().totals.neighbours += piece.page_count();
                    self.send(&mut channel.writer, Lane::Cold, &[piece], &mut channel.payload)?;
                    goes_along = !channel.sleep(Some(Duration::ZERO))?;
                } else {
                    self.lock().outstanding.not_sent(piece);
                }
            }
        }
        Ok(())
    }
}
