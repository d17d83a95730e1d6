//! What is made of a program's description of its command line: completions for shells, and manual pages.

use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use crate::end::End;
use crate::output::print;

/// Options of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArguments {
    /// For which shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl CompletionsArguments {
    /// Prints the completions of `program`.
    ///
    /// # Errors
    /// When they cannot be printed.
    pub fn print(&self, program: &mut Command) -> Result<(), End> {
        let mut script = Vec::new();
        let name = program.get_name().to_owned();
        clap_complete::generate(self.shell, program, name, &mut script);
        Ok(print(&String::from_utf8_lossy(&script))?)
    }
}

/// Options of `man-pages`.
#[derive(Debug, Args)]
pub struct ManPagesArguments {
    /// The folder to write them to, one for the program and one for each subcommand. It is made when it is not there.
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
}

impl ManPagesArguments {
    /// Writes the pages of `program`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, program: Command) -> Result<(), End> {
        write_pages(program, &self.to).map_err(|e| {
            anyhow::Error::new(e).context(format!("cannot write manual pages to {}", self.to.display())).into()
        })
    }
}

fn write_pages(program: Command, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    clap_mangen::generate_to(program, to)
}

/// The options and subcommands of `program` that say nothing about themselves, each by its whole name.
pub fn without_help(program: &Command) -> Vec<String> {
    let mut found = Vec::new();
    collect_without_help(program, "", &mut found);
    found
}

fn collect_without_help(command: &Command, before: &str, found: &mut Vec<String>) {
    let name = format!("{before}{}", command.get_name());
    if command.get_about().is_none() {
        found.push(name.clone());
    }
    let silent = command.get_arguments().filter(|option| option.get_help().is_none());
    found.extend(silent.map(|option| format!("{name} {}", option.get_id())));
    for subcommand in command.get_subcommands() {
        collect_without_help(subcommand, &format!("{name} "), found);
    }
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn program() -> Command {
        let go = Command::new("go").about("Go.").arg(Arg::new("far").long("far").help("How far."));
        Command::new("program").about("A program.").subcommand(go.arg(Arg::new("fast").long("fast")))
    }

    #[test]
    fn options_without_help_are_found() {
        assert_eq!(without_help(&program()), ["program go fast"]);
    }

    #[test]
    fn each_command_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        ManPagesArguments { to: folder.path().join("man") }.write(program()).unwrap();
        assert!(std::fs::read_to_string(folder.path().join("man/program-go.1")).unwrap().contains("How far."));
        assert!(folder.path().join("man/program.1").exists());
        let nowhere = ManPagesArguments { to: "/proc/no/folder".into() }.write(program()).unwrap_err();
        assert!(nowhere.to_string().contains("cannot write manual pages to /proc/no/folder: "), "{nowhere}");
    }
}
