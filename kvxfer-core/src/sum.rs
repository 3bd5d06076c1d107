//! The checksum of stored bytes.
