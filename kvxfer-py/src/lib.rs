//! The native module `kvxfer._kvxfer`.
