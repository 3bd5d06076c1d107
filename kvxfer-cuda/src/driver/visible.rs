//! What the driver tells of the GPUs that this process sees, without using them.

use std::fmt;
use std::path::Path;

use super::error::Result;
use super::handles::RawDevice;
use super::{Attribute, Device, Shared};

/// The name of a GPU, or of a MIG slice, that all processes of all containers agree on. Ordinals are each
/// process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// How one device reaches another one's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerLink {
    /// It is the same device.
    Same,
    /// NVLink: native atomics work across it.
    NvLink,
    /// PCIe, peer to peer.
    Pcie,
    /// Not at all.
    None {
        /// Why not.
        why: &'static str,
        /// What to do about it.
        fix: &'static str,
    },
}

impl fmt::Display for PeerLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same GPU",
            Self::NvLink => "NVLink",
            Self::Pcie => "PCIe",
            Self::None { why, .. } => why,
        })
    }
}

/// A GPU that this process sees. Asking about it retains no context, so it costs none of its memory.
#[derive(Clone, Debug)]
pub struct Visible {
    driver: Shared,
    raw: RawDevice,
    ordinal: u32,
    uuid: Uuid,
    name: String,
}

impl Visible {
    /// The GPU with that number in this process.
    ///
    /// # Errors
    /// The driver's: there is no such device.
    pub fn open(driver: Shared, ordinal: u32) -> Result<Self> {
        // SAFETY: the handle comes from the driver.
        let (raw, uuid, name) = unsafe {
            let raw = driver.device(ordinal)?;
            (raw, Uuid(driver.device_uuid(raw)?), driver.device_name(raw)?)
        };
        Ok(Self { driver, raw, ordinal, uuid, name })
    }

    /// All of them.
    ///
    /// # Errors
    /// The driver's.
    pub fn all(driver: &Shared) -> Result<Vec<Self>> {
        (0..Device::count(driver)?).map(|ordinal| Self::open(driver.clone(), ordinal)).collect()
    }

    pub(super) fn driver(&self) -> &Shared {
        &self.driver
    }

    pub(super) fn raw(&self) -> RawDevice {
        self.raw
    }

    /// Its number in this process.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Its name everywhere.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The product.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is a slice of a GPU, which can't share memory with other processes' slices.
    pub fn is_mig(&self) -> bool {
        self.name.contains("MIG")
    }

    /// Whether an MPS server works for this process: then a client's death doesn't end its work. Drivers before CUDA
    /// 12.4 don't tell; then what the environment tells has to do.
    pub fn under_mps(&self) -> bool {
        self.attribute(Attribute::Mps).map_or_else(
            |_| {
                std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").is_some()
                    || Path::new("/tmp/nvidia-mps").exists()
            },
            |value| value != 0,
        )
    }

    /// The CUDA version of the driver: 12080 is 12.8.
    ///
    /// # Errors
    /// The driver's.
    pub fn driver_version(&self) -> Result<i32> {
        // SAFETY: needs nothing.
        unsafe { self.driver.version() }
    }

    fn attribute(&self, attribute: Attribute) -> Result<i32> {
        // SAFETY: the handle is the driver's.
        unsafe { self.driver.device_attribute(self.raw, attribute) }
    }

    /// Whether it has what that attribute is about. What the driver doesn't know, it can't do.
    pub fn supports(&self, what: Attribute) -> bool {
        self.attribute(what).is_ok_and(|value| value != 0)
    }

    /// Its multiprocessors.
    ///
    /// # Errors
    /// The driver's.
    pub fn multiprocessors(&self) -> Result<u32> {
        Ok(u32::try_from(self.attribute(Attribute::Multiprocessors)?).unwrap_or(1))
    }

    /// Major and minor: (9, 0) for Hopper.
    ///
    /// # Errors
    /// The driver's.
    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        Ok((self.attribute(Attribute::ComputeMajor)?, self.attribute(Attribute::ComputeMinor)?))
    }

    /// Bytes it has in all.
    ///
    /// # Errors
    /// The driver's.
    pub fn total_memory(&self) -> Result<u64> {
        // SAFETY: the handle is the driver's.
        unsafe { self.driver.total_memory(self.raw) }
    }

    /// How it reaches the memory of the one with that name.
    ///
    /// # Errors
    /// The driver's.
    pub fn link_to(&self, other: Uuid) -> Result<PeerLink> {
        if self.is_mig() {
            return Ok(PeerLink::None {
                why: "it is a MIG slice, which shares no memory with other processes",
                fix: "give kvxfer whole GPUs, or set kv_buffer_device to cpu",
            });
        }
        if self.uuid == other {
            return Ok(PeerLink::Same);
        }
        let Some(peer) = lookup(&self.driver, other)? else {
            return Ok(PeerLink::None {
                why: "that GPU is not visible to this process",
                fix: "let both containers see both GPUs (--gpus all), and choose with \
                      CUDA_VISIBLE_DEVICES",
            });
        };
        // SAFETY: both handles are the driver's.
        unsafe {
            if !self.driver.can_access_peer(self.raw, peer)? {
                return Ok(PeerLink::None {
                    why: "the driver allows no peer access between the two",
                    fix: "choose GPUs that nvidia-smi topo -p2p w shows as OK, or set \
                          kv_buffer_device to cpu",
                });
            }
            let nvlink = self.driver.native_peer_atomics(self.raw, peer)?;
            Ok(if nvlink { PeerLink::NvLink } else { PeerLink::Pcie })
        }
    }

    /// The driver's own rank of that link among its kind: the lower, the faster.
    ///
    /// # Errors
    /// The driver's; it ranks no device with itself.
    pub fn rank_to(&self, other: &Self) -> Result<i32> {
        // SAFETY: both handles are the driver's.
        unsafe { self.driver.peer_rank(self.raw, other.raw) }
    }

    /// Whether its memory can be shared as a file descriptor.
    pub fn supports_posix_fd(&self) -> bool {
        self.supports(Attribute::PosixFd)
    }

    /// Whether its memory can be shared between hosts.
    pub fn supports_fabric(&self) -> bool {
        self.supports(Attribute::Fabric)
    }

    /// Whether mapped memory may be asked to be reachable by a network card.
    pub(super) fn supports_rdma(&self) -> bool {
        self.supports(Attribute::RdmaMapped)
    }
}

/// The handle of the device with that name, if this process sees it.
fn lookup(driver: &Shared, uuid: Uuid) -> Result<Option<RawDevice>> {
    for ordinal in 0..Device::count(driver)? {
        // SAFETY: the handle comes from the driver.
        let (raw, found) = unsafe {
            let raw = driver.device(ordinal)?;
            (raw, driver.device_uuid(raw)?)
        };
        if found == uuid.0 {
            return Ok(Some(raw));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_prints_as_nvidia_smi_prints_it() {
        let uuid = Uuid(std::array::from_fn(|at| at as u8 * 17));
        assert_eq!(uuid.to_string(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
