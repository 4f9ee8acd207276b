//! Any bytes as a weights image, by every reader.
#![no_main]
#![allow(dead_code)] // the checks of the other targets

#[path = "../checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::index(data));
