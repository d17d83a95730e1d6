//! What the small files of `/proc`, `/sys` and `/etc` say. Pure but for [`read`], and at ease with any text.

use std::fs;

/// The file's text without blanks around it; `None` when it is not there or not for this user.
pub(crate) fn read(path: &str) -> Option<String> {
    // Bytes: nothing promises UTF-8.
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// What follows the first `name:`, without blanks around it.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// The bytes of a field in kB, as in `/proc/meminfo`.
pub(crate) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let number: u64 = field(text, name)?.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(1024)
}

/// Whether a line of words has this one.
pub(crate) fn has_word(line: &str, word: &str) -> bool {
    line.split_whitespace().any(|w| w == word)
}

/// The choice in brackets, as in `always [never]`.
pub(crate) fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(choice, _)| choice)
}

/// The group's name, from the text of `/etc/group`.
pub(crate) fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, number) = (fields.next()?, fields.next()?, fields.next()?);
        (number.parse() == Ok(gid)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "vmx flags\t: x\nflags\t\t: fpu svm\nMemTotal:  12 kB\nBig: 18446744073709551615 kB\n";
        assert_eq!(field(text, "flags"), Some("fpu svm"));
        assert_eq!(field(text, "lags"), None);
        assert_eq!(kib_field(text, "MemTotal"), Some(12 * 1024));
        assert_eq!(kib_field(text, "Big"), None);
        assert_eq!(kib_field(text, "flags"), None);
        assert!(has_word("fpu svm", "svm") && !has_word("fpu svm_lock", "svm"));
    }

    #[test]
    fn the_choice_is_what_brackets_hold() {
        assert_eq!(chosen("always [never] deny"), Some("never"));
        assert_eq!(chosen("]always["), None);
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn groups_are_found_by_number() {
        let text = "root:x:0:\nbroken\nkvm:x:104:alice,bob\n";
        assert_eq!(group_name(text, 104), Some("kvm"));
        assert_eq!(group_name(text, 5), None);
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in "(\\PC|[:\\[\\]\n\t])*", name in "\\PC{0,4}", number: u32) {
            let _ = (field(&text, &name), kib_field(&text, &name), chosen(&text), group_name(&text, number));
            let _ = has_word(&text, &name);
        }
    }
}
