//! One path and one shape of requests, with an agent at either end.

use std::time::Duration;

use indicatif::ProgressBar;
use kvxfer_core::path::{Ability, PathName};
use kvxfer_core::wire::message::Memory;
use kvxfer_core::{ErrorKind, Result};
use kvxfer_cuda::control::examine;
use kvxfer_cuda::ucx::Library;
use kvxfer_cuda::{Address, AgentStats, Path, Role};

use super::Common;
use super::engine::{Engine, cpu};
use super::report::{Cpu, Figures, Times};
use super::run::{Server, unexpected};
use super::wire::{Answer, Ask, Load, Shape};

/// Rounds before the timed ones: one that is compared, and more, so that each page of the pool was written once.
pub(super) const WARM: u32 = 3;

/// Why there is nothing to measure.
pub(super) enum No {
    /// In this case alone.
    Case(String),
    /// By this path.
    Path(String),
}

impl From<kvxfer_core::Error> for No {
    fn from(error: kvxfer_core::Error) -> Self {
        match error.lasting() {
            true => Self::Path(error.to_string()),
            false => Self::Case(error.to_string()),
        }
    }
}

pub(super) struct Case {
    engine: Engine,
    shape: Shape,
    path: Path,
    rounds: u32,
    patience: Duration,
}

impl Case {
    /// An agent at either end and the path between them, or why there is none.
    ///
    /// # Errors
    /// The server is gone, or late.
    pub(super) fn start(
        common: &Common,
        server: &mut Server,
        path: PathName,
        shape: Shape,
        rounds: u32,
    ) -> Result<std::result::Result<Self, No>> {
        if let Err(error) = common.admits(shape, rounds) {
            return Ok(Err(error.into()));
        }
        let address = match server.ask(&Ask::Start { shape, path: path.to_string(), rounds })? {
            Answer::Started { address } => address.parse()?,
            Answer::Refused { why } => return Ok(Err(No::Path(format!("the server says: {why}")))),
            Answer::Failed { why } => return Ok(Err(No::Case(format!("the server says: {why}")))),
            other => return Err(unexpected(server.wire.peer(), Some(other))),
        };
        Ok(Self::join(common, address, path, shape, rounds))
    }

    fn join(
        common: &Common,
        address: Address,
        path: PathName,
        shape: Shape,
        rounds: u32,
    ) -> std::result::Result<Self, No> {
        if let Some(why) = why_not(common, &address, path)? {
            return Err(No::Path(why));
        }
        let mut config = Engine::config(Role::Producer, shape);
        config.require_path = Some(path);
        config.peers = vec![address];
        common.settle(&mut config);
        let engine = Engine::start(config, shape, rounds)?;
        let found = match engine.agent.wait_connected(common.timeout) {
            true => engine.agent.stats()?.paths.pop(),
            false => None,
        };
        let Some(path) = found else {
            return Err(No::Path(format!("the agents do not join within {:?}", common.timeout)));
        };
        Ok(Self { engine, shape, path, rounds, patience: common.timeout })
    }

    /// Times the rounds.
    ///
    /// # Errors
    /// The data is not what was sent; the server is gone; something did not come in time.
    pub(super) fn measure(&mut self, server: &mut Server, bar: &ProgressBar) -> Result<Figures> {
        let mut verified_words = 0;
        let mut last = None;
        for round in 0..WARM {
            let check = round == 0;
            if check {
                self.engine.compute(round)?;
            }
            let (_, load) = self.round(server, round, check)?;
            if check {
                verified_words = load.bytes / 8;
            }
            last = Some(load.cpu);
            bar.inc(1);
        }
        let before = self.engine.agent.stats()?;
        let (ours, theirs) = (cpu(), last.unwrap_or_default());
        let (mut pushes, mut loads, mut end) = (Vec::new(), Vec::new(), theirs);
        for round in WARM..self.rounds {
            let (push, load) = self.round(server, round, false)?;
            pushes.push(push);
            loads.push(load.seconds);
            end = load.cpu;
            bar.inc(1);
        }
        let ours = cpu() - ours;
        let AgentStats { pushed_bytes, runs, .. } = self.engine.agent.stats()?;
        // What was counted while the clock ran.
        let gb = (pushed_bytes - before.pushed_bytes) as f64 / 1e9;
        let descriptors = (runs - before.runs) / u64::from(self.rounds - WARM);
        let bytes = self.bytes();
        let push = Times::of(pushes, bytes);
        Ok(Figures {
            bytes,
            path: self.path.name.to_string(),
            lanes: self.path.lanes.clone(),
            why_not_better: self.path.refused.clone(),
            push,
            load: Times::of(loads, bytes),
            descriptors,
            descriptors_per_s: descriptors as f64 / (push.p50_ms / 1e3),
            cpu_s_per_gb: Cpu { producer: ours / gb, consumer: (end - theirs) / gb },
            verified_words,
        })
    }

    fn bytes(&self) -> u64 {
        // It fits in memory.
        self.shape.bytes() as u64
    }

    /// Pushes a request and has it loaded: seconds of the push, and what the server says.
    fn round(&self, server: &mut Server, round: u32, check: bool) -> Result<(f64, Load)> {
        let push = self.engine.push(round, self.patience)?;
        let load = server.load(round, check)?;
        let wrong = load.wrong.unwrap_or(0);
        if load.bytes != self.bytes() || wrong != 0 {
            let about =
                format!("{} of {} bytes came, {wrong} words are wrong", load.bytes, self.bytes());
            return Err(ErrorKind::Corrupt.error(about));
        }
        if load.path != self.path.name.as_str() {
            let about = format!("the bytes came by {}, not by {}", load.path, self.path.name);
            return Err(ErrorKind::NoPath.error(about));
        }
        Ok((push, load))
    }
}

/// Why that path does not lead to the agent there, as it sees that.
fn why_not(common: &Common, address: &Address, path: PathName) -> Result<Option<String>> {
    let able = match path {
        PathName::Ucx => {
            Library::open(common.ucx_library.as_deref(), common.ucx_wheel.as_deref()).map(|_| ())
        }
        _ => Ok(()),
    };
    if let Err(error) = able {
        return Ok(Some(error.to_string()));
    }
    let question = (Memory::Host, vec![Ability::able(path, Vec::new())]);
    let answers = examine(address, "kvxfer bench", true, &[question], common.timeout)?;
    let refused = answers.into_iter().flat_map(|(_, refused)| refused);
    Ok(refused.filter(|refusal| refusal.path == path.as_str()).map(|refusal| refusal.why).next())
}
