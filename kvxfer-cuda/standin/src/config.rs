//! What the environment asks for.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use crate::abi::Code;
use crate::faults::{Fault, When};
use crate::state::Gpu;

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
    /// Whether an MPS server is said to be there.
    pub(crate) mps: bool,
    /// Whether fabric handles work.
    pub(crate) fabric: bool,
    /// Whether memory that asks to be reached by RDMA can be.
    pub(crate) rdma: bool,
    /// Of the order in which streams run.
    pub(crate) seed: u64,
    /// Milliseconds of quiet after which work is run that nobody waits for.
    pub(crate) delay: u64,
    /// Milliseconds without any step after which waiting for a stream fails.
    pub(crate) stuck: u64,
    /// Whether unordered accesses to the same bytes break the device.
    pub(crate) races: bool,
}

/// Which devices reach which: pairs of places in the machine, the lower one first. When neither is given,
/// NVLink joins all.
#[derive(Debug, Default)]
pub(crate) struct Links {
    nvlink: Option<BTreeSet<(u32, u32)>>,
    pcie: Option<BTreeSet<(u32, u32)>>,
}

/// How two devices reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    None,
    Pcie,
    Nvlink,
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
            mps: false,
            fabric: false,
            rdma: true,
            seed: 0,
            delay: 50,
            stuck: 30_000,
            races: true,
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
            "fail" => self.faults.extend(list(value, |item| fault(item, When::Once))?),
            "sticky" => self.faults.extend(list(value, |item| fault(item, When::Sticky))?),
            "late" => self.faults.extend(list(value, |item| fault(item, When::Late))?),
            "ledger" => self.ledger = Some(value.into()),
            "mps" => self.mps = flag(value)?,
            "fabric" => self.fabric = flag(value)?,
            "rdma" => self.rdma = flag(value)?,
            "seed" => self.seed = value.parse().ok()?,
            "delay" => self.delay = value.parse().ok()?,
            "stuck" => self.stuck = value.parse().ok()?,
            "races" => self.races = value != "0",
            _ => return None,
        }
        Some(())
    }
}

impl Config {
    /// How two different devices reach each other. A part of a device reaches nobody.
    pub(crate) fn link(&self, one: Gpu, other: Gpu) -> Link {
        let pair = (one.0.min(other.0), one.0.max(other.0));
        let named =
            |pairs: &Option<BTreeSet<_>>| pairs.as_ref().is_some_and(|pairs| pairs.contains(&pair));
        let Links { nvlink, pcie } = &self.links;
        if one == other || self.mig.contains(&one.0) || self.mig.contains(&other.0) {
            Link::None
        } else if named(nvlink) || (nvlink.is_none() && pcie.is_none()) {
            Link::Nvlink
        } else if named(pcie) {
            Link::Pcie
        } else {
            Link::None
        }
    }

    /// Whether a device's memory can be reached over a link, or is its own.
    pub(crate) fn reaches(&self, from: Gpu, to: Gpu) -> bool {
        from == to || self.link(from, to) != Link::None
    }

    /// The same for each process of the machine.
    pub(crate) fn uuid(&self, gpu: Gpu) -> [u8; 16] {
        let mut uuid = *b"kvxfer-standin\0\0";
        uuid[14] = u8::from(self.mig.contains(&gpu.0));
        uuid[15] = gpu.0 as u8;
        uuid
    }

    /// "GPU-6b767866-6572-2d73-7461-6e64696e0000".
    fn uuid_text(&self, gpu: Gpu) -> String {
        let kind = if self.mig.contains(&gpu.0) { "MIG" } else { "GPU" };
        let mut text = kind.to_owned();
        for (index, byte) in self.uuid(gpu).iter().enumerate() {
            if [0, 4, 6, 8, 10].contains(&index) {
                text.push('-');
            }
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

/// The devices that a process sees whose `CUDA_VISIBLE_DEVICES` is `choice`: ordinals or beginnings of
/// UUIDs, up to the first one that names nothing or was named before.
pub(crate) fn visible(config: &Config, choice: Option<&str>) -> Vec<Gpu> {
    let there: Vec<Gpu> =
        (0..config.devices).filter(|index| !config.hidden.contains(index)).map(Gpu).collect();
    let Some(choice) = choice else { return there };
    let mut seen = Vec::new();
    for item in choice.split(',').map(str::trim) {
        let found = match item.parse::<usize>() {
            Ok(ordinal) => there.get(ordinal).copied(),
            Err(_) => {
                let is = |gpu: &Gpu| item.len() > 4 && config.uuid_text(*gpu).starts_with(item);
                there.iter().copied().find(is)
            }
        };
        match found {
            Some(gpu) if !seen.contains(&gpu) => seen.push(gpu),
            _ => break,
        }
    }
    seen
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

fn flag(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
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
fn fault(text: &str, when: When) -> Option<Fault> {
    let mut parts = text.split(':');
    let fault = Fault {
        call: parts.next()?.to_owned(),
        nth: parts.next()?.parse().ok()?,
        code: Code(parts.next()?.parse().ok()?),
        when,
        calls: AtomicU64::new(0),
    };
    parts.next().is_none().then_some(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_named() {
        for text in
            ["devices", "devices=x", "devices=1;memory=1GB", "p2p=0", "fail=a:1", "mig=a", "x=1"]
        {
            let part = text.rsplit(';').next().unwrap();
            assert_eq!(Config::parse(text).unwrap_err(), part);
        }
        let config =
            Config::parse(" devices=3; memory=512MiB;;sticky=cuMemCreate:2:700 ;").unwrap();
        assert_eq!((config.devices, config.memory), (3, 512 << 20));
        let fault = &config.faults[0];
        assert_eq!((fault.call.as_str(), fault.nth, fault.code), ("cuMemCreate", 2, Code(700)));
        assert_eq!(fault.when, When::Sticky);
    }

    #[test]
    fn links_are_nvlink_unless_some_are_named() {
        let link = |text: &str, one, other| Config::parse(text).unwrap().link(Gpu(one), Gpu(other));
        assert_eq!(link("devices=3", 2, 0), Link::Nvlink);
        assert_eq!(link("devices=3;mig=2", 2, 0), Link::None);
        let some = "devices=3;nvlink=1-0;p2p=1-2";
        assert_eq!(link(some, 0, 1), Link::Nvlink);
        assert_eq!(link(some, 2, 1), Link::Pcie);
        assert_eq!(link(some, 0, 2), Link::None);
        assert_eq!(link("devices=2;p2p=", 0, 1), Link::None);
        assert_eq!(link("", 1, 1), Link::None);
    }

    #[test]
    fn a_choice_of_devices_ends_at_the_first_that_is_none() {
        let config = Config::parse("devices=4;hidden=1").unwrap();
        let seen = |choice| visible(&config, choice).iter().map(|gpu| gpu.0).collect::<Vec<_>>();
        assert_eq!(seen(None), [0, 2, 3]);
        assert_eq!(seen(Some("")), []);
        assert_eq!(seen(Some("2, 0")), [3, 0]);
        assert_eq!(seen(Some("1,-1,0")), [2]);
        assert_eq!(seen(Some("1,1,0")), [2]);
        let uuid = config.uuid_text(Gpu(3));
        assert_eq!(uuid, "GPU-6b767866-6572-2d73-7461-6e64696e0003");
        assert_eq!(seen(Some(&uuid)), [3]);
        assert_eq!(seen(Some("GPU-6b767866-6572-2d73-7461-6e64696e0001")), []);
    }
}
