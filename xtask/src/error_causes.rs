//! A rule that no compiler checks: an error's sentence has its cause in it, or the error returns it, not both. Whoever prints a
//! chain of errors would say it twice.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::visit::Visit;
use syn::{Attribute, Fields, ItemEnum, LitStr, Variant};

/// Every variant below `root` that breaks the rule, one line each.
///
/// # Errors
/// When a source file cannot be read.
pub(crate) fn said_twice(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in sources(root)? {
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        // What does not parse does not compile, and is told there.
        let Ok(parsed) = syn::parse_file(&text) else { continue };
        let mut variants = Variants::default();
        variants.visit_file(&parsed);
        let shown = file.strip_prefix(root).unwrap_or(&file).display().to_string();
        found.extend(variants.0.into_iter().map(|variant| {
            format!("{shown}: {variant} prints its cause and returns it too: name the field `cause`, without #[from]")
        }));
    }
    Ok(found)
}

/// All Rust files that are not built ones.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(sources(&path)?);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    Ok(found)
}

/// The variants of a file that say their cause twice, as `Enum::Variant`.
#[derive(Default)]
struct Variants(Vec<String>);

impl<'ast> Visit<'ast> for Variants {
    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        let twice = item.variants.iter().filter(|variant| says_twice(variant));
        self.0.extend(twice.map(|variant| format!("{}::{}", item.ident, variant.ident)));
    }
}

/// Whether thiserror makes a variant print a field that it returns as `source()`.
fn says_twice(variant: &Variant) -> bool {
    let Some(sentence) = sentence(&variant.attrs) else { return false };
    let is_marked = |attributes: &[Attribute]| {
        attributes.iter().any(|attribute| attribute.path().is_ident("from") || attribute.path().is_ident("source"))
    };
    match &variant.fields {
        Fields::Named(fields) => fields.named.iter().any(|field| {
            let name = field.ident.as_ref().map(ToString::to_string).unwrap_or_default();
            (name == "source" || is_marked(&field.attrs)) && sentence.contains(&format!("{{{name}"))
        }),
        Fields::Unnamed(fields) => fields.unnamed.iter().enumerate().any(|(index, field)| {
            is_marked(&field.attrs) && (sentence.contains(&format!("{{{index}")) || sentence.contains("{}"))
        }),
        Fields::Unit => false,
    }
}

/// What `#[error("…")]` says; nothing where it is `transparent`.
fn sentence(attributes: &[Attribute]) -> Option<String> {
    let error = attributes.iter().find(|attribute| attribute.path().is_ident("error"))?;
    error
        .parse_args_with(|input: syn::parse::ParseStream<'_>| {
            let sentence: LitStr = input.parse()?;
            // The arguments of the format do not matter here.
            input.step(|cursor| {
                let mut rest = *cursor;
                while let Some((_, next)) = rest.token_tree() {
                    rest = next;
                }
                Ok(((), rest))
            })?;
            Ok(sentence.value())
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twice(text: &str) -> Vec<String> {
        let mut variants = Variants::default();
        variants.visit_file(&syn::parse_file(text).unwrap());
        variants.0
    }

    #[test]
    fn what_is_said_twice_is_found() {
        let text = r#"
            enum E {
                #[error("cannot open {path}: {source}", path = path.display())]
                Named { path: PathBuf, source: io::Error },
                #[error("it failed: {0}")]
                From(#[from] io::Error),
                #[error("it failed: {}", .0.kind())]
                Source(#[source] io::Error),
            }"#;
        assert_eq!(twice(text), ["E::Named", "E::From", "E::Source"]);
    }

    #[test]
    fn what_is_said_once_is_not() {
        let text = r#"
            enum E {
                #[error(transparent)]
                Transparent(#[from] io::Error),
                #[error("cannot open {path}: {cause}", path = path.display())]
                Printed { path: PathBuf, cause: io::Error },
                #[error("no machine")]
                Returned(#[source] io::Error),
                #[error("vCPU {0} has ended")]
                Unrelated(u8),
                #[error("nobody")]
                Unit,
            }"#;
        assert_eq!(twice(text), [""; 0]);
    }
}
