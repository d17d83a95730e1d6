//! Options from a TOML file (`--config`): each key is the long name of an option of the same subcommand.
//!
//! The file is turned into the arguments that it stands for, and those are put before what the command line says. So one parser
//! reads both, an option is known here as soon as the command line knows it, and there is no second list of them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command};
use command_line::End;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::exit::ExitCode;
use crate::key_value::escaped;

/// The longest file, bytes.
const MAX_FILE: u64 = 64 << 10;

/// How a machine is described, and whether it is to be made.
#[derive(Debug, Args)]
pub(super) struct DescriptionArguments {
    /// Read options from this TOML file. A key is an option's long name, such as `memory = "1GiB"`; what the command line says wins
    /// over it, and options that may be there several times add to those of the file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check all that can be checked before anything is made, print the options as they would be, in the form that `--config`
    /// reads, and end.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// With `--dry-run`: print one JSON object.
    #[arg(long, requires = "dry_run")]
    pub(super) json: bool,
}

/// What is said of the call, and not of the machine: these stand in no file.
pub(super) fn is_of_call(option: &Arg) -> bool {
    ["config", "dry_run", "json"].contains(&option.get_id().as_str())
}

/// Why a file gives no options.
#[derive(Debug, thiserror::Error)]
enum ConfigFileError {
    /// It cannot be read.
    #[error("--config {path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// It is too long to be one.
    #[error("--config {path}: this is no configuration file: it has more than {MAX_FILE} bytes", path = .0.display())]
    TooLarge(PathBuf),
    /// Something in it cannot be.
    #[error("{path}:{line}: {why}", path = path.display())]
    At {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What cannot be.
        why: Wrong,
    },
}

/// What is wrong with one line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Wrong {
    /// It is not TOML.
    #[error("this is not TOML: {0}")]
    Toml(String),
    /// There is no such option, but one like it.
    #[error("there is no option '{key}'; is it '{nearest}'?")]
    Nearest {
        /// What was written.
        key: String,
        /// What may be meant.
        nearest: String,
    },
    /// There is no such option.
    #[error("there is no option '{key}'; there are {known}")]
    Unknown {
        /// What was written.
        key: String,
        /// What there is.
        known: String,
    },
    /// It says nothing about the machine.
    #[error("'{0}' stands on the command line, not in a file")]
    OfCall(String),
    /// A value that no option has.
    #[error("'{key}' cannot be {kind}; {instead}")]
    Kind {
        /// The option.
        key: String,
        /// What was given.
        kind: &'static str,
        /// What to write.
        instead: &'static str,
    },
    /// A key inside a value that would read as something else.
    #[error("'{0}' is no key of an option's value")]
    InnerKey(String),
    /// The command line's parser says so.
    #[error("{0}")]
    Option(String),
}

/// The arguments with those of the file before them that `--config` names, if one is named.
///
/// # Errors
/// When the file cannot be read, or has something in it that is no option.
pub(super) fn expand(program: &Command, mut arguments: Vec<OsString>) -> Result<Vec<OsString>, End> {
    let Some((name, given)) = given(program, &arguments) else { return Ok(arguments) };
    let (Some(path), Some(command)) = (config_path(&given), program.find_subcommand(&name)) else {
        return Ok(arguments);
    };
    let of_file =
        read(path).and_then(|text| options(command, &given, path, &text)).map_err(|e| End::new(ExitCode::Usage, e))?;
    let after_name =
        arguments.iter().position(|argument| *argument == *name).map_or(arguments.len(), |place| place + 1);
    arguments.splice(after_name..after_name, of_file);
    Ok(arguments)
}

/// What the command line alone says, as far as it can be understood: what it needs may be in the file, and its faults are told later.
fn given(program: &Command, arguments: &[OsString]) -> Option<(String, ArgMatches)> {
    program.clone().ignore_errors(true).try_get_matches_from(arguments).ok()?.remove_subcommand()
}

fn config_path(given: &ArgMatches) -> Option<&Path> {
    given.try_get_one::<PathBuf>("config").ok().flatten().map(PathBuf::as_path)
}

fn read(path: &Path) -> Result<String, ConfigFileError> {
    let failed = |cause| ConfigFileError::Read { path: path.into(), cause };
    let mut text = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_FILE + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(ConfigFileError::TooLarge(path.into()));
    }
    String::from_utf8(text).map_err(|e| failed(io::Error::new(io::ErrorKind::InvalidData, e)))
}

/// The arguments that `text` stands for, without those that the command line gives itself.
fn options(command: &Command, given: &ArgMatches, path: &Path, text: &str) -> Result<Vec<OsString>, ConfigFileError> {
    let at = |offset: usize, why| {
        let line = 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
        ConfigFileError::At { path: path.into(), line, why }
    };
    let table = DeTable::parse(text)
        .map_err(|e| at(e.span().map_or(0, |span| span.start), Wrong::Toml(e.message().trim().replace('\n', ", "))))?;
    let mut arguments = Vec::new();
    for (key, value) in in_order(table.get_ref()) {
        let (option, these) =
            arguments_of(command, key.get_ref(), value.get_ref()).map_err(|why| at(key.span().start, why))?;
        if adds(option) || given.value_source(option.get_id().as_str()) != Some(ValueSource::CommandLine) {
            arguments.extend(these.into_iter().map(OsString::from));
        }
    }
    Ok(arguments)
}

/// As they stand in the file, whatever the map's order.
fn in_order<'t, 'i>(table: &'t DeTable<'i>) -> Vec<(&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// Whether an option may be there several times.
pub(super) fn adds(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Append)
}

/// The option of this name, and the arguments that set it to `value`.
fn arguments_of<'c>(command: &'c Command, key: &str, value: &DeValue<'_>) -> Result<(&'c Arg, Vec<String>), Wrong> {
    let option =
        command.get_arguments().find(|option| option.get_long() == Some(key)).ok_or_else(|| unknown(command, key))?;
    if is_of_call(option) {
        return Err(Wrong::OfCall(key.into()));
    }
    let arguments = match value {
        DeValue::Array(values) => {
            values.iter().filter_map(|value| argument(option, key, value.get_ref()).transpose()).collect()
        }
        value => argument(option, key, value).map(|argument| argument.into_iter().collect()),
    };
    let arguments: Vec<String> = arguments?;
    check(command, &arguments)?;
    Ok((option, arguments))
}

/// One argument, if it takes one to say this.
fn argument(option: &Arg, key: &str, value: &DeValue<'_>) -> Result<Option<String>, Wrong> {
    Ok(match value {
        DeValue::Boolean(on) if !option.get_action().takes_values() => on.then(|| format!("--{key}")),
        DeValue::Table(table) => Some(format!("--{key}={}", list(table)?)),
        value => Some(format!("--{key}={}", scalar(key, value)?)),
    })
}

/// A table as the list that options take: `path=a.img,readonly`.
fn list(table: &DeTable<'_>) -> Result<String, Wrong> {
    let part = |key: &str, value: &DeValue<'_>| match value {
        _ if key.is_empty() || key.contains(['=', ',']) => Err(Wrong::InnerKey(key.into())),
        DeValue::Boolean(true) => Ok(key.to_owned()),
        DeValue::Boolean(false) => Ok(format!("{key}=off")),
        value => Ok(format!("{key}={}", escaped(&scalar(key, value)?))),
    };
    let parts = in_order(table).into_iter().map(|(key, value)| part(key.get_ref(), value.get_ref()));
    Ok(parts.collect::<Result<Vec<_>, _>>()?.join(","))
}

fn scalar(key: &str, value: &DeValue<'_>) -> Result<String, Wrong> {
    let wrong = |kind, instead| Err(Wrong::Kind { key: key.into(), kind, instead });
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map(|number| number.to_string())
            .or_else(|_| wrong("a number this large", "write at most 9223372036854775807")),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        DeValue::Boolean(on) => Ok(on.to_string()),
        DeValue::Datetime(_) => wrong("a date", "write it in quotes if it is a text"),
        DeValue::Array(_) => wrong("an array inside of something else", "write texts, numbers or tables of them"),
        DeValue::Table(_) => wrong("a table inside of a table", "write texts, numbers, true or false"),
    }
}

/// Lets the command line's parser look at one option, so that what it says of it is told with its line.
fn check(command: &Command, arguments: &[String]) -> Result<(), Wrong> {
    match parse(command, arguments) {
        // What else is needed may come from elsewhere.
        Err(e) if e.kind() != ErrorKind::MissingRequiredArgument => Err(Wrong::Option(sentence(&e))),
        _ => Ok(()),
    }
}

fn parse(command: &Command, arguments: &[String]) -> Result<ArgMatches, clap::Error> {
    let name = command.get_name().to_owned();
    command.clone().try_get_matches_from(std::iter::once(&name).chain(arguments))
}

fn unknown(command: &Command, key: &str) -> Wrong {
    let nearest = parse(command, &[format!("--{key}")]).err().and_then(|e| match e.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(nearest)) => nearest.strip_prefix("--").map(str::to_owned),
        _ => None,
    });
    let known =
        || command.get_arguments().filter(|option| !is_of_call(option)).filter_map(Arg::get_long).collect::<Vec<_>>();
    match nearest.filter(|nearest| known().contains(&nearest.as_str())) {
        Some(nearest) => Wrong::Nearest { key: key.into(), nearest },
        None => Wrong::Unknown { key: key.into(), known: known().join(", ") },
    }
}

/// The parser's first sentence, without its advice on the usage of the command line.
fn sentence(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    first.trim_start_matches("error: ").lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn program() -> Command {
        let value = |name: &'static str| Arg::new(name).long(name).action(ArgAction::Set);
        let run = Command::new("run")
            .arg(value("memory").value_parser(clap::value_parser!(memory_agent::ByteSize)))
            .arg(value("cpus").value_parser(clap::value_parser!(u8)))
            .arg(value("kernel").required(true))
            .arg(Arg::new("disk").long("disk").action(ArgAction::Append))
            .arg(Arg::new("no_reboot").long("no-reboot").action(ArgAction::SetTrue));
        Command::new("program").subcommand(DescriptionArguments::augment_args(run))
    }

    /// What comes of `text` in a file and `more` on the command line.
    fn expanded(text: &str, more: &[&str]) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let path = file.path().to_str().unwrap();
        let arguments = ["program", "run", "--config", path].iter().chain(more).map(OsString::from).collect();
        let arguments = expand(&program(), arguments).map_err(|e| e.to_string().replace(path, "FILE"))?;
        let arguments: Vec<String> = arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect();
        let of_file = arguments.iter().skip(2).take_while(|argument| *argument != "--config");
        Ok(of_file.cloned().collect())
    }

    #[test]
    fn keys_become_options() {
        let text = "memory = \"1GiB\"\ncpus = 2\nno-reboot = true\nkernel = 'vm=linuz'\n\
                    disk = [{ path = \"a,b.img\", readonly = true, direct = false, queues = 0x4 }, \"path=b.img\"]\n";
        let disks = ["--disk=path=a,,b.img,readonly,direct=off,queues=4", "--disk=path=b.img"];
        let others = ["--memory=1GiB", "--cpus=2", "--no-reboot", "--kernel=vm=linuz"];
        assert_eq!(expanded(text, &[]).unwrap(), [&others[..], &disks].concat());
        assert_eq!(
            expanded("[[disk]]\npath = \"a\"\n[[disk]]\npath = \"b\"\n", &[]).unwrap(),
            ["--disk=path=a", "--disk=path=b"]
        );
        assert_eq!(expanded("no-reboot = false", &[]).unwrap(), [""; 0]);
    }

    #[test]
    fn the_command_line_wins_and_adds() {
        let text = "memory = \"1GiB\"\ncpus = 2\ndisk = \"path=a\"\n";
        assert_eq!(expanded(text, &["--memory=2G", "--disk", "path=b"]).unwrap(), ["--cpus=2", "--disk=path=a"]);
    }

    #[test]
    fn what_cannot_be_is_told_with_its_line() {
        let says = |text: &str, words: &str| {
            let why = expanded(text, &[]).unwrap_err();
            assert!(why.contains(words) && !why.contains('\n'), "{text:?}: {why}");
        };
        says("cpus = 2\n\nmemroy = 5\n", "FILE:3: there is no option 'memroy'; is it 'memory'?");
        says("colour = 5\n", "FILE:1: there is no option 'colour'; there are memory, cpus, kernel, disk, no-reboot");
        says("\"dry-run\" = true\n", "FILE:1: 'dry-run' stands on the command line");
        says("help = true\n", "FILE:1: there is no option 'help'");
        says(
            "# size\nmemory = \"much\"\n",
            "FILE:2: invalid value 'much' for '--memory <memory>': 'much' is not a size",
        );
        says("cpus = 2000\n", "FILE:1: invalid value '2000'");
        says("memory = [\"1G\", \"2G\"]\n", "FILE:1: the argument '--memory <memory>' cannot be used multiple times");
        says("no-reboot = \"yes\"\n", "FILE:1: unexpected value 'yes' for '--no-reboot'");
        says("cpus = 2\ncpus = 3\n", "FILE:2: this is not TOML");
        says("cpus = \n", "FILE:1: this is not TOML");
        says("disk = [[\"a\"]]\n", "FILE:1: 'disk' cannot be an array inside");
        says("disk = { path = { path = 1 } }\n", "FILE:1: 'path' cannot be a table inside");
        says("disk = { \"path=x,readonly\" = 1 }\n", "is no key of an option's value");
        says("kernel = 2026-01-01\n", "FILE:1: 'kernel' cannot be a date");
        says("cpus = 0xffffffffffffffffffffff\n", "FILE:1: ");
    }

    #[test]
    fn what_is_no_such_file_is_refused_and_bounded() {
        let says = |path: &str, words: &str| {
            let arguments = ["program", "run", "--config", path].map(OsString::from).into();
            let why = expand(&program(), arguments).unwrap_err();
            assert!(why.to_string().contains(words) && why.code() == 2, "{path}: {why}");
        };
        says("/no/such/file.toml", "--config /no/such/file.toml: No such file");
        says("/", "--config /: Is a directory");
        says("/dev/zero", "more than 65536 bytes");
        assert!(expanded(&"[".repeat(60_000), &[]).unwrap_err().contains("FILE:1: this is not TOML"));
        assert!(
            expanded(&format!("disk = {}", "{a=".repeat(20_000)), &[])
                .unwrap_err()
                .contains("FILE:1: this is not TOML")
        );
        assert!(expanded(&format!("{} = 1", vec!["a"; 30_000].join(".")), &[]).is_err());
    }

    #[test]
    fn without_a_file_nothing_changes() {
        let arguments: Vec<OsString> = ["program", "run", "--memory", "1G"].map(OsString::from).into();
        assert_eq!(expand(&program(), arguments.clone()).unwrap(), arguments);
        let unreadable: Vec<OsString> = ["program", "walk", "--config"].map(OsString::from).into();
        assert_eq!(expand(&program(), unreadable.clone()).unwrap(), unreadable);
    }

    proptest! {
        #[test]
        fn no_file_is_a_panic(text in "[a-z={}\\[\\]\"', .\n0-9-]{0,80}") {
            let _ = expanded(&text, &[]);
        }

        #[test]
        fn every_text_arrives_whole(text in "[^\u{0}]{0,20}") {
            let written = toml::Value::String(text.clone());
            prop_assert_eq!(expanded(&format!("kernel = {written}"), &[]).unwrap(), [format!("--kernel={text}")]);
            let list = expanded(&format!("disk = {{ path = {written} }}"), &[]).unwrap();
            let read = crate::key_value::KeyValues::parse(list[0].strip_prefix("--disk=").unwrap(), &["path"]).unwrap();
            prop_assert_eq!(read.text("path").ok().flatten().unwrap_or_default(), text);
        }
    }
}
