//! Which path each link has: what we are able to do, what is chosen, what has failed before.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use kvxfer_core::path::{Ability, Choice, Pair, PathName, Refusal, choose, judge};
use kvxfer_core::wire::Message;
use kvxfer_core::wire::bounds::reason;
use kvxfer_core::wire::message::Memory;
use kvxfer_core::{Error, ErrorKind, Incarnation, LinkId, Result, Time};

use super::links::Kind;
use super::progress::Progress;
use crate::driver::{PeerLink, Sharing, Uuid};
use crate::transport::local::Local;

/// How bytes get from a producer to a consumer, and why not in a better way.
#[derive(Clone, Debug, PartialEq)]
pub struct Path {
    /// The other side.
    pub peer: Incarnation,
    /// What it calls itself.
    pub peer_name: String,
    /// Whether it is the side that takes the bytes.
    pub to_peer: bool,
    /// The path.
    pub name: PathName,
    /// Which of its ways, where it has several: "NVLink".
    pub lanes: Option<String>,
    /// Each better path, and why it was not taken.
    pub refused: Vec<Refusal>,
    /// Bytes a nanosecond, as seen with the first [`PROBE_BYTES`](kvxfer_core::transport::PROBE_BYTES) that went this
    /// way, if nothing else did at the time.
    pub gbps: Option<f64>,
}

/// What a consumer knows of a producer's link before it has chosen a path.
#[derive(Debug)]
pub(super) struct Reach {
    pub(super) can_pass_fds: bool,
    pub(super) why_not_unix: Option<String>,
    /// The address of ours that was dialled.
    pub(super) local: Option<IpAddr>,
    /// Where the producer's KV is, and what it is able to do, once it has said so.
    pub(super) said: Option<(Memory, Vec<Ability>)>,
}

/// Paths that were tried with a peer's present life, and did not work.
#[derive(Debug, Default)]
pub(super) struct Failures(HashMap<Incarnation, Vec<(PathName, String, Time)>>);

impl Failures {
    /// Why that path is not to be tried again with that peer for now: it got a second chance.
    fn why(&self, peer: Incarnation, path: PathName) -> Option<&str> {
        let mut of_path = self.0.get(&peer)?.iter().rev().filter(|(failed, ..)| *failed == path);
        let last = of_path.next();
        of_path.next().and(last).map(|(_, why, _)| &**why)
    }

    fn note(&mut self, now: Time, peer: Incarnation, path: PathName, why: String) {
        self.0.entry(peer).or_default().push((path, why, now));
    }

    /// After a while a path gets another chance, with the next link.
    fn forget(&mut self, now: Time, after: Duration) {
        self.0.retain(|_, failures| {
            failures.retain(|(.., since)| now.saturating_sub(*since) < after);
            !failures.is_empty()
        });
    }
}

impl Progress {
    /// What a producer says of itself to that peer.
    pub(super) fn abilities_to(&mut self, now: Time, peer: Incarnation) -> Vec<Ability> {
        self.failures.forget(now, self.config.refused_backoff);
        let mut abilities = self.pushes.as_ref().map_or_else(Vec::new, |pushes| pushes.abilities());
        self.retract(peer, &mut abilities);
        abilities
    }

    /// What failed with that peer is not offered to it.
    fn retract(&self, peer: Incarnation, abilities: &mut [Ability]) {
        for ability in abilities {
            let path = ability.path.parse().ok();
            if let Some(why) = path.and_then(|path| self.failures.why(peer, path)) {
                ability.able = Err(why.to_owned());
            }
        }
    }

    /// What there is to choose from: what we see of the pair, and what we are able to.
    fn pair(
        &mut self,
        now: Time,
        peer: Incarnation,
        reach: &Reach,
        memory: Memory,
        theirs: &[Ability],
    ) -> (Pair, Vec<Ability>) {
        let gpus = match (&self.device, memory) {
            (None, _) => None,
            (Some(_), Memory::Host) => Some(Ok(())),
            // Whether one reaches the other the producer says, when it tries to.
            (Some(device), Memory::Cuda { gpu }) => {
                Some(device.link_to(Uuid(gpu)).map(|_| ()).map_err(|error| error.to_string()))
            }
        };
        let why_not = || reach.why_not_unix.clone().unwrap_or("it came over TCP".into());
        let one_process = Local::reaches(peer);
        #[cfg(feature = "faults")]
        let one_process = one_process && self.config.boot_id.is_none();
        // A fabric's memory is named rather than handed over, and the name is good on other hosts.
        let handed = reach.can_pass_fds || self.config.sharing == Sharing::Fabric;
        let pair = Pair {
            one_process,
            hands_memory: handed.then_some(()).ok_or_else(why_not),
            gpus,
            kv_on_gpu: memory != Memory::Host,
        };
        self.failures.forget(now, self.config.refused_backoff);
        let mut ours = match &self.consuming {
            Some(consuming) => consuming.abilities(theirs),
            None => Vec::new(),
        };
        self.retract(peer, &mut ours);
        (pair, ours)
    }

    /// A producer's layout fits: now the path.
    pub(super) fn attach(&mut self, now: Time, id: LinkId) -> Result<()> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let (Kind::Producer(reach), peer) = (&mut link.kind, link.peer) else { return Ok(()) };
        let Some((memory, theirs)) = reach.said.take() else { return Ok(()) };
        let reach = Reach { why_not_unix: reach.why_not_unix.clone(), said: None, ..*reach };
        let (pair, ours) = self.pair(now, peer, &reach, memory, &theirs);
        let Choice { path, refused } = choose(&pair, &ours, &theirs, self.config.require_path)?;
        if let Some(consuming) = &mut self.consuming {
            consuming.welcome(path, peer, reach.local, &theirs)?;
        }
        let lanes = match (path, memory, &self.device) {
            (PathName::CudaIpc, Memory::Cuda { gpu }, Some(device)) => {
                let link = device.link_to(Uuid(gpu))?;
                (!matches!(link, PeerLink::None { .. })).then(|| link.to_string())
            }
            _ => None,
        };
        self.chosen(id, path, lanes, refused.clone());
        let message = Message::Attached { path: path.as_str().into(), refused };
        self.send(now, id, &message);
        self.joined(id);
        Ok(())
    }

    /// Somebody wants to know what it would get.
    pub(super) fn examine(
        &mut self,
        now: Time,
        id: LinkId,
        memory: Memory,
        theirs: &[Ability],
    ) -> Result<()> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let (Kind::Examiner(reach), peer) = (&mut link.kind, link.peer) else { return Ok(()) };
        let reach = Reach { why_not_unix: reach.why_not_unix.clone(), said: None, ..*reach };
        let (pair, ours) = self.pair(now, peer, &reach, memory, theirs);
        let refusal = |path: &str, why: String| Refusal { path: path.into(), why: reason(why) };
        let message = match judge(&pair, &ours, theirs, self.config.require_path) {
            Ok(judged) => {
                let best = judged.iter().find(|(_, why)| why.is_none());
                let path = best.map(|(path, _)| path.as_str().to_owned());
                let refused = judged.into_iter();
                let refused = refused.filter_map(|(path, why)| Some(refusal(path.as_str(), why?)));
                Message::Examined { path, refused: refused.collect() }
            }
            Err(error) => {
                Message::Examined { path: None, refused: vec![refusal("any", error.to_string())] }
            }
        };
        self.send(now, id, &message);
        Ok(())
    }

    /// A consumer says how our bytes get to it.
    pub(super) fn attached(&mut self, id: LinkId, path: &str, refused: Vec<Refusal>) -> Result<()> {
        let path: PathName = path.parse().map_err(|error: Error| {
            ErrorKind::Protocol.error(format!("the consumer chose a path of its own: {error}"))
        })?;
        if let Some(required) = self.config.require_path
            && required != path
        {
            let whys: Vec<String> = refused.iter().map(Refusal::to_string).collect();
            return Err(ErrorKind::NoPath
                .error(format!(
                    "the consumer chose {path}, and {required} is required: {}",
                    whys.join("; ")
                ))
                .fix("set up what is missing, or unset require_path"));
        }
        self.chosen(id, path, None, refused);
        self.joined(id);
        Ok(())
    }

    fn chosen(&mut self, id: LinkId, name: PathName, lanes: Option<String>, refused: Vec<Refusal>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.path = Some(Path {
            peer: link.peer,
            peer_name: link.name.clone(),
            to_peer: matches!(link.kind, Kind::Consumer),
            name,
            lanes,
            refused,
            gbps: None,
        });
    }

    /// The path of a link does not work, or no more. The next link proves it again, or, if the operator allows for that
    /// and it fails a second time, has the next best.
    pub(super) fn path_failed(&mut self, now: Time, id: LinkId, error: Error) -> Error {
        let Some((peer, path)) = self
            .links
            .get(&id)
            .and_then(|link| link.path.as_ref().map(|path| (link.peer, path.name)))
        else {
            return error;
        };
        let what = format!("{path} failed: {error}");
        if !self.config.failover {
            return error.kind().error(what);
        }
        self.failures.note(now, peer, path, format!("it failed: {error}"));
        if self.failures.why(peer, path).is_some() {
            tracing::warn!(%peer, %error, "{path} failed twice: the next attempt takes the next best path");
        }
        // Not for good: soon there is another.
        ErrorKind::PeerLost.error(what).retry()
    }

    /// A probe that nothing disturbed took so long; 0: something did.
    pub(super) fn probed(&mut self, id: LinkId, nanos: u64) {
        let Some(path) = self.links.get_mut(&id).and_then(|link| link.path.as_mut()) else {
            return;
        };
        // Some ways are final only when something went over them.
        if path.lanes.is_none() {
            path.lanes = match path.to_peer {
                true => self.pushes.as_ref().and_then(|pushes| pushes.lanes(path.peer)),
                false => self.consuming.as_ref().and_then(|ours| ours.lanes(path.name, path.peer)),
            };
        }
        if path.gbps.is_none() && nanos > 0 {
            let gbps = kvxfer_core::transport::PROBE_BYTES as f64 / nanos as f64;
            path.gbps = Some(gbps);
            let (peer, to) = (&path.peer_name, path.to_peer);
            tracing::info!(
                peer,
                to,
                path = path.label(),
                "the first bytes moved at {gbps:.2} GB/s"
            );
        }
    }
}

impl Path {
    /// For a log line: "cuda_ipc (NVLink)".
    pub fn label(&self) -> String {
        match &self.lanes {
            None => self.name.to_string(),
            Some(lanes) => format!("{} ({lanes})", self.name),
        }
    }

    /// For a log line: why nothing better. Empty if there is nothing better.
    pub fn why(&self) -> String {
        let whys: Vec<String> = self.refused.iter().map(Refusal::to_string).collect();
        whys.join("; ")
    }
}
