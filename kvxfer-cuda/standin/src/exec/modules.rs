//! Entry points for modules and kernels.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::LazyLock;

use parking_lot::Mutex;

use super::launch::{self, Launch, PARAMETERS};
use super::race::Touched;
use super::run::with;
use super::streams::enqueue;
use super::work::Work;
use crate::abi::{Code, In, Out, Result, Text};
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

struct Module {
    gpu: Gpu,
    kernels: Vec<Kernel>,
    _counted: Counted,
}

#[derive(Clone)]
struct Kernel {
    name: String,
    /// Parameters, all of 8 bytes.
    parameters: usize,
    /// Threads of a block, at most.
    threads: u32,
}

struct Function {
    gpu: Gpu,
    module: u64,
    kernel: Kernel,
}

#[derive(Default)]
struct Modules {
    modules: BTreeMap<u64, Module>,
    functions: BTreeMap<u64, Function>,
}

static MODULES: LazyLock<Mutex<Modules>> = LazyLock::new(Mutex::default);

/// Threads of a block that a GPU takes.
const THREADS: u32 = 1024;

/// The kernels of a PTX text.
///
/// # Errors
/// `INVALID_IMAGE` for what is not text, `INVALID_PTX` for what doesn't look like PTX or has parameters
/// that aren't of 8 bytes, `UNSUPPORTED_PTX_VERSION` when the driver is older than it.
fn parse(text: &str, driver: i32) -> Result<Vec<Kernel>> {
    let lines = || text.lines().map(|line| line.split("//").next().unwrap_or("").trim());
    let directive = |name: &str| lines().find_map(|line| line.strip_prefix(name));
    let version = directive(".version").ok_or(Code::INVALID_PTX)?;
    let (major, minor) = version.trim().split_once('.').ok_or(Code::INVALID_PTX)?;
    let number = |text: &str| text.parse::<i32>().map_err(|_| Code::INVALID_PTX);
    // PTX 8.n came with CUDA 12.n, as 9.n with 13.n.
    if (number(major)? + 4) * 1000 + number(minor)? * 10 > driver {
        return Err(Code::UNSUPPORTED_PTX_VERSION);
    }
    directive(".target").ok_or(Code::INVALID_PTX)?;
    let kernels = text.split(".entry").skip(1).map(kernel);
    let kernels = kernels.collect::<Option<Vec<_>>>().ok_or(Code::INVALID_PTX)?;
    if kernels.is_empty() { Err(Code::INVALID_PTX) } else { Ok(kernels) }
}

/// What follows `.entry`: a name, parameters in brackets, limits, a body in braces.
fn kernel(text: &str) -> Option<Kernel> {
    let (name, rest) = text.split_once('(')?;
    let (parameters, rest) = rest.split_once(')')?;
    let (limits, _) = rest.split_once('{')?;
    let wide = parameters.matches(".param .u64").count();
    let threads = match limits.split_once(".maxntid") {
        Some((_, limit)) => limit.split([',', '\n']).next()?.trim().parse().ok()?,
        None => THREADS,
    };
    let all_wide = wide == parameters.matches(".param").count() && wide <= PARAMETERS;
    all_wide.then(|| Kernel { name: name.trim().to_owned(), parameters: wide, threads })
}

fn load(out: &Out<u64>, image: &Text) -> Result {
    let gpu = state::current()?;
    super::may_wait()?;
    if out.is_null() || image.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let text = image.get().map_err(|_| Code::INVALID_IMAGE)?;
    let kernels = parse(text, state::config()?.driver)?;
    let handle = with(|queues| queues.handle());
    let module = Module { gpu, kernels, _counted: Counted::new(Live::Modules) };
    MODULES.lock().modules.insert(handle, module);
    out.put(handle)
}

/// The sizes of a grid or a block.
type Dim3 = [u32; 3];

fn launch(
    function: u64,
    grid: Dim3,
    block: Dim3,
    shared: u32,
    stream: u64,
    params: &In<*const u64>,
) -> Result {
    let gpu = state::current()?;
    let kernel = {
        let modules = MODULES.lock();
        let function = modules.functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
        if function.gpu != gpu {
            return Err(Code::INVALID_HANDLE);
        }
        function.kernel.clone()
    };
    // What our kernels never use is not there.
    let plain = [grid[1], grid[2], block[1], block[2]] == [1; 4] && shared == 0;
    if !plain || grid[0] == 0 || block[0] == 0 || block[0] > THREADS {
        return Err(Code::INVALID_VALUE);
    }
    if block[0] > kernel.threads {
        return Err(Code::LAUNCH_OUT_OF_RESOURCES);
    }
    let mut args = [0; PARAMETERS];
    for (index, arg) in args.iter_mut().enumerate().take(kernel.parameters) {
        let at = params.get_at(index)?;
        if at.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller promises as many pointers as the kernel has parameters, to values of their size.
        *arg = unsafe { at.read_unaligned() };
    }
    let name = CString::new(kernel.name).map_err(|_| Code::UNKNOWN)?;
    let launch =
        Launch { kernel: name, grid: grid[0], block: block[0], args, seen: Touched::default() };
    enqueue(gpu, stream, Work::Launch(launch)).map(|_| ())
}

/// Forgets the modules of a device whose context is gone.
pub(super) fn forget(gpu: Gpu) {
    let mut modules = MODULES.lock();
    modules.modules.retain(|_, module| module.gpu != gpu);
    modules.functions.retain(|_, function| function.gpu != gpu);
}

entries! {
    fn cuModuleLoadData(out: Out<u64>, image: Text) {
        load(&out, &image)
    }

    /// Options are not looked at.
    fn cuModuleLoadDataEx(out: Out<u64>, image: Text, n: u32, options: *mut c_void, values: *mut c_void) {
        let _ = (n, options, values);
        load(&out, &image)
    }

    fn cuModuleUnload(module: u64) {
        state::current()?;
        let mut modules = MODULES.lock();
        modules.functions.retain(|_, function| function.module != module);
        modules.modules.remove(&module).map(|_| ()).ok_or(Code::INVALID_HANDLE)
    }

    fn cuModuleGetFunction(out: Out<u64>, module: u64, name: Text) {
        state::current()?;
        let name = name.get()?;
        let handle = with(|queues| queues.handle());
        let mut modules = MODULES.lock();
        let own = modules.modules.get(&module).ok_or(Code::INVALID_HANDLE)?;
        let kernel = own.kernels.iter().find(|kernel| kernel.name == name).ok_or(Code::NOT_FOUND)?;
        let host_name = CString::new(name).map_err(|_| Code::NOT_FOUND)?;
        if !launch::exists(&host_name) {
            eprintln!("stand-in: there is no host code for the kernel {name}");
            return Err(Code::NOT_FOUND);
        }
        let function = Function { gpu: own.gpu, module, kernel: kernel.clone() };
        modules.functions.insert(handle, function);
        out.put(handle)
    }

    fn cuLaunchKernel(
        function: u64,
        grid_x: u32, grid_y: u32, grid_z: u32,
        block_x: u32, block_y: u32, block_z: u32,
        shared: u32, stream: u64, params: In<*const u64>, extra: *mut c_void,
    ) {
        if !extra.is_null() {
            return Err(Code::NOT_SUPPORTED);
        }
        launch(function, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], shared, stream, &params)
    }
}
