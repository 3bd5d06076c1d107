//! Which committed chunks to give up, and when.
