//! UCX, started.

use std::ffi::CStr;
use std::ptr;
use std::sync::Arc;

use kvxfer_core::{Error, ErrorKind, Result};
use ucx_sys::*;

use super::Library;
use super::library::c_string;

/// What UCX may use. Where nothing is said here, the environment (`UCX_TLS`, `UCX_NET_DEVICES`, …) has its say, and
/// then UCX.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Its transports, as in `UCX_TLS`: "tcp", "rc,cuda_copy", "^shm".
    pub transports: Option<String>,
    /// Network devices, as in `UCX_NET_DEVICES`: "lo", "mlx5_0:1".
    pub devices: Option<String>,
    /// Anything else: names as in the environment, without `UCX_`.
    pub more: Vec<(String, String)>,
}

/// UCX with its options: what workers and registrations are made of. Any thread may use it.
#[derive(Debug)]
pub struct Context {
    library: &'static Library,
    raw: ucp_context_h,
}

// SAFETY: the context is made with `mt_workers_shared`, so UCX locks what its calls share.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Starts UCX.
    ///
    /// # Errors
    /// `Config`: an option that UCX doesn't know, or a value that it doesn't take. `NoPath`: no such transport or
    /// device on this host. `Io`: it doesn't start.
    pub fn new(library: &'static Library, options: &Options) -> Result<Arc<Self>> {
        let settings = Settings::read(library)?;
        let named = [("TLS", &options.transports), ("NET_DEVICES", &options.devices)];
        let named = named.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        let more = options.more.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in named.chain(more) {
            settings.set(name, value)?;
        }
        let params = ucp_params_t {
            field_mask: UCP_PARAM_FIELD_FEATURES
                | UCP_PARAM_FIELD_REQUEST_SIZE
                | UCP_PARAM_FIELD_MT_WORKERS_SHARED
                | UCP_PARAM_FIELD_NAME,
            features: UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
            // The token of an operation; see `inbox`.
            request_size: size_of::<u64>(),
            mt_workers_shared: 1,
            name: c"kvxfer".as_ptr(),
            ..zeroed()
        };
        let (major, minor) = API_VERSION;
        let mut raw = ptr::null_mut();
        // SAFETY: all that is passed outlives the call, and says in its mask what is set in it.
        let status = unsafe {
            (library.ucp.ucp_init_version)(major, minor, &params, settings.raw, &mut raw)
        };
        if status != UCS_OK {
            let about = format!("UCX doesn't start with {options:?}: {}", library.says(status));
            let kind = if status == UCS_ERR_NO_DEVICE { ErrorKind::NoPath } else { ErrorKind::Io };
            return Err(kind
                .error(about)
                .fix("`ucx_info -d` lists the transports and devices that this host has"));
        }
        Ok(Arc::new(Self { library, raw }))
    }

    /// Whether it takes memory of NVIDIA GPUs.
    ///
    /// # Errors
    /// UCX's.
    pub fn takes_cuda(&self) -> Result<bool> {
        let mut attr: ucp_context_attr_t =
            ucp_context_attr_t { field_mask: UCP_ATTR_FIELD_MEMORY_TYPES, ..zeroed() };
        // SAFETY: the context is alive; one field is asked for.
        let status = unsafe { (self.ucp().ucp_context_query)(self.raw, &mut attr) };
        self.check("what memory it takes", status)?;
        Ok(attr.memory_types & (1 << UCS_MEMORY_TYPE_CUDA) != 0)
    }

    /// The library.
    pub fn library(&self) -> &'static Library {
        self.library
    }

    pub(super) fn ucp(&self) -> &'static Ucp {
        &self.library.ucp
    }

    pub(super) fn raw(&self) -> ucp_context_h {
        self.raw
    }

    /// `what` is for people.
    pub(super) fn check(&self, what: &str, status: ucs_status_t) -> Result<()> {
        if status == UCS_OK { Ok(()) } else { Err(failed(self.library, what, status)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: whatever was made of it holds it, so this is the last use.
        unsafe { (self.ucp().ucp_cleanup)(self.raw) }
    }
}

/// A status as an error.
pub(super) fn failed(library: &Library, what: &str, status: ucs_status_t) -> Error {
    let kind = match status {
        UCS_ERR_CONNECTION_RESET
        | UCS_ERR_NOT_CONNECTED
        | UCS_ERR_ENDPOINT_TIMEOUT
        | UCS_ERR_TIMED_OUT
        | UCS_ERR_CANCELED => ErrorKind::PeerLost,
        UCS_ERR_UNREACHABLE | UCS_ERR_NO_DEVICE => ErrorKind::NoPath,
        _ => ErrorKind::Io,
    };
    let error = kind.error(format!("UCX: {what}: {}", library.says(status)));
    match kind {
        ErrorKind::NoPath => {
            error.fix("let UCX_TLS and UCX_NET_DEVICES name a network that both hosts are on")
        }
        _ => error,
    }
}

/// UCX's configuration, from the environment.
struct Settings {
    library: &'static Library,
    raw: ucp_config_h,
}

impl Settings {
    fn read(library: &'static Library) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: no prefix and no file is the environment; the answer is ours to release.
        let status = unsafe { (library.ucp.ucp_config_read)(ptr::null(), ptr::null(), &mut raw) };
        match status {
            UCS_OK => Ok(Self { library, raw }),
            _ => Err(failed(library, "reading its configuration", status)),
        }
    }

    fn set(&self, name: &str, value: &str) -> Result<()> {
        let texts = (c_string(name)?, c_string(value)?);
        let (key, text): (&CStr, &CStr) = (&texts.0, &texts.1);
        // SAFETY: the configuration is alive, and keeps no text of ours.
        let status =
            unsafe { (self.library.ucp.ucp_config_modify)(self.raw, key.as_ptr(), text.as_ptr()) };
        if status == UCS_OK {
            return Ok(());
        }
        let about = format!("UCX doesn't take UCX_{name}={value}: {}", self.library.says(status));
        Err(ErrorKind::Config.error(about).fix("`ucx_info -cf` lists its options"))
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // SAFETY: read from this library, and released once.
        unsafe { (self.library.ucp.ucp_config_release)(self.raw) }
    }
}
