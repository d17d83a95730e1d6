//! What another processor would replace.

pub mod x86_64;
