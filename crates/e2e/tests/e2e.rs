//! Every promise of SPECIFICATION.md that takes a real VM to check, one module per subject.
