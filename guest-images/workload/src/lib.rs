//! The embedded guest: a bare-metal workload that checks its own memory.
