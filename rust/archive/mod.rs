//! The zip container of a `.keras` file: `model.weights.h5` first and aligned, then the JSON members, then assets.
//!
//! Everything is STORED, so that the weights are one run of bytes. Section numbers refer to PKWARE's APPNOTE 6.3.10.
#![forbid(unsafe_code)]

pub mod read;
pub mod write;

/// The member with every tensor.
pub const WEIGHTS: &str = "model.weights.h5";

/// Flag bit 11: the name is UTF-8; else it is code page 437 (appendix D).
const UTF8: u16 = 1 << 11;

/// Says why a name cannot stand in an archive, if so: readers would find it under different names, or outside.
fn refuse_name(name: &str) -> Option<&'static str> {
    let drive = name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic();
    if name.is_empty() || name.contains('\0') {
        Some("a name is empty or holds a NUL")
    } else if name.contains('\\') {
        Some("a name holds a backslash, which some readers take for a slash")
    } else if drive || name.starts_with('/') || name.split('/').any(|part| part == "..") {
        Some("a name leads out of the archive")
    } else {
        None
    }
}

const LOCAL_HEADER: u32 = 0x0403_4b50;
const CENTRAL_HEADER: u32 = 0x0201_4b50;
const DATA_DESCRIPTOR: u32 = 0x0807_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const ZIP64_EXTRA: u16 = 0x0001;
/// Sizes and offsets from here on need the zip64 extra field; Python's `ZIP64_LIMIT` is half of it.
const ZIP64_LIMIT: u64 = 0xffff_ffff;
