//! What the environment asks for.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use crate::abi::Code;
use crate::faults::Fault;

/// `KVXFER_STANDIN`: `key=value`, joined by `;`. See `README.md`.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) devices: u32,
    /// Bytes of each device.
    pub(crate) memory: u64,
    pub(crate) links: Links,
    pub(crate) mig: BTreeSet<u32>,
    pub(crate) hidden: BTreeSet<u32>,
    /// As `cuDriverGetVersion` answers it: 12080 is 12.8.
    pub(crate) driver: i32,
    pub(crate) missing: Vec<String>,
    pub(crate) faults: Vec<Fault>,
    /// A folder shared by the processes that see the same devices.
    pub(crate) ledger: Option<PathBuf>,
    pub(crate) fabric: bool,
    /// Of the order in which streams run.
    pub(crate) seed: u64,
}

/// Which devices reach which: pairs of ordinals, the lower one first.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// None: all pairs that `pcie` doesn't name, unless it names some.
    pub(crate) nvlink: Option<BTreeSet<(u32, u32)>>,
    pub(crate) pcie: Option<BTreeSet<(u32, u32)>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            devices: 2,
            memory: 4 << 30,
            links: Links::default(),
            mig: BTreeSet::new(),
            hidden: BTreeSet::new(),
            driver: 12080,
            missing: Vec::new(),
            faults: Vec::new(),
            ledger: None,
            fabric: false,
            seed: 0,
        }
    }
}

impl Config {
    /// # Errors
    /// The part that can't be understood.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or(part)?;
            config.set(key, value).ok_or(part)?;
        }
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "devices" => self.devices = value.parse().ok()?,
            "memory" => self.memory = bytes(value)?,
            "nvlink" => self.links.nvlink = Some(list(value, pair)?.into_iter().collect()),
            "p2p" => self.links.pcie = Some(list(value, pair)?.into_iter().collect()),
            "mig" => self.mig = list(value, |item| item.parse().ok())?.into_iter().collect(),
            "hidden" => self.hidden = list(value, |item| item.parse().ok())?.into_iter().collect(),
            "driver" => self.driver = value.parse().ok()?,
            "missing" => self.missing = list(value, |item| Some(item.to_owned()))?,
            "fail" => self.faults.extend(list(value, |item| fault(item, false))?),
            "sticky" => self.faults.extend(list(value, |item| fault(item, true))?),
            "ledger" => self.ledger = Some(value.into()),
            "fabric" => self.fabric = value == "1",
            "seed" => self.seed = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

fn list<T>(text: &str, item: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    text.split(',').filter(|text| !text.is_empty()).map(item).collect()
}

/// "0-1": the lower one first.
fn pair(text: &str) -> Option<(u32, u32)> {
    let (one, other) = text.split_once('-')?;
    let (one, other) = (one.parse::<u32>().ok()?, other.parse::<u32>().ok()?);
    Some((one.min(other), one.max(other)))
}

/// "512MiB", "1GiB", or a number of bytes.
fn bytes(text: &str) -> Option<u64> {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if let Some(number) = text.strip_suffix(unit) {
            return number.parse::<u64>().ok()?.checked_mul(1 << shift);
        }
    }
    text.parse().ok()
}

/// "cuMemCreate:3:2": the third one answers 2.
fn fault(text: &str, sticky: bool) -> Option<Fault> {
    let mut parts = text.split(':');
    let fault = Fault {
        call: parts.next()?.to_owned(),
        nth: parts.next()?.parse().ok()?,
        code: Code(parts.next()?.parse().ok()?),
        sticky,
        calls: AtomicU64::new(0),
    };
    parts.next().is_none().then_some(fault)
}
