//! What happens because time passes.

use std::time::Duration;

use kvxfer_core::wire::{self, Message};
use kvxfer_core::{ErrorKind, LinkId, Time};

use super::Control;
use super::link::{Link, Stage};
use super::listener::Accepting;

/// Log lines of one kind are at least that far apart.
const QUIET: Duration = Duration::from_secs(10);

impl Control {
    /// No timer is due before `next_due`; this one is due at `time`.
    pub(super) fn due_at(&mut self, time: Time) {
        self.next_due = Some(self.next_due.map_or(time, |due| due.min(time)));
    }

    /// Gives what happened since the time was last read the present one. The bounds that
    /// [`Control::due_at`] was told of it were earlier, so they still hold.
    pub(super) fn date(&mut self) {
        for id in self.fresh.drain(..) {
            if let Some(link) = self.links.get_mut(&id) {
                link.fresh = false;
                link.heard = self.now;
                link.born.get_or_insert(self.now);
            }
        }
        self.date_dials();
        self.accepting.date(self.now);
    }

    pub(super) fn run_timers(&mut self) {
        self.next_due = None;
        if self.accepting.is_over(self.now) {
            self.resume_accepting();
        }
        self.run_dials();
        let due = |control: &Self, link: &Link| control.due(link) <= control.now;
        let ids: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| due(self, link)).map(|(id, _)| *id).collect();
        for id in ids {
            self.run_link(id);
        }
        let links = self.links.values().map(|link| self.due(link));
        let next = links.chain(self.dial_timers()).chain(self.accepting.due()).min();
        if let Some(next) = next {
            self.due_at(next);
        }
    }

    /// When a link needs us, nothing coming in.
    fn due(&self, link: &Link) -> Time {
        let limits = &self.config.limits;
        match link.stage {
            Stage::Up { leased: false, .. } => Time::MAX,
            Stage::Up { .. } => {
                let heard = if link.fresh { self.now } else { link.heard };
                (heard + limits.silence).min(link.said + limits.silence / 3)
            }
            _ => link.born.unwrap_or(self.now) + limits.hello_timeout,
        }
    }

    fn run_link(&mut self, id: LinkId) {
        let limits = self.config.limits;
        let overdue = |link: &Link, now: Time| match link.stage {
            Stage::Up { leased, .. } => leased && !link.fresh && link.heard + limits.silence <= now,
            _ => link.born.is_some_and(|born| born + limits.hello_timeout <= now),
        };
        // We may have been paused, and the poll that just ended takes no more than a batch: whatever
        // the kernel holds of this link is read before it is judged.
        if self.links.get(&id).is_some_and(|link| overdue(link, self.now)) {
            match self.links[&id].stage {
                Stage::Connecting => {}
                _ => self.read(id),
            }
        }
        let Some(link) = self.links.get_mut(&id) else { return };
        if overdue(link, self.now) {
            let error = match link.stage {
                Stage::Connecting => ErrorKind::Timeout
                    .error(format!("cannot be reached within {:?}", limits.hello_timeout)),
                Stage::Greeting => ErrorKind::Timeout
                    .error(format!("said no hello within {:?}", limits.hello_timeout)),
                Stage::Up { .. } => {
                    ErrorKind::PeerLost.error(format!("silent for {:?}", limits.silence))
                }
            };
            let error = link.named(&error);
            return self.end(id, error);
        }
        if let Stage::Up { version, leased: true, .. } = link.stage
            && link.said + limits.silence / 3 <= self.now
        {
            // Whatever already waits will do.
            if link.outbox.len() == 0 {
                let us = self.config.hello.incarnation;
                let _ =
                    link.outbox.push(&[], |bytes| wire::encode(&Message::Ping, us, version, bytes));
                self.dirty.push(id);
            }
            link.said = self.now;
        }
    }
}

impl Accepting {
    fn date(&mut self, now: Time) {
        if let Self::Paused { since } = self {
            since.get_or_insert(now);
        }
    }
}

/// Lets a log line through now and then.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    last: Option<Time>,
    muted: u64,
}

impl Throttle {
    /// Whether to log now: then how many were left out since the last one.
    pub(crate) fn pass(&mut self, now: Time) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + QUIET) {
            self.muted += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.muted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_now_and_then() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.pass(Duration::ZERO), Some(0));
        for second in 1..10 {
            assert_eq!(throttle.pass(Duration::from_secs(second)), None);
        }
        assert_eq!(throttle.pass(Duration::from_secs(10)), Some(9));
    }
}
