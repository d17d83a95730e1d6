//! The options as they are in force, from the command line, a file and their defaults: what `--dry-run` prints.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;

use clap::{Arg, ArgAction, ArgMatches, Command};
use command_line::End;
use toml::Value;

use super::config_file::{adds, is_of_call};
use crate::exit::ExitCode;

/// Each option that has a value, by its long name.
#[derive(Debug, Default)]
pub(super) struct EffectiveOptions(Vec<(String, Value)>);

impl EffectiveOptions {
    /// Those of `command`.
    ///
    /// # Errors
    /// When one is no text, as paths may be.
    pub(super) fn of(command: &Command, matches: &ArgMatches) -> Result<Self, End> {
        let mut options = Vec::new();
        for option in command.get_arguments().filter(|option| !is_of_call(option)) {
            if let (Some(name), Some(value)) = (option.get_long(), value(option, matches)?) {
                options.push((name.to_owned(), value));
            }
        }
        Ok(Self(options))
    }

    /// Prints them, as TOML that `--config` reads, or as one JSON object with the same names.
    pub(super) fn print(&self, json: bool) -> Result<(), End> {
        if json {
            let object: BTreeMap<&str, &Value> = self.0.iter().map(|(name, value)| (name.as_str(), value)).collect();
            return Ok(command_line::print_json(&object)?);
        }
        Ok(command_line::print(&self.to_toml())?)
    }

    fn to_toml(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, (name, value)| {
            // Writing to a text does not fail.
            let _ = writeln!(text, "{name} = {value}");
            text
        })
    }
}

fn value(option: &Arg, matches: &ArgMatches) -> Result<Option<Value>, End> {
    let id = option.get_id().as_str();
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return Ok(matches.get_flag(id).then_some(Value::Boolean(true)));
    }
    let Some(raw) = matches.get_raw(id) else { return Ok(None) };
    let mut values = raw.map(|text| scalar(id, text)).collect::<Result<Vec<_>, _>>()?;
    Ok(if adds(option) { Some(Value::Array(values)) } else { values.pop() })
}

/// A number where it is written as one, and a text otherwise; both are read back as the same argument.
fn scalar(id: &str, text: &OsStr) -> Result<Value, End> {
    let text = text.to_str().ok_or_else(|| {
        End::text(ExitCode::Usage, format!("{id} is {}, which no file can say: it is not UTF-8", text.display()))
    })?;
    let number = text.parse::<i64>().ok().filter(|number| number.to_string() == text);
    Ok(number.map_or_else(|| Value::String(text.into()), Value::Integer))
}
