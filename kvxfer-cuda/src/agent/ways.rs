//! What bytes can go by: a producer's transports, a consumer's targets, and why the others are missing.

use std::sync::Arc;

use kvxfer_core::path::{Ability, PathName};
use kvxfer_core::wire::bounds::reason;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result};

use super::progress::Progress;
use super::push::Way;
use super::register::{EngineMemory, Registered};
use crate::config::{AgentConfig, Memory as KvMemory};
use crate::control::Address;
use crate::transport::ucx::Settings;
use crate::transport::{CudaIpc, Local, Shm, Target, Tcp, TcpTarget, Ucx, UcxTarget};
#[cfg(feature = "faults")]
use crate::transport::{
    Fault,
    fault::{Act, Faults},
};
use crate::ucx::Context;

/// A producer's ways, and the paths that can't be had.
type Ways = (Vec<Way>, Vec<Ability>);
/// What receives bytes, and the paths that can't be had.
type Targets = (Vec<Box<dyn Target>>, Vec<Ability>);

/// UCX, or why it can't be had.
///
/// # Errors
/// It can't, and is required.
pub(super) fn ucx(config: &AgentConfig) -> Result<Result<Arc<Context>>> {
    let settings = Settings {
        library: config.ucx_library.as_deref(),
        wheel: config.ucx_wheel.as_deref(),
        devices: config.ucx_devices.as_deref(),
        trust: config.trust_ucx_peers,
    };
    let ucx = match config.require_path {
        // It is not loaded for nothing.
        Some(path) if path != PathName::Ucx => {
            Err(ErrorKind::NoPath.error(format!("{path} is required")))
        }
        _ if config.memory != KvMemory::Host => {
            Err(ErrorKind::NoPath.error("KV on a GPU does not go over it yet"))
        }
        _ if !config.role.produces() => receives(config).and_then(|()| settings.start()),
        _ => settings.start(),
    };
    if config.require_path == Some(PathName::Ucx)
        && let Err(error) = ucx
    {
        return Err(required(&error));
    }
    Ok(ucx)
}

/// Whether peers may come from elsewhere than this host: those of this host have better paths.
fn receives(config: &AgentConfig) -> Result<()> {
    if config.require_path == Some(PathName::Ucx) {
        return Ok(());
    }
    let why = match &config.listen {
        Some(Address::Tcp { .. }) if config.allow_insecure || config.trust_ucx_peers => {
            return Ok(());
        }
        Some(Address::Tcp { .. }) => "allow_insecure is not set",
        _ => "it listens on a Unix socket only",
    };
    Err(ErrorKind::NoPath.error(why))
}

fn required(error: &Error) -> Error {
    error.kind().error(format!("ucx is required and can't be had: {error}"))
}

fn unable(error: &Error) -> Ability {
    Ability::unable(PathName::Ucx, reason(error.to_string()))
}

impl Progress {
    /// What the engine's memory can be pushed by.
    pub(super) fn ways(&mut self, registered: &Registered) -> Result<Ways> {
        let regions = match &registered.memory {
            EngineMemory::Host(regions) => regions,
            EngineMemory::Device(regions) => {
                let gpu = self.device.clone().zip(self.copier.take());
                let way = |(gpu, copier)| CudaIpc::new(gpu, Arc::clone(regions), copier);
                let ways = gpu.into_iter().map(|gpu| Way::Gpu(Box::new(way(gpu)))).collect();
                return Ok((ways, self.ucx.as_ref().err().map(unable).into_iter().collect()));
            }
        };
        let local = Local::new(Arc::clone(regions));
        let shm = Shm::new(Arc::clone(regions));
        let tcp = Tcp::new(self.incarnation, Arc::clone(regions))?;
        #[cfg(feature = "faults")]
        if self.config.fault == Some(crate::config::Fault::DropWrites) {
            let faults = Faults::each(Act::Drop);
            let ways = vec![
                Way::Host(Box::new(Fault::new(local, faults.clone()))),
                Way::Host(Box::new(Fault::new(shm, faults))),
                Way::Host(Box::new(tcp)),
            ];
            return Ok((ways, Vec::new()));
        }
        let mut ways =
            vec![Way::Host(Box::new(local)), Way::Host(Box::new(shm)), Way::Host(Box::new(tcp))];
        let mut missing = Vec::new();
        // Nothing is registered with it where it is of no use.
        if self.config.role.produces() {
            match self.ucx.clone().and_then(|context| Ucx::new(&context, Arc::clone(regions))) {
                Ok(ucx) => ways.push(Way::Host(Box::new(ucx))),
                Err(error) if self.config.require_path == Some(PathName::Ucx) => {
                    return Err(required(&error));
                }
                Err(error) => missing.push(unable(&error)),
            }
        }
        Ok((ways, missing))
    }
}

/// What a consumer's pool is written by, where nobody maps it.
pub(super) fn targets(
    us: Incarnation,
    config: &AgentConfig,
    ucx: &Result<Arc<Context>>,
) -> Result<Targets> {
    let mut targets: Vec<Box<dyn Target>> = Vec::new();
    let mut missing = Vec::new();
    let wanted = config.allow_insecure || config.require_path == Some(PathName::Tcp);
    match (&config.listen, config.memory) {
        (_, KvMemory::Device(_)) => {}
        (Some(Address::Tcp { host, .. }), _) if wanted => {
            let (port, streams) = (config.data_port, config.tcp_streams);
            targets.push(Box::new(TcpTarget::bind(us, host, port, streams)?));
        }
        (Some(Address::Tcp { .. }), _) => {
            missing.push(Ability::unable(PathName::Tcp, "allow_insecure is not set"));
        }
        _ => missing.push(Ability::unable(PathName::Tcp, "it listens on a Unix socket only")),
    }
    match receives(config).and_then(|()| ucx.clone()).and_then(UcxTarget::new) {
        Ok(target) => targets.push(Box::new(target)),
        Err(error) if config.require_path == Some(PathName::Ucx) => return Err(required(&error)),
        Err(error) => missing.push(unable(&error)),
    }
    Ok((targets, missing))
}
