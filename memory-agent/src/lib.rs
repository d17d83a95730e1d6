//! What the host knows of a process's shared pages, and what can be done about it.
