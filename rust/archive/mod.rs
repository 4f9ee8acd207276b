//! The zip container of a `.keras` file: `model.weights.h5` first and aligned, then the JSON members, then assets.
//!
//! Everything is STORED, so that the weights are one range of bytes. Section numbers refer to PKWARE's APPNOTE 6.3.10.
#![forbid(unsafe_code)]

mod end;
mod fields;
mod name;
pub mod read;
pub mod write;

/// The member with every tensor.
pub const WEIGHTS: &str = "model.weights.h5";

const LOCAL_HEADER: u32 = 0x0403_4b50;
const CENTRAL_HEADER: u32 = 0x0201_4b50;
const DATA_DESCRIPTOR: u32 = 0x0807_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const ZIP64_EXTRA: u16 = 0x0001;
/// A name in UTF-8, written by Info-ZIP beside one that is not.
const UNICODE_NAME_EXTRA: u16 = 0x7075;
/// Flags (§4.4.4): encrypted, patched data, strongly encrypted, masked headers; sizes behind the data; name in UTF-8.
const ENCRYPTED_FLAGS: u16 = 0x2061;
const STREAMED_FLAG: u16 = 0x0008;
const UTF8_FLAG: u16 = 0x0800;
/// Sizes and offsets from here on need the zip64 extra field; Python's `ZIP64_LIMIT` is half of it.
const ZIP64_LIMIT: u64 = 0xffff_ffff;
