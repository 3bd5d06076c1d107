//! A driver for tests: see `README.md`.
