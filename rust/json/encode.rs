//! Values → text.

use std::io::Write as _;
use std::mem;

use super::float::push_float;
use super::{Text, byte_set};

/// Writes JSON as `json.dumps` does with its default arguments: `", "` and `": "`, all but printable ASCII escaped.
///
/// Commas are placed by the encoder; that calls are properly nested is up to the caller.
#[derive(Debug, Default)]
pub struct Encoder {
    out: Vec<u8>,
    comma: bool, // does a separator go before the next item?
}

impl Encoder {
    /// An encoder with nothing written.
    pub fn new() -> Self {
        Self::default()
    }

    /// The text so far, which is ASCII.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }

    /// `null`.
    pub fn null(&mut self) {
        self.token(b"null");
    }

    /// `true` or `false`.
    pub fn bool(&mut self, value: bool) {
        self.token(if value { b"true" } else { b"false" });
    }

    /// An integer.
    pub fn int(&mut self, value: i64) {
        self.separate();
        let _ = write!(self.out, "{value}"); // a Vec takes every write
    }

    /// An integer of any size, given in decimal.
    pub fn int_text(&mut self, digits: &str) {
        self.token(digits.as_bytes());
    }

    /// A float, as `float.__repr__` spells it, or `NaN`, `Infinity`, `-Infinity`.
    pub fn float(&mut self, value: f64) {
        self.separate();
        push_float(&mut self.out, value);
    }

    /// A string.
    pub fn text(&mut self, text: Text) {
        match text {
            Text::Utf8(s) => self.str(s),
            Text::Utf16(units) => {
                self.token(b"\"");
                for &unit in units {
                    push_unit(&mut self.out, unit);
                }
                self.out.push(b'"');
            }
        }
    }

    /// A string without lone surrogates.
    pub fn str(&mut self, mut text: &str) {
        self.token(b"\"");
        while let Some(plain) = text.bytes().position(|b| ESCAPED[usize::from(b)]) {
            let (head, tail) = text.split_at(plain);
            self.out.extend_from_slice(head.as_bytes());
            let mut chars = tail.chars();
            let mut units = [0; 2];
            for &unit in chars.next().map_or(&[][..], |c| c.encode_utf16(&mut units)) {
                push_unit(&mut self.out, unit);
            }
            text = chars.as_str();
        }
        self.out.extend_from_slice(text.as_bytes());
        self.out.push(b'"');
    }

    /// Makes the string just written the key of the value that follows.
    pub fn colon(&mut self) {
        self.out.extend_from_slice(b": ");
        self.comma = false;
    }

    /// Opens a list.
    pub fn begin_list(&mut self) {
        self.token(b"[");
        self.comma = false;
    }

    /// Closes a list.
    pub fn end_list(&mut self) {
        self.comma = false;
        self.token(b"]");
    }

    /// Opens a dict; strings followed by [`colon`](Self::colon) alternate with values in it.
    pub fn begin_dict(&mut self) {
        self.token(b"{");
        self.comma = false;
    }

    /// Closes a dict.
    pub fn end_dict(&mut self) {
        self.comma = false;
        self.token(b"}");
    }

    fn token(&mut self, token: &[u8]) {
        self.separate();
        self.out.extend_from_slice(token);
    }

    fn separate(&mut self) {
        if mem::replace(&mut self.comma, true) {
            self.out.extend_from_slice(b", ");
        }
    }
}

/// What a JSON string written by Python never holds as it is.
const ESCAPED: [bool; 256] = byte_set(false);

/// Writes a UTF-16 code unit inside a string.
fn push_unit(out: &mut Vec<u8>, unit: u16) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match unit {
        0x08 => b'b',
        0x09 => b't',
        0x0a => b'n',
        0x0c => b'f',
        0x0d => b'r',
        0x22 => b'"',
        0x5c => b'\\',
        0x20..=0x7e => return out.push(unit as u8),
        _ => {
            let digit = |shift: u32| HEX[usize::from(unit >> shift & 15)];
            return out.extend_from_slice(&[b'\\', b'u', digit(12), digit(8), digit(4), digit(0)]);
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}
