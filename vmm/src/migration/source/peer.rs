//! The destination, as the source hears and speaks to it over the first connection.

use std::time::{Duration, Instant};

use super::SourceError;
use crate::migration::cancel::Cancel;
use crate::migration::link::Link;
use crate::migration::wire::message::receive_message;
use crate::migration::wire::{Agreed, Features, FrameReader, FrameWriter, Message, Offer, WireError, preamble};

/// How long to wait for the destination's reason after its connection broke, and for our own to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The destination.
pub(super) struct Peer<'m> {
    pub(super) reader: FrameReader<Link>,
    pub(super) writer: FrameWriter<Link>,
    /// What both sides can do.
    features: Features,
    cancel: &'m Cancel,
}

impl<'m> Peer<'m> {
    /// Says who we are, and hears who the other side is.
    pub(super) fn introduce(link: Link, cancel: &'m Cancel) -> Result<Self, SourceError> {
        cancel.watch(&link);
        let mut reader = FrameReader::new(link.try_clone().map_err(WireError::from)?);
        let mut writer = FrameWriter::new(link);
        preamble::send(writer.link())?;
        let Agreed { features, .. } = preamble::receive(reader.link())?;
        Ok(Self { reader, writer, features, cancel })
    }

    /// Offers the machine, and hears whether the destination takes it.
    pub(super) fn offer(&mut self, offer: Offer) -> Result<(), SourceError> {
        if offer.post_copy && !self.features.has(Features::POST_COPY) {
            return Err(SourceError::NoPostCopy);
        }
        self.send(&Message::Offer(offer))?;
        match self.receive("accept")? {
            Message::Accept(accepted) => {
                tracing::info!(can_page_out = accepted.can_page_out, "the destination takes the machine");
                Ok(())
            }
            other => Err(unexpected(&other, "accept").into()),
        }
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), SourceError> {
        Ok(message.send(&mut self.writer)?)
    }

    pub(super) fn receive(&mut self, expected: &'static str) -> Result<Message, SourceError> {
        match receive_message(&mut self.reader, expected)? {
            Message::Refuse(refusal) => Err(SourceError::Refused(refusal)),
            message => Ok(message),
        }
    }

    /// As [`Peer::receive`], for what has to come within `limit`.
    pub(super) fn receive_within(&mut self, limit: Duration, expected: &'static str) -> Result<Message, SourceError> {
        self.reader.link().set_deadline(Some(Instant::now() + limit));
        let received = self.receive(expected);
        self.reader.link().set_deadline(None);
        received
    }

    /// Until when all that is said and heard has to be.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.link().set_deadline(deadline);
        self.writer.link().set_deadline(deadline);
    }

    pub(super) fn check_cancelled(&self) -> Result<(), SourceError> {
        if self.cancel.is_cancelled() { Err(SourceError::Cancelled) } else { Ok(()) }
    }

    /// From here on the migration cannot be cancelled.
    pub(super) fn close_cancel(&self) -> Result<(), SourceError> {
        if self.cancel.close() { Ok(()) } else { Err(SourceError::Cancelled) }
    }

    /// What was behind a connection that broke: our own cancelling, or a refusal that is still to be read. May wait for the
    /// network a moment, and so is not for when the guest is paused.
    pub(super) fn explain(&mut self, error: SourceError) -> SourceError {
        if self.cancel.is_cancelled() {
            return SourceError::Cancelled;
        }
        if matches!(error, SourceError::Wire(WireError::Io(_))) {
            self.reader.link().set_deadline(Some(Instant::now() + LAST_WORDS));
            if let Ok(Message::Refuse(refusal)) = receive_message(&mut self.reader, "refuse") {
                return SourceError::Refused(refusal);
            }
        }
        error
    }

    /// Says that the guest stays here. The connection may be what broke.
    pub(super) fn abort(&mut self, why: &SourceError) {
        self.writer.link().set_deadline(Some(Instant::now() + LAST_WORDS));
        let _ = self.send(&Message::Abort(why.to_string()));
    }
}

/// A message that does not belong here.
pub(super) fn unexpected(found: &Message, expected: &'static str) -> WireError {
    WireError::Unexpected { found: found.name(), expected }
}
