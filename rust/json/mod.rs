//! JSON as Python's `json` module writes and reads it, byte for byte and value for value.
//!
//! [`Encoder`] writes what `json.dumps(obj)` writes; [`decode`] accepts what `json.loads` accepts and hands every value
//! to a [`Build`], so that Python objects (`py/json.rs`) and Rust [`Value`]s come out of the same parser without a tree
//! in between. Neither recurses: nesting costs heap, never stack.
#![forbid(unsafe_code)]

mod ancestors;
mod decode;
mod encode;
mod float;
mod recent;
mod value;

pub use ancestors::Ancestors;
pub use decode::{Build, Fault, Limits, Scalar, decode};
pub use encode::Encoder;
pub use float::float_text;
pub use recent::Recent;
pub use value::{OwnedText, Value, decode_value, encode_value};

/// A string. Python's may hold lone surrogates, which UTF-8 cannot; only those come as UTF-16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Text<'a> {
    /// A string without lone surrogates.
    Utf8(&'a str),
    /// A string with lone surrogates, as UTF-16 code units.
    Utf16(&'a [u16]),
}

/// The bytes that a string does not hold as they are: control characters, quotes and backslashes; in what Python writes
/// also all that is not ASCII, and DEL.
const fn byte_set(high_is_plain: bool) -> [bool; 256] {
    let mut set = [false; 256];
    let mut b = 0;
    while b < 256 {
        set[b] = b < 0x20 || b == b'"' as usize || b == b'\\' as usize || (b >= 0x7f && !high_is_plain);
        b += 1;
    }
    set
}
