//! The `thermocline` binary.

fn main() -> std::process::ExitCode {
    thermocline::cli::main()
}
