//! What we rely on the driver for: one test for each behaviour, for any driver.

mod streams;
