//! All consoles of one machine, by the device that each is the other end of.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Console, ConsoleError, ConsoleInput, ConsoleTarget};
use crate::devices::host::ConsoleOutput;
use crate::record::Name;

/// Open consoles.
#[derive(Debug, Default)]
pub struct Consoles(BTreeMap<Name, Console>);

impl Consoles {
    /// Opens each target.
    ///
    /// # Errors
    /// When one cannot be opened, or two want standard input and output.
    pub fn open(targets: &[(Name, ConsoleTarget)]) -> Result<Self, ConsoleError> {
        let mut on_stdio = targets.iter().filter(|(_, target)| *target == ConsoleTarget::Stdio);
        if let (Some((first, _)), Some((second, _))) = (on_stdio.next(), on_stdio.next()) {
            return Err(ConsoleError::Twice(first.clone(), second.clone()));
        }
        let open = |(id, target): &(Name, ConsoleTarget)| Ok((id.clone(), Console::open(target)?));
        targets.iter().map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Pseudo-terminals for others to open.
    pub fn ptys(&self) -> impl Iterator<Item = (&Name, &Path)> {
        self.0.iter().filter_map(|(id, console)| Some((id, console.pty.as_deref()?)))
    }

    /// The ends that the guest writes to.
    pub fn take_outputs(&mut self) -> BTreeMap<Name, ConsoleOutput> {
        self.0.iter_mut().map(|(id, console)| (id.clone(), console.take_output())).collect()
    }

    /// The ends that the guest reads from.
    pub(crate) fn take_inputs(&mut self) -> impl Iterator<Item = (Name, ConsoleInput)> {
        self.0.iter_mut().filter_map(|(id, console)| Some((id.clone(), console.take_input()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_terminal_is_for_one_of_them() {
        let name = |text: &str| Name::try_from(text).unwrap();
        let twice = [(name("serial0"), ConsoleTarget::Stdio), (name("console0"), ConsoleTarget::Stdio)];
        let refused = Consoles::open(&twice).unwrap_err().to_string();
        assert!(refused.contains("serial0") && refused.contains("console0"), "{refused}");
        let mut two =
            Consoles::open(&[(name("serial0"), ConsoleTarget::Pty), (name("console0"), ConsoleTarget::Pty)]).unwrap();
        assert_eq!((two.ptys().count(), two.take_outputs().len(), two.take_inputs().count()), (2, 2, 2));
    }
}
