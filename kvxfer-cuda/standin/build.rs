//! Builds the kernels for the host, and keeps the library loaded once it is: a thread may run in it.

fn main() {
    let kernels = "../kernels";
    println!("cargo:rerun-if-changed={kernels}");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    cc::Build::new()
        .file(format!("{kernels}/host.c"))
        .flag("-std=gnu11")
        .opt_level(2)
        .warnings(true)
        .compile("kernels");
}
