//! Bugs that the simulation plants, to show that it would find them (`make sim`). A build without
//! `--cfg kvxfer_planted` has none: the question is then constantly answered with no.

/// What can be planted.
#[cfg_attr(not(kvxfer_planted), expect(unreachable_pub, reason = "only the simulation names them"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The pages of a grant that ran out are freed, not quarantined.
    DeadlineFrees,
    /// The end of a link is taken for a fence.
    EofFences,
    /// A commit that comes after its grant was revoked is indexed.
    LateCommitIndexed,
    /// A chunk is matched and not pinned.
    MatchWithoutPin,
    /// A chunk is dropped after one load though more are to be expected.
    DropIgnoresExpected,
    /// An expected claim gives way at once when there is no room.
    ExpectedYield,
    /// A fence is acknowledged while writes are under way.
    FenceAckEarly,
    /// Fresh memory behind one writer's segment is taken for the death of all writers.
    ReplaceFreesOthers,
    /// A segment that its writer does not let go of in time is given to the next one.
    RetireFrees,
}

#[cfg(kvxfer_planted)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in this thread's sessions, or none.
#[cfg(kvxfer_planted)]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

#[cfg(kvxfer_planted)]
pub(super) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[cfg(not(kvxfer_planted))]
pub(super) const fn planted(_: Bug) -> bool {
    false
}
