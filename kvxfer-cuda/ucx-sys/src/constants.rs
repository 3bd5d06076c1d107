//! Constants of `ucp.h` and `ucs/type/status.h`.

use crate::{ucs_memory_type_t, ucs_status_t};

/// Constants, and a list of them for the test that compares them with C.
macro_rules! constants {
    ($($type:ty { $($name:ident = $value:expr,)* })*) => {
        $($(pub const $name: $type = $value;)*)*

        /// Of each constant its name and its value.
        pub const CONSTANTS: &[(&str, i64)] = &[$($((stringify!($name), $name as i64),)*)*];
    };
}

constants! {
    ucs_status_t {
        UCS_OK = 0,
        UCS_INPROGRESS = 1,
        UCS_ERR_NO_RESOURCE = -2,
        UCS_ERR_NO_MEMORY = -4,
        UCS_ERR_INVALID_PARAM = -5,
        UCS_ERR_UNREACHABLE = -6,
        UCS_ERR_NO_DEVICE = -14,
        UCS_ERR_BUSY = -15,
        UCS_ERR_CANCELED = -16,
        UCS_ERR_TIMED_OUT = -20,
        UCS_ERR_UNSUPPORTED = -22,
        UCS_ERR_NOT_CONNECTED = -24,
        UCS_ERR_CONNECTION_RESET = -25,
        UCS_ERR_ENDPOINT_TIMEOUT = -80,
    }
    ucs_memory_type_t {
        UCS_MEMORY_TYPE_HOST = 0,
        UCS_MEMORY_TYPE_CUDA = 1,
    }
    i32 {
        UCS_THREAD_MODE_SINGLE = 0,
        UCS_THREAD_MODE_SERIALIZED = 1,
        UCS_THREAD_MODE_MULTI = 2,
        UCP_ERR_HANDLING_MODE_NONE = 0,
        UCP_ERR_HANDLING_MODE_PEER = 1,
    }
    u64 {
        UCP_PARAM_FIELD_FEATURES = 1 << 0,
        UCP_PARAM_FIELD_REQUEST_SIZE = 1 << 1,
        UCP_PARAM_FIELD_REQUEST_INIT = 1 << 2,
        UCP_PARAM_FIELD_MT_WORKERS_SHARED = 1 << 5,
        UCP_PARAM_FIELD_NAME = 1 << 8,

        UCP_FEATURE_RMA = 1 << 1,
        UCP_FEATURE_WAKEUP = 1 << 4,
        UCP_FEATURE_AM = 1 << 6,

        UCP_ATTR_FIELD_MEMORY_TYPES = 1 << 2,

        UCP_WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0,
        UCP_WORKER_PARAM_FIELD_EVENTS = 1 << 2,
        UCP_WORKER_PARAM_FIELD_FLAGS = 1 << 5,
        UCP_WORKER_PARAM_FIELD_NAME = 1 << 6,
        UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK = 1 << 0,

        UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER = 1 << 3,

        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0,
        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1,
        UCP_EP_PARAM_FIELD_ERR_HANDLER = 1 << 2,
        UCP_EP_PARAM_FIELD_NAME = 1 << 7,

        UCP_EP_ATTR_FIELD_TRANSPORTS = 1 << 3,

        UCP_MEM_MAP_PARAM_FIELD_ADDRESS = 1 << 0,
        UCP_MEM_MAP_PARAM_FIELD_LENGTH = 1 << 1,
        UCP_MEM_MAP_PARAM_FIELD_FLAGS = 1 << 2,
        UCP_MEM_MAP_PARAM_FIELD_PROT = 1 << 3,
        UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE = 1 << 4,

        UCP_MEM_ATTR_FIELD_ADDRESS = 1 << 0,
        UCP_MEM_ATTR_FIELD_LENGTH = 1 << 1,
        UCP_MEM_ATTR_FIELD_MEM_TYPE = 1 << 2,

        UCP_AM_HANDLER_PARAM_FIELD_ID = 1 << 0,
        UCP_AM_HANDLER_PARAM_FIELD_FLAGS = 1 << 1,
        UCP_AM_HANDLER_PARAM_FIELD_CB = 1 << 2,
        UCP_AM_HANDLER_PARAM_FIELD_ARG = 1 << 3,

        UCP_AM_RECV_ATTR_FIELD_REPLY_EP = 1 << 0,
        UCP_AM_RECV_ATTR_FLAG_DATA = 1 << 16,
        UCP_AM_RECV_ATTR_FLAG_RNDV = 1 << 17,
    }
    u32 {
        UCP_WAKEUP_RMA = 1 << 0,
        UCP_WAKEUP_TX = 1 << 10,
        UCP_WAKEUP_RX = 1 << 11,

        UCP_MEM_MAP_PROT_LOCAL_READ = 1 << 0,
        UCP_MEM_MAP_PROT_LOCAL_WRITE = 1 << 1,
        UCP_MEM_MAP_PROT_REMOTE_READ = 1 << 8,
        UCP_MEM_MAP_PROT_REMOTE_WRITE = 1 << 9,

        UCP_EP_CLOSE_FLAG_FORCE = 1 << 0,

        UCP_AM_FLAG_WHOLE_MSG = 1 << 0,
        UCP_AM_SEND_FLAG_REPLY = 1 << 0,
        UCP_AM_SEND_FLAG_EAGER = 1 << 1,
        // The header may be reused once the call returned. 1.14 and newer.
        UCP_AM_SEND_FLAG_COPY_HEADER = 1 << 3,

        UCP_OP_ATTR_FIELD_CALLBACK = 1 << 1,
        UCP_OP_ATTR_FIELD_USER_DATA = 1 << 2,
        UCP_OP_ATTR_FIELD_FLAGS = 1 << 4,
        UCP_OP_ATTR_FIELD_MEMORY_TYPE = 1 << 6,
        UCP_OP_ATTR_FIELD_MEMH = 1 << 8,
        UCP_OP_ATTR_FLAG_NO_IMM_CMPL = 1 << 16,
        UCP_OP_ATTR_FLAG_MULTI_SEND = 1 << 19,
    }
}
