//! The `memory-agent` binary.

mod cli;
mod idle;

fn main() -> std::process::ExitCode {
    cli::main()
}
