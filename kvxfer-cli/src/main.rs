//! The program; the library has it all.

fn main() {
    std::process::exit(kvxfer_cli::run(std::env::args_os().skip(1)));
}
