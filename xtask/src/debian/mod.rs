//! What is fetched from Debian: packages that are unpacked and not installed, and the kernels in them.
//!
//! Installing a kernel would change what this machine boots next.

mod kernel;
mod modules;
mod package;

pub(crate) use kernel::KernelPackage;
pub(crate) use modules::{module_name, plain_module};
pub(crate) use package::{Known, known, named, packages_with, the_one_needed};
