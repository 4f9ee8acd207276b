//! JSON as Python's `json` module writes and reads it, byte for byte and value for value.
//!
//! [`Encoder`] writes what `json.dumps(obj)` writes; [`decode`] accepts what `json.loads` accepts and hands every value
//! to a [`Build`], so that Python objects (`py/json.rs`) and Rust [`Value`]s come out of the same parser without a tree
//! in between. Neither recurses: nesting costs heap, never stack.

use std::collections::HashMap;
use std::io::Write as _;
use std::mem;

use crate::error::{Error, Kind};
use crate::limits::{MAX_JSON_BYTES, MAX_JSON_DEPTH};

/// A string. Python's may hold lone surrogates, which UTF-8 cannot; only those come as UTF-16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Text<'a> {
    /// A string without lone surrogates.
    Utf8(&'a str),
    /// A string with lone surrogates, as UTF-16 code units.
    Utf16(&'a [u16]),
}

/// Writes JSON as `json.dumps` does with its default arguments: `", "` and `": "`, everything outside ASCII escaped.
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
                units.iter().for_each(|&unit| push_unit(&mut self.out, unit));
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

/// What a JSON string written by Python never holds as it is; DEL, oddly, is not among it.
const ESCAPED: [bool; 256] = byte_set(false);
/// What ends a run of plain characters when a string is read.
const STOPS: [bool; 256] = byte_set(true);

const fn byte_set(non_ascii_is_plain: bool) -> [bool; 256] {
    let mut set = [false; 256];
    let mut b = 0;
    while b < 256 {
        set[b] = b < 0x20 || b == b'"' as usize || b == b'\\' as usize || (b >= 0x80 && !non_ascii_is_plain);
        b += 1;
    }
    set
}

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
        0x20..=0x7f => return out.push(unit as u8),
        _ => {
            let digit = |shift: u32| HEX[usize::from(unit >> shift & 15)];
            return out.extend_from_slice(&[b'\\', b'u', digit(12), digit(8), digit(4), digit(0)]);
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

/// The text of a float: `float.__repr__`, except for NaN and the infinities.
pub fn float_text(value: f64) -> String {
    let mut out = Vec::new();
    push_float(&mut out, value);
    out.into_iter().map(char::from).collect()
}

/// Rust finds the shortest digits that round-trip, as Python does; the layout is Python's `'r'` format.
fn push_float(out: &mut Vec<u8>, value: f64) {
    if !value.is_finite() {
        let name: &[u8] = if value.is_nan() { b"NaN" } else { b"Infinity" };
        out.extend_from_slice(if value < 0.0 { b"-" } else { b"" });
        return out.extend_from_slice(name);
    }
    let mut buffer = [0; 32]; // "-1.2345678901234567e-308" is as long as it gets
    let mut free = &mut buffer[..];
    let _ = write!(free, "{:e}", value.abs());
    let len = 32 - free.len();
    let e = buffer[..len].iter().position(|&b| b == b'e').unwrap_or(len);
    let exponent = buffer[e..len].iter().filter(|b| b.is_ascii_digit()).fold(0, |n, b| n * 10 + usize::from(b - b'0'));
    let negative = buffer.get(e + 1) == Some(&b'-');
    buffer.copy_within(2..e.max(2), 1); // the digits, without their point
    let digits = &buffer[..if e > 1 { e - 1 } else { 1 }];

    if value.is_sign_negative() {
        out.push(b'-');
    }
    let point = exponent + 1; // digits before the decimal point
    match negative {
        true if exponent <= 4 => {
            out.extend_from_slice(&b"0.000"[..=exponent]);
            out.extend_from_slice(digits);
        }
        false if exponent < 16 && digits.len() > point => {
            out.extend_from_slice(&digits[..point]);
            out.push(b'.');
            out.extend_from_slice(&digits[point..]);
        }
        false if exponent < 16 => {
            out.extend_from_slice(digits);
            out.extend_from_slice(&b"000000000000000"[..point - digits.len()]);
            out.extend_from_slice(b".0");
        }
        _ => {
            out.push(digits[0]);
            if digits.len() > 1 {
                out.push(b'.');
                out.extend_from_slice(&digits[1..]);
            }
            let _ = write!(out, "e{}{exponent:02}", if negative { '-' } else { '+' });
        }
    }
}

/// What [`decode`] accepts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of the text.
    pub bytes: u64,
    /// Most lists and dicts inside each other.
    pub depth: usize,
    /// Is a key that comes twice in a dict refused? If not, the last one wins.
    pub unique_keys: bool,
}

impl Limits {
    /// For a text from a file nobody vouches for.
    pub const FILE: Self = Self { bytes: MAX_JSON_BYTES, depth: MAX_JSON_DEPTH, unique_keys: true };
}

/// Why a text was not decoded. Positions are byte offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is malformed: what `json.JSONDecodeError` says, and where.
    Syntax(&'static str, usize),
    /// A dict has a key twice; the second one is here.
    Duplicate(usize),
    /// A list, or else a dict, is nested deeper than `Limits::depth`.
    Depth {
        /// Is it a list?
        list: bool,
    },
    /// It has more bytes than `Limits::bytes`.
    Bytes(u64),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Syntax(what, at) => Self::new(Kind::Json(at), format!("malformed JSON at byte {at}: {what}")),
            Fault::Duplicate(at) => Self::new(Kind::Json(at), format!("the JSON key at byte {at} is a duplicate")),
            Fault::Depth { .. } => Self::new(Kind::Limit, "JSON is nested too deeply"),
            Fault::Bytes(n) => Self::new(Kind::Limit, format!("JSON text is too long: {n} bytes")),
        }
    }
}

/// Makes values out of what [`decode`] reads.
pub trait Build {
    /// A finished value.
    type Value;
    /// A key of a dict.
    type Key;
    /// A dict that is being filled.
    type Dict;
    /// What stops decoding.
    type Error: From<Fault>;

    /// `null`.
    fn null(&mut self) -> Self::Value;
    /// `true` or `false`.
    fn bool(&mut self, value: bool) -> Self::Value;
    /// An integer of 64 bits.
    fn int(&mut self, value: i64) -> Self::Value;
    /// A larger integer, in decimal.
    fn int_text(&mut self, digits: &str) -> Result<Self::Value, Self::Error>;
    /// A float, maybe NaN or infinite.
    fn float(&mut self, value: f64) -> Self::Value;
    /// A string.
    fn text(&mut self, text: Text) -> Result<Self::Value, Self::Error>;
    /// A list of `items`.
    fn list(&mut self, items: std::vec::Drain<Self::Value>) -> Result<Self::Value, Self::Error>;
    /// An empty dict.
    fn dict(&mut self) -> Self::Dict;
    /// A key, to be inserted once its value is read.
    fn key(&mut self, text: Text) -> Result<Self::Key, Self::Error>;
    /// Sets a key of a dict; was it new?
    fn insert(&mut self, dict: &mut Self::Dict, key: Self::Key, value: Self::Value) -> Result<bool, Self::Error>;
    /// A complete dict.
    fn finish(&mut self, dict: Self::Dict) -> Self::Value;
}

/// A container whose end has not been read.
enum Frame<B: Build + ?Sized> {
    List(usize),                  // where its items start
    Dict(B::Dict, B::Key, usize), // the key that waits for its value, and where it was
}

/// Reads what `json.loads` reads, within `limits`.
///
/// # Errors
/// A [`Fault`], or what `build` returns.
pub fn decode<B: Build + ?Sized>(text: &str, limits: &Limits, build: &mut B) -> Result<B::Value, B::Error> {
    if text.len() as u64 > limits.bytes {
        return Err(Fault::Bytes(text.len() as u64).into());
    }
    let mut p = Parser { text, at: 0, units: Vec::new(), utf8: String::new() };
    let mut items = Vec::new(); // of every open list, the innermost last
    let mut frames: Vec<Frame<B>> = Vec::new();
    loop {
        p.space();
        let mut value = match p.peek() {
            Some(open @ (b'[' | b'{')) => {
                let list = open == b'[';
                if frames.len() >= limits.depth {
                    return Err(Fault::Depth { list }.into());
                }
                p.at += 1;
                p.space();
                match (list, p.peek()) {
                    (true, Some(b']')) => {
                        p.at += 1;
                        build.list(items.drain(items.len()..))?
                    }
                    (false, Some(b'}')) => {
                        p.at += 1;
                        let dict = build.dict();
                        build.finish(dict)
                    }
                    (true, _) => {
                        frames.push(Frame::List(items.len()));
                        continue;
                    }
                    (false, _) => {
                        let dict = build.dict();
                        let (key, at) = p.key(build)?;
                        frames.push(Frame::Dict(dict, key, at));
                        continue;
                    }
                }
            }
            _ => p.scalar(build)?,
        };
        loop {
            p.space(); // a value was read: what is around it goes on or ends
            match frames.pop() {
                None if p.at == text.len() => return Ok(value),
                None => return Err(Fault::Syntax("Extra data", p.at).into()),
                Some(Frame::List(start)) => {
                    items.push(value);
                    if p.next_is(b',') {
                        frames.push(Frame::List(start));
                        break;
                    }
                    p.expect(b']', "Expecting ',' delimiter")?;
                    value = build.list(items.drain(start..))?;
                }
                Some(Frame::Dict(mut dict, key, at)) => {
                    if !build.insert(&mut dict, key, value)? && limits.unique_keys {
                        return Err(Fault::Duplicate(at).into());
                    }
                    if p.next_is(b',') {
                        p.space();
                        let (key, at) = p.key(build)?;
                        frames.push(Frame::Dict(dict, key, at));
                        break;
                    }
                    p.expect(b'}', "Expecting ',' delimiter")?;
                    value = build.finish(dict);
                }
            }
        }
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    units: Vec<u16>, // the last string with escapes
    utf8: String,    // the same, unless it has lone surrogates
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    fn next_is(&mut self, byte: u8) -> bool {
        let is = self.peek() == Some(byte);
        self.at += usize::from(is);
        is
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), Fault> {
        if self.next_is(byte) { Ok(()) } else { Err(Fault::Syntax(what, self.at)) }
    }

    fn literal(&mut self, word: &str) -> bool {
        let is = self.text.as_bytes()[self.at..].starts_with(word.as_bytes());
        self.at += if is { word.len() } else { 0 };
        is
    }

    /// A key and its colon.
    fn key<B: Build + ?Sized>(&mut self, build: &mut B) -> Result<(B::Key, usize), B::Error> {
        let at = self.at;
        self.expect(b'"', "Expecting property name enclosed in double quotes")?;
        let key = build.key(self.string()?)?;
        self.space();
        self.expect(b':', "Expecting ':' delimiter")?;
        Ok((key, at))
    }

    /// Anything that is neither a list nor a dict.
    fn scalar<B: Build + ?Sized>(&mut self, build: &mut B) -> Result<B::Value, B::Error> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                return build.text(self.string()?);
            }
            Some(b'n') if self.literal("null") => return Ok(build.null()),
            Some(b't') if self.literal("true") => return Ok(build.bool(true)),
            Some(b'f') if self.literal("false") => return Ok(build.bool(false)),
            Some(b'N') if self.literal("NaN") => return Ok(build.float(f64::NAN)),
            Some(b'I') if self.literal("Infinity") => return Ok(build.float(f64::INFINITY)),
            Some(b'-') if self.literal("-Infinity") => return Ok(build.float(f64::NEG_INFINITY)),
            _ => {}
        }
        self.next_is(b'-');
        if !self.next_is(b'0') && self.digits() == 0 {
            return Err(Fault::Syntax("Expecting value", start).into());
        }
        let mut float = self.part(|p| p.next_is(b'.'));
        float |= self.part(|p| {
            let exponent = p.next_is(b'e') || p.next_is(b'E');
            let _sign = p.next_is(b'+') || p.next_is(b'-');
            exponent
        });
        let number = &self.text[start..self.at];
        match number.parse() {
            _ if float => Ok(build.float(number.parse().unwrap_or(f64::NAN))), // Rust parses every such number
            Ok(int) => Ok(build.int(int)),
            Err(_) => build.int_text(number),
        }
    }

    fn digits(&mut self) -> usize {
        let n = self.text.as_bytes()[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        self.at += n;
        n
    }

    /// A fraction or an exponent: what `prefix` takes and digits. Where one is missing, the number ends before it.
    fn part(&mut self, prefix: impl Fn(&mut Self) -> bool) -> bool {
        let start = self.at;
        let is = prefix(self) && self.digits() > 0;
        if !is {
            self.at = start;
        }
        is
    }

    /// The rest of a string whose opening quote was read.
    fn string(&mut self) -> Result<Text<'_>, Fault> {
        let start = self.at;
        let stop = self.plain(start)?;
        if stop == b'"' {
            return Ok(Text::Utf8(&self.text[start..self.at - 1]));
        }
        self.units.clear();
        self.units.extend(self.text[start..self.at - 1].encode_utf16());
        loop {
            let unit = self.escape(start)?;
            self.units.push(unit);
            let run = self.at;
            let stop = self.plain(start)?;
            self.units.extend(self.text[run..self.at - 1].encode_utf16());
            if stop == b'"' {
                break;
            }
        }
        self.utf8.clear();
        for c in char::decode_utf16(self.units.iter().copied()) {
            let Ok(c) = c else { return Ok(Text::Utf16(&self.units)) };
            self.utf8.push(c);
        }
        Ok(Text::Utf8(&self.utf8))
    }

    /// Passes plain characters and the quote or backslash after them, which is returned.
    fn plain(&mut self, start: usize) -> Result<u8, Fault> {
        let rest = &self.text.as_bytes()[self.at..];
        let Some(n) = rest.iter().position(|&b| STOPS[usize::from(b)]) else {
            return Err(Fault::Syntax("Unterminated string starting at", start - 1));
        };
        self.at += n + 1;
        if rest[n] < 0x20 {
            return Err(Fault::Syntax("Invalid control character at", self.at - 1));
        }
        Ok(rest[n])
    }

    /// The code unit that the escape after a backslash stands for.
    fn escape(&mut self, start: usize) -> Result<u16, Fault> {
        let Some(letter) = self.peek() else {
            return Err(Fault::Syntax("Unterminated string starting at", start - 1));
        };
        self.at += 1;
        Ok(match letter {
            b'"' | b'\\' | b'/' => letter.into(),
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => 0x0a,
            b'r' => 0x0d,
            b't' => 0x09,
            b'u' => {
                let bad = Fault::Syntax("Invalid \\uXXXX escape", self.at - 1);
                // Python wants a character after the digits, or else calls the escape invalid.
                let five = self.text.as_bytes().get(self.at..self.at + 5).ok_or(bad)?;
                self.at += 4;
                five[..4].iter().try_fold(0, |unit, &b| {
                    let digit = char::from(b).to_digit(16).ok_or(bad)?;
                    Ok(unit << 4 | digit as u16)
                })?
            }
            _ => return Err(Fault::Syntax("Invalid \\escape", self.at - 2)),
        })
    }
}

/// A JSON value in Rust: for tests, fuzzing and the few configs Rust looks into itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// An integer of 64 bits.
    Int(i64),
    /// A larger integer, in decimal.
    IntText(String),
    /// A float.
    Float(f64),
    /// A string.
    Text(OwnedText),
    /// A list.
    List(Vec<Value>),
    /// A dict, its keys in the order they came first.
    Dict(Vec<(OwnedText, Value)>),
}

/// A [`Text`] that owns its characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OwnedText {
    /// See [`Text::Utf8`].
    Utf8(String),
    /// See [`Text::Utf16`].
    Utf16(Vec<u16>),
}

impl OwnedText {
    /// The borrowed form.
    pub fn as_text(&self) -> Text<'_> {
        match self {
            Self::Utf8(s) => Text::Utf8(s),
            Self::Utf16(units) => Text::Utf16(units),
        }
    }
}

impl From<Text<'_>> for OwnedText {
    fn from(text: Text) -> Self {
        match text {
            Text::Utf8(s) => Self::Utf8(s.to_owned()),
            Text::Utf16(units) => Self::Utf16(units.to_vec()),
        }
    }
}

/// Decodes `text`, never nested deeper than `MAX_JSON_DEPTH`, since a [`Value`] is dropped by recursion.
///
/// # Errors
/// `Limit` or `Json`.
pub fn decode_value(text: &[u8], limits: &Limits) -> Result<Value, Error> {
    let not_utf8 = |e: std::str::Utf8Error| Fault::Syntax("not UTF-8", e.valid_up_to());
    let text = std::str::from_utf8(text).map_err(not_utf8)?;
    decode(text, &Limits { depth: limits.depth.min(MAX_JSON_DEPTH), ..*limits }, &mut Values)
}

/// Writes `value`, which is as deep as [`decode_value`] allows.
pub fn encode_value(value: &Value, out: &mut Encoder) {
    match value {
        Value::Null => out.null(),
        Value::Bool(b) => out.bool(*b),
        Value::Int(n) => out.int(*n),
        Value::IntText(digits) => out.int_text(digits),
        Value::Float(x) => out.float(*x),
        Value::Text(text) => out.text(text.as_text()),
        Value::List(items) => {
            out.begin_list();
            items.iter().for_each(|item| encode_value(item, out));
            out.end_list();
        }
        Value::Dict(entries) => {
            out.begin_dict();
            for (key, value) in entries {
                out.text(key.as_text());
                out.colon();
                encode_value(value, out);
            }
            out.end_dict();
        }
    }
}

struct Values;

impl Build for Values {
    type Value = Value;
    type Key = OwnedText;
    type Dict = (Vec<(OwnedText, Value)>, HashMap<OwnedText, usize>); // the entries, and where each key is
    type Error = Error;

    fn null(&mut self) -> Value {
        Value::Null
    }
    fn bool(&mut self, value: bool) -> Value {
        Value::Bool(value)
    }
    fn int(&mut self, value: i64) -> Value {
        Value::Int(value)
    }
    fn int_text(&mut self, digits: &str) -> Result<Value, Error> {
        Ok(Value::IntText(digits.to_owned()))
    }
    fn float(&mut self, value: f64) -> Value {
        Value::Float(value)
    }
    fn text(&mut self, text: Text) -> Result<Value, Error> {
        Ok(Value::Text(text.into()))
    }
    fn list(&mut self, items: std::vec::Drain<Value>) -> Result<Value, Error> {
        Ok(Value::List(items.collect()))
    }
    fn dict(&mut self) -> Self::Dict {
        Self::Dict::default()
    }
    fn key(&mut self, text: Text) -> Result<OwnedText, Error> {
        Ok(text.into())
    }
    fn insert(&mut self, dict: &mut Self::Dict, key: OwnedText, value: Value) -> Result<bool, Error> {
        let (entries, places) = dict;
        if let Some(&place) = places.get(&key) {
            entries[place].1 = value;
            return Ok(false);
        }
        places.insert(key.clone(), entries.len());
        entries.push((key, value));
        Ok(true)
    }
    fn finish(&mut self, dict: Self::Dict) -> Value {
        Value::Dict(dict.0)
    }
}
