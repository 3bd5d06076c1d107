//! What crosses the boundary: result codes, pointers of the caller, and the frame around each entry
//! point.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{exec, faults};

/// What an entry point answers when it does not answer 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) c_int);

/// What the inside of an entry point answers.
pub(crate) type Result<T = ()> = std::result::Result<T, Code>;

impl Code {
    pub(crate) const INVALID_VALUE: Self = Self(1);
    pub(crate) const OUT_OF_MEMORY: Self = Self(2);
    pub(crate) const NOT_INITIALIZED: Self = Self(3);
    pub(crate) const NO_DEVICE: Self = Self(100);
    pub(crate) const INVALID_DEVICE: Self = Self(101);
    pub(crate) const INVALID_IMAGE: Self = Self(200);
    pub(crate) const INVALID_CONTEXT: Self = Self(201);
    pub(crate) const MAP_FAILED: Self = Self(205);
    pub(crate) const PEER_ACCESS_UNSUPPORTED: Self = Self(217);
    pub(crate) const INVALID_PTX: Self = Self(218);
    pub(crate) const UNSUPPORTED_PTX_VERSION: Self = Self(222);
    pub(crate) const INVALID_HANDLE: Self = Self(400);
    pub(crate) const ILLEGAL_STATE: Self = Self(401);
    pub(crate) const NOT_FOUND: Self = Self(500);
    pub(crate) const NOT_READY: Self = Self(600);
    pub(crate) const ILLEGAL_ADDRESS: Self = Self(700);
    pub(crate) const LAUNCH_OUT_OF_RESOURCES: Self = Self(701);
    pub(crate) const LAUNCH_TIMEOUT: Self = Self(702);
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Self = Self(704);
    pub(crate) const PEER_ACCESS_NOT_ENABLED: Self = Self(705);
    pub(crate) const CONTEXT_IS_DESTROYED: Self = Self(709);
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Self = Self(712);
    pub(crate) const HOST_MEMORY_NOT_REGISTERED: Self = Self(713);
    pub(crate) const NOT_PERMITTED: Self = Self(800);
    pub(crate) const NOT_SUPPORTED: Self = Self(801);
    pub(crate) const STREAM_CAPTURE_UNSUPPORTED: Self = Self(900);
    pub(crate) const STREAM_CAPTURE_INVALIDATED: Self = Self(901);
    pub(crate) const STREAM_CAPTURE_MERGE: Self = Self(902);
    pub(crate) const STREAM_CAPTURE_UNMATCHED: Self = Self(903);
    pub(crate) const STREAM_CAPTURE_UNJOINED: Self = Self(904);
    pub(crate) const STREAM_CAPTURE_ISOLATION: Self = Self(905);
    pub(crate) const STREAM_CAPTURE_IMPLICIT: Self = Self(906);
    pub(crate) const CAPTURED_EVENT: Self = Self(907);
    pub(crate) const STREAM_CAPTURE_WRONG_THREAD: Self = Self(908);
    pub(crate) const UNKNOWN: Self = Self(999);
}

/// A pointer to write one value to. The caller of the entry point promises that it is null or good for
/// that write until the call returns: only such a caller makes one.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

/// A pointer to `n` values to read, which may be null. The caller promises as for [`Out`].
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

/// A pointer to one value to read and to write. The caller promises as for [`Out`], for both.
#[repr(transparent)]
pub(crate) struct InOut<T>(*mut T);

/// Text that ends with NUL. The caller promises as for [`Out`].
#[repr(transparent)]
pub(crate) struct Text(*const c_char);

impl<T> Out<T> {
    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn put(&self, value: T) -> Result {
        self.put_at(0, value)
    }

    /// Writes the `index`-th of several; the caller's array has to be that long.
    ///
    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn put_at(&self, index: usize, value: T) -> Result {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so good for writing: what the entry point's caller promised.
        unsafe { self.0.add(index).write_unaligned(value) };
        Ok(())
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

impl<T: Copy> In<T> {
    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn get(&self) -> Result<T> {
        self.get_at(0)
    }

    /// Reads the `index`-th of several; the caller's array has to be that long.
    ///
    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn get_at(&self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so good for reading: what the entry point's caller promised.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }

    /// # Errors
    /// `INVALID_VALUE` when it is null and `n` is not 0.
    pub(crate) fn list(&self, n: usize) -> Result<Vec<T>> {
        (0..n).map(|index| self.get_at(index)).collect()
    }
}

impl Out<c_void> {
    /// What it points to when that depends on another argument: the caller promised accordingly.
    pub(crate) fn cast<T>(self) -> Out<T> {
        Out(self.0.cast())
    }
}

impl In<c_void> {
    /// As [`Out::cast`].
    pub(crate) fn cast<T>(self) -> In<T> {
        In(self.0.cast())
    }

    /// The address alone.
    pub(crate) fn addr(self) -> u64 {
        self.0.addr() as u64
    }
}

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T: Copy> InOut<T> {
    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn get(&self) -> Result<T> {
        In(self.0.cast_const()).get()
    }

    /// # Errors
    /// `INVALID_VALUE` when it is null.
    pub(crate) fn put(&self, value: T) -> Result {
        Out(self.0).put(value)
    }
}

impl Text {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// # Errors
    /// `INVALID_VALUE` when it is null or not UTF-8.
    pub(crate) fn get(&self) -> Result<&str> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so it ends with NUL: what the entry point's caller promised.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map_err(|_| Code::INVALID_VALUE)
    }
}

/// The frame around an entry point.
pub(crate) fn enter(name: &'static str, body: impl FnOnce() -> Result) -> c_int {
    let call = AssertUnwindSafe(|| {
        exec::permitted()?;
        faults::before(name)?;
        body()
    });
    match catch_unwind(call) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code.0,
        // The hook has printed why.
        Err(_) => Code::UNKNOWN.0,
    }
}

/// Entry points: functions in C's calling convention under their own names, whose bodies answer a
/// [`Result`]; and `ENTRIES`, their names and addresses.
macro_rules! entries {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            /// As the driver's documentation asks of its caller.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($arg: $type),*) -> std::ffi::c_int {
                crate::abi::enter(stringify!($name), || $body)
            }
        )*

        /// The entry points of this module by name.
        pub(crate) const ENTRIES: &[(&str, crate::abi::Address)] =
            &[$((stringify!($name), crate::abi::Address($name as *const ()))),*];
    };
}

/// The address of an entry point.
#[derive(Clone, Copy)]
pub(crate) struct Address(pub(crate) *const ());

// SAFETY: the address of a function; code does not change.
unsafe impl Sync for Address {}
