//! What a driver call can end in.

use std::fmt;

use kvxfer_core::ErrorKind;

/// Why something of CUDA failed. To format it calls no driver.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver library to load.
    #[error("no CUDA driver: {why}")]
    NoLibrary {
        /// What was looked for.
        why: &'static str,
    },
    /// There is a driver, but it shows this process no device.
    #[error("the CUDA driver shows no device")]
    NoDevice,
    /// The driver lacks an entry point that is needed.
    #[error("the CUDA driver has no {symbol}")]
    MissingSymbol {
        /// Its name.
        symbol: &'static str,
    },
    /// The device, or this version of the driver, can't do that.
    #[error("the device or its driver can't do this: {what}")]
    Unsupported {
        /// What it can't do.
        what: &'static str,
    },
    /// The stream is being captured into a graph: what was asked would break the capture.
    #[error("the stream is being captured into a graph")]
    Capturing,
    /// The range leaves the memory it was meant for.
    #[error("{len} bytes from {offset} leave memory of {bytes} bytes")]
    OutOfBounds {
        /// Where the range starts, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Bytes there are.
        bytes: u64,
    },
    /// The driver refused, or reports that earlier work failed.
    #[error("{call}: {}", Code(*code))]
    Failed {
        /// The entry point.
        call: &'static str,
        /// Its answer.
        code: i32,
    },
}

/// A result of the driver layer.
pub type Result<T> = std::result::Result<T, CudaError>;

impl CudaError {
    /// The driver's code, where one was given.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Failed { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        self.code() == Some(code::OUT_OF_MEMORY)
    }

    /// Whether the device is lost to this process: each later call of its context fails too, and what was
    /// queued did not run to its end.
    pub fn is_sticky(&self) -> bool {
        self.code().is_some_and(|code| STICKY.contains(&code))
    }

    fn fix(&self) -> Option<&'static str> {
        match self {
            Self::NoLibrary { .. } => {
                Some("install the NVIDIA driver, or in a container start it with --gpus")
            }
            Self::NoDevice => Some(
                "see what nvidia-smi lists and what CUDA_VISIBLE_DEVICES holds; start a container with --gpus",
            ),
            Self::MissingSymbol { .. } => Some("install an NVIDIA driver for CUDA 12.0 or newer"),
            Self::Failed { code, .. } => match *code {
                code::OUT_OF_MEMORY => {
                    Some("make buffer_size smaller, or leave more: lower gpu_memory_utilization")
                }
                code::UNSUPPORTED_PTX_VERSION => {
                    Some("install an NVIDIA driver for CUDA 12.0 or newer")
                }
                code::SYSTEM_DRIVER_MISMATCH => Some(
                    "the kernel module and libcuda are of different versions: restart the host",
                ),
                _ => None,
            },
            _ => None,
        }
    }
}

impl From<CudaError> for kvxfer_core::Error {
    fn from(error: CudaError) -> Self {
        let kind = match error {
            CudaError::OutOfBounds { .. } => ErrorKind::OutOfBounds,
            _ => ErrorKind::Device,
        };
        let wrapped = kind.error(error.to_string());
        match error.fix() {
            Some(fix) => wrapped.fix(fix),
            None => wrapped,
        }
    }
}

/// The codes that decide something here.
pub(super) mod code {
    pub(in super::super) const INVALID_VALUE: i32 = 1;
    pub(in super::super) const OUT_OF_MEMORY: i32 = 2;
    pub(in super::super) const STUB_LIBRARY: i32 = 34;
    pub(in super::super) const NO_DEVICE: i32 = 100;
    pub(in super::super) const UNSUPPORTED_PTX_VERSION: i32 = 222;
    pub(in super::super) const NOT_READY: i32 = 600;
    pub(in super::super) const NOT_SUPPORTED: i32 = 801;
    pub(in super::super) const SYSTEM_DRIVER_MISMATCH: i32 = 803;
    pub(in super::super) const CAPTURE_UNSUPPORTED: i32 = 900;
    pub(in super::super) const CAPTURE_ISOLATION: i32 = 905;
    pub(in super::super) const CAPTURE_IMPLICIT: i32 = 906;
}

/// After these the context answers nothing but the same again.
const STICKY: &[i32] = &[214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719];

/// A code with its name, if it has one here.
struct Code(i32);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.binary_search_by_key(&self.0, |&(code, _)| code) {
            Ok(at) => write!(f, "CUDA_ERROR_{} ({})", NAMES[at].1, self.0),
            Err(_) => write!(f, "error {}", self.0),
        }
    }
}

/// `CUresult`, ordered; each without its `CUDA_ERROR_`.
const NAMES: &[(i32, &str)] = &[
    (1, "INVALID_VALUE"),
    (2, "OUT_OF_MEMORY"),
    (3, "NOT_INITIALIZED"),
    (4, "DEINITIALIZED"),
    (34, "STUB_LIBRARY"),
    (46, "DEVICE_UNAVAILABLE"),
    (100, "NO_DEVICE"),
    (101, "INVALID_DEVICE"),
    (102, "DEVICE_NOT_LICENSED"),
    (200, "INVALID_IMAGE"),
    (201, "INVALID_CONTEXT"),
    (205, "MAP_FAILED"),
    (206, "UNMAP_FAILED"),
    (208, "ALREADY_MAPPED"),
    (209, "NO_BINARY_FOR_GPU"),
    (210, "ALREADY_ACQUIRED"),
    (211, "NOT_MAPPED"),
    (214, "ECC_UNCORRECTABLE"),
    (215, "UNSUPPORTED_LIMIT"),
    (216, "CONTEXT_ALREADY_IN_USE"),
    (217, "PEER_ACCESS_UNSUPPORTED"),
    (218, "INVALID_PTX"),
    (219, "INVALID_GRAPHICS_CONTEXT"),
    (220, "NVLINK_UNCORRECTABLE"),
    (221, "JIT_COMPILER_NOT_FOUND"),
    (222, "UNSUPPORTED_PTX_VERSION"),
    (223, "JIT_COMPILATION_DISABLED"),
    (224, "UNSUPPORTED_EXEC_AFFINITY"),
    (225, "UNSUPPORTED_DEVSIDE_SYNC"),
    (226, "CONTAINED"),
    (300, "INVALID_SOURCE"),
    (301, "FILE_NOT_FOUND"),
    (302, "SHARED_OBJECT_SYMBOL_NOT_FOUND"),
    (303, "SHARED_OBJECT_INIT_FAILED"),
    (304, "OPERATING_SYSTEM"),
    (400, "INVALID_HANDLE"),
    (401, "ILLEGAL_STATE"),
    (402, "LOSSY_QUERY"),
    (500, "NOT_FOUND"),
    (600, "NOT_READY"),
    (700, "ILLEGAL_ADDRESS"),
    (701, "LAUNCH_OUT_OF_RESOURCES"),
    (702, "LAUNCH_TIMEOUT"),
    (703, "LAUNCH_INCOMPATIBLE_TEXTURING"),
    (704, "PEER_ACCESS_ALREADY_ENABLED"),
    (705, "PEER_ACCESS_NOT_ENABLED"),
    (708, "PRIMARY_CONTEXT_ACTIVE"),
    (709, "CONTEXT_IS_DESTROYED"),
    (710, "ASSERT"),
    (711, "TOO_MANY_PEERS"),
    (712, "HOST_MEMORY_ALREADY_REGISTERED"),
    (713, "HOST_MEMORY_NOT_REGISTERED"),
    (714, "HARDWARE_STACK_ERROR"),
    (715, "ILLEGAL_INSTRUCTION"),
    (716, "MISALIGNED_ADDRESS"),
    (717, "INVALID_ADDRESS_SPACE"),
    (718, "INVALID_PC"),
    (719, "LAUNCH_FAILED"),
    (720, "COOPERATIVE_LAUNCH_TOO_LARGE"),
    (800, "NOT_PERMITTED"),
    (801, "NOT_SUPPORTED"),
    (802, "SYSTEM_NOT_READY"),
    (803, "SYSTEM_DRIVER_MISMATCH"),
    (804, "COMPAT_NOT_SUPPORTED_ON_DEVICE"),
    (805, "MPS_CONNECTION_FAILED"),
    (806, "MPS_RPC_FAILURE"),
    (807, "MPS_SERVER_NOT_READY"),
    (808, "MPS_MAX_CLIENTS_REACHED"),
    (809, "MPS_MAX_CONNECTIONS_REACHED"),
    (810, "MPS_CLIENT_TERMINATED"),
    (900, "STREAM_CAPTURE_UNSUPPORTED"),
    (901, "STREAM_CAPTURE_INVALIDATED"),
    (902, "STREAM_CAPTURE_MERGE"),
    (903, "STREAM_CAPTURE_UNMATCHED"),
    (904, "STREAM_CAPTURE_UNJOINED"),
    (905, "STREAM_CAPTURE_ISOLATION"),
    (906, "STREAM_CAPTURE_IMPLICIT"),
    (907, "CAPTURED_EVENT"),
    (908, "STREAM_CAPTURE_WRONG_THREAD"),
    (909, "TIMEOUT"),
    (910, "GRAPH_EXEC_UPDATE_FAILURE"),
    (911, "EXTERNAL_DEVICE"),
    (999, "UNKNOWN"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: i32) -> CudaError {
        CudaError::Failed { call: "cuMemCreate", code }
    }

    #[test]
    fn errors_print_without_a_driver() {
        assert_eq!(failed(2).to_string(), "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2)");
        // Of a driver that is newer than the table.
        assert_eq!(failed(4321).to_string(), "cuMemCreate: error 4321");
        for code in (-5..2000).chain([i32::MIN, i32::MAX]) {
            let text = format!("{} {:?}", failed(code), failed(code));
            assert!(text.contains(&code.to_string()), "{text}");
        }
        let why = CudaError::NoLibrary { why: "libcuda.so.1 can't be opened" };
        assert_eq!(why.to_string(), "no CUDA driver: libcuda.so.1 can't be opened");
        assert_eq!(
            CudaError::OutOfBounds { offset: 8, len: 4, bytes: 10 }.to_string(),
            "4 bytes from 8 leave memory of 10 bytes"
        );
    }

    #[test]
    fn names_are_found_and_are_cudarcs() {
        use cudarc::driver::sys::cudaError_enum as Code;
        assert!(NAMES.is_sorted_by(|one, other| one.0 < other.0));
        for code in [
            Code::CUDA_ERROR_INVALID_VALUE,
            Code::CUDA_ERROR_NO_DEVICE,
            Code::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            Code::CUDA_ERROR_OPERATING_SYSTEM,
            Code::CUDA_ERROR_NOT_FOUND,
            Code::CUDA_ERROR_ILLEGAL_ADDRESS,
            Code::CUDA_ERROR_LAUNCH_FAILED,
            Code::CUDA_ERROR_MPS_CLIENT_TERMINATED,
            Code::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
            Code::CUDA_ERROR_EXTERNAL_DEVICE,
        ] {
            let (name, code) = (format!("{code:?}"), code as i32);
            assert_eq!(super::Code(code).to_string(), format!("{name} ({code})"));
        }
    }

    #[test]
    fn what_ends_a_context_is_told_from_what_fails_once() {
        for code in [214, 220, 700, 702, 715, 716, 719] {
            assert!(failed(code).is_sticky(), "{code}");
        }
        for code in [1, 2, 101, 217, 400, 600, 701, 801, 900, 999] {
            assert!(!failed(code).is_sticky(), "{code}");
        }
        assert!(!CudaError::NoDevice.is_sticky());
        assert!(failed(2).is_out_of_memory() && !failed(1).is_out_of_memory());
    }

    #[test]
    fn users_read_what_to_do() {
        let of = |error: CudaError| kvxfer_core::Error::from(error);
        let error = of(CudaError::NoLibrary { why: "libcuda.so.1 can't be opened" });
        assert_eq!(error.kind(), ErrorKind::Device);
        assert_eq!(
            error.to_string(),
            "no CUDA driver: libcuda.so.1 can't be opened (install the NVIDIA driver, or in a container \
             start it with --gpus)"
        );
        assert!(of(failed(2)).to_string().contains("buffer_size"));
        assert!(of(CudaError::NoDevice).to_string().contains("CUDA_VISIBLE_DEVICES"));
        assert!(
            of(CudaError::MissingSymbol { symbol: "cuMemMap" }).to_string().contains("cuMemMap")
        );
        assert_eq!(of(failed(719)).to_string(), "cuMemCreate: CUDA_ERROR_LAUNCH_FAILED (719)");
        let range = of(CudaError::OutOfBounds { offset: 8, len: 4, bytes: 10 });
        assert_eq!(range.kind(), ErrorKind::OutOfBounds);
    }
}
