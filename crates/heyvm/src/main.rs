//! heyvm: the command line, the daemon, the jail launcher and the egress holder, chosen by the first argument.
fn main() {}
