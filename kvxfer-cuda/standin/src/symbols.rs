//! Which entry points there are: those of the driver's version, without the ones that the configuration
//! calls missing. `dlsym` finds no others, and neither does `cuGetProcAddress`.

use std::ffi::{c_int, c_ulonglong, c_void};
use std::ptr;
use std::slice;

use rustix::mm::{MprotectFlags, mprotect};

use crate::abi::{Address, Code, Out, Result, Text};
use crate::config::Config;
use crate::faults::base_name;
use crate::{contexts, devices, errors, exec, memory, state};

const ALL: &[&[(&str, Address)]] = &[
    ENTRIES,
    contexts::ENTRIES,
    devices::ENTRIES,
    errors::ENTRIES,
    exec::batch::ENTRIES,
    exec::capture::ENTRIES,
    exec::events::ENTRIES,
    exec::modules::ENTRIES,
    exec::streams::ENTRIES,
    exec::transfers::ENTRIES,
    exec::values::ENTRIES,
    memory::attributes::ENTRIES,
    memory::host::ENTRIES,
    memory::ipc::ENTRIES,
    memory::plain::ENTRIES,
    memory::vmm::ENTRIES,
];

/// Entry points that not every driver has: the first version that has them, and the first that doesn't
/// any more.
const SINCE: &[(&str, i32, i32)] =
    &[("cuMemcpyBatchAsync", 12080, 13000), ("cuMemcpyBatchAsync_v2", 13000, i32::MAX)];

/// Names that this configuration doesn't have.
fn hidden(config: &Config) -> impl Iterator<Item = &str> {
    let missing = config.missing.iter().map(String::as_str);
    let other = SINCE.iter().filter(|(_, from, to)| !(*from..*to).contains(&config.driver));
    missing.chain(other.map(|(name, ..)| *name))
}

entries! {
    fn cuGetProcAddress_v2(
        symbol: Text, address: Out<*const ()>, version: c_int, _flags: c_ulonglong,
        status: Out<c_int>,
    ) {
        let found = find(symbol.get()?, version)?;
        address.put(found.unwrap_or(ptr::null()))?;
        if !status.is_null() {
            // Found, or not found.
            status.put(c_int::from(found.is_none()))?;
        }
        found.map(|_| ()).ok_or(Code::NOT_FOUND)
    }
}

/// The newest entry point of that name for an application of that version.
fn find(symbol: &str, version: c_int) -> Result<Option<*const ()>> {
    let config = state::config()?;
    let is_there = |name: &str| !hidden(config).any(|hidden| hidden == name);
    let is_known =
        |name: &str| SINCE.iter().all(|(newer, from, _)| *newer != name || *from <= version);
    let all = ALL.iter().copied().flatten();
    let named = all.filter(|(name, _)| base_name(name) == symbol);
    let newest =
        named.filter(|(name, _)| is_there(name) && is_known(name)).max_by_key(|(name, _)| *name);
    Ok(newest.map(|(_, address)| address.0))
}

/// One entry of the dynamic section: `Elf64_Dyn`.
#[repr(C)]
struct Dynamic {
    tag: i64,
    value: usize,
}

const DT_NULL: i64 = 0;
const DT_STRTAB: i64 = 5;
const DT_STRSZ: i64 = 10;

unsafe extern "C" {
    /// The dynamic section of this library: the linker makes it.
    static _DYNAMIC: Dynamic;
}

/// Runs when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = hide;

/// Misspells the hidden names in this library's own table, where `dlsym` compares them.
extern "C" fn hide() {
    let Ok(config) = state::config() else { return };
    let Some((table, len)) = names() else { return };
    // Whole pages, the table's own: other things that lie there stay readable and executable.
    let page = table.addr() & !4095;
    let pages = (table.addr() + len).next_multiple_of(4096) - page;
    let start: *mut c_void = ptr::with_exposed_provenance_mut(page);
    let rights = MprotectFlags::READ | MprotectFlags::WRITE | MprotectFlags::EXEC;
    // SAFETY: pages of this library, which stay readable.
    if unsafe { mprotect(start, pages, rights) }.is_err() {
        eprintln!("kvxfer-standin: the table of names can't be written");
        return;
    }
    // SAFETY: just made writable; the loader of this library reads it again only after this.
    let table = unsafe { slice::from_raw_parts_mut(table, len) };
    for name in hidden(config) {
        let text: Vec<u8> = [b"\0", name.as_bytes(), b"\0"].concat();
        if let Some(at) = table.windows(text.len()).position(|window| window == text) {
            table[at + 1] = b'-';
        }
    }
}

/// The table of names and its bytes.
fn names() -> Option<(*mut u8, usize)> {
    let (mut table, mut len) = (None, None);
    let mut entry = &raw const _DYNAMIC;
    loop {
        // SAFETY: the section ends with DT_NULL, where this loop ends too.
        let Dynamic { tag, value } = unsafe { entry.read() };
        match tag {
            DT_NULL => break,
            DT_STRTAB => table = Some(ptr::with_exposed_provenance_mut(value)),
            DT_STRSZ => len = Some(value),
            _ => {}
        }
        // SAFETY: not the last one.
        entry = unsafe { entry.add(1) };
    }
    Some((table?, len?))
}
