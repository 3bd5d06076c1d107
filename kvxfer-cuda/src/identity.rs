//! Who we are: random incarnations, and the kernel's boot id.

use kvxfer_core::{Error, ErrorKind, Incarnation, Result};

/// A new incarnation: 128 random bits.
///
/// # Errors
/// `Io`: the kernel gives no randomness.
pub(crate) fn incarnation() -> Result<Incarnation> {
    read("/proc/sys/kernel/random/uuid").map(Incarnation)
}

/// A secret for one use: the kernel's random bits, 122 of them.
///
/// # Errors
/// `Io`: the kernel gives no randomness.
pub(crate) fn token() -> Result<[u8; 16]> {
    read("/proc/sys/kernel/random/uuid")
}

/// The kernel's boot id: the same in all containers of a host, another after each start.
///
/// # Errors
/// `Io`: /proc is not mounted.
pub(crate) fn boot_id() -> Result<[u8; 16]> {
    read("/proc/sys/kernel/random/boot_id")
}

fn read(path: &str) -> Result<[u8; 16]> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ErrorKind::Io.error(format!("{path}: {error}")))?;
    let bad = || -> Error { ErrorKind::Io.error(format!("{path} holds no uuid: {text:?}")) };
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|d| (d[0] << 4 | d[1]) as u8).collect();
    bytes.try_into().map_err(|_| bad())
}
