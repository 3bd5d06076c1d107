//! Bugs in the order of things on a GPU, which tests plant to show that they would find them: the
//! environment variable `KVXFER_PLANTED` names one. A build without `--cfg kvxfer_planted` has none: the
//! question is then constantly answered with no.

/// What can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Copies do not wait for the engine's event.
    EngineEventIgnored,
    /// A batch reads its sources when it likes, not in the stream's order.
    BatchOutOfOrder,
    /// The event that an engine waits for before it reuses blocks does not lie behind the copies that read
    /// them.
    ReadEventMissing,
    /// Copies are reported as done when they were started.
    DoneBeforeCompletion,
    /// A chunk's pages are let go while its layers are still being loaded.
    PageFreedEarly,
    /// A segment counts as let go while posts to it are under way.
    SegmentHandedOnEarly,
}

#[cfg(kvxfer_planted)]
pub(crate) fn planted(bug: Bug) -> bool {
    use std::sync::LazyLock;
    static CHOSEN: LazyLock<Option<String>> =
        LazyLock::new(|| std::env::var("KVXFER_PLANTED").ok());
    CHOSEN.as_deref() == Some(&*format!("{bug:?}"))
}

#[cfg(not(kvxfer_planted))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
