//! JSON as Python's `json` module writes and reads it, byte for byte and value for value.
//!
//! [`Encoder`] writes what `json.dumps(obj)` writes; [`decode`] accepts what `json.loads` accepts and hands every value
//! to a [`Build`], so that Python objects (`py/json.rs`) and Rust [`Value`]s come out of the same parser without a tree
//! in between. Neither recurses: nesting costs heap, never stack.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
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

/// What is open while nested containers are written, to find one inside itself: constant work for each.
#[derive(Debug)]
pub struct Ancestors<K> {
    near: Vec<K>, // the outermost ones, among which looking is faster than hashing
    far: HashSet<K>,
}

impl<K> Default for Ancestors<K> {
    fn default() -> Self {
        Self { near: Vec::new(), far: HashSet::new() }
    }
}

impl<K: Eq + Hash> Ancestors<K> {
    const NEAR: usize = 16;

    /// Opens a container; `false` if it is open already.
    pub fn open(&mut self, container: K) -> bool {
        if self.near.contains(&container) {
            return false;
        }
        if self.near.len() < Self::NEAR {
            self.near.push(container);
            return true;
        }
        self.far.insert(container)
    }

    /// Closes the innermost one.
    pub fn close(&mut self, container: &K) {
        if !self.far.remove(container) {
            self.near.pop();
        }
    }
}

/// What a JSON string written by Python never holds as it is.
const ESCAPED: [bool; 256] = byte_set(false);
/// What ends a run of plain characters when a string is read.
const STOPS: [bool; 256] = byte_set(true);

const fn byte_set(high_is_plain: bool) -> [bool; 256] {
    let mut set = [false; 256];
    let mut b = 0;
    while b < 256 {
        set[b] = b < 0x20 || b == b'"' as usize || b == b'\\' as usize || (b >= 0x7f && !high_is_plain);
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
        0x20..=0x7e => return out.push(unit as u8),
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
    if value.is_sign_negative() && !value.is_nan() {
        out.push(b'-');
    }
    if !value.is_finite() {
        return out.extend_from_slice(if value.is_nan() { b"NaN" } else { b"Infinity" });
    }
    let mut buffer = [0; 32]; // "1.2345678901234567e-308" is as long as it gets
    let mut free = &mut buffer[..];
    let _ = write!(free, "{:e}", value.abs());
    let len = 32 - free.len();
    let e = buffer[..len].iter().position(|&b| b == b'e').unwrap_or(len);
    let negative = buffer[e + 1] == b'-';
    let exponent = decimal(&buffer[e + 1 + usize::from(negative)..len]) as usize;
    buffer.copy_within(2..e.max(2), 1); // closes the gap the point leaves
    let digits = &mut buffer[..e.max(2) - 1];
    let last = digits.len() - 1;
    if digits[last] % 2 == 1 && is_tie(value.abs(), digits, negative, exponent) {
        digits[last] -= 1;
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

/// Is `value` exactly half a unit of the last digit below `digits`, and would the number a whole unit below do as well?
/// Python takes the even one of the two, while Rust always takes the upper one.
#[expect(clippy::cast_sign_loss, clippy::cast_possible_wrap)] // of small numbers that have no sign
fn is_tie(value: f64, digits: &[u8], negative: bool, exponent: usize) -> bool {
    // `value` has one digit more, an odd one: `places` after the point. So the power of two in it is 2^-places, and
    // 5^places divides its at most 18 digits: no more than 25 places.
    let places = if negative { digits.len() + exponent } else { digits.len().saturating_sub(exponent) };
    if places > 25 {
        return false;
    }
    let odd = value * f64::from(1_u32 << places); // exact
    odd.fract() == 0.0
        && odd < 1e18
        && odd as u128 * 5_u128.pow(places as u32) == u128::from(decimal(digits)) * 10 - 5
        && value - value.next_down() > 0.1_f64.powi(places as i32 - 1) // floats are denser below a power of two
}

fn decimal(digits: &[u8]) -> u64 {
    digits.iter().fold(0, |n, b| n * 10 + u64::from(b - b'0'))
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
    /// A list is nested deeper than `Limits::depth`.
    DeepList,
    /// A dict is nested deeper than `Limits::depth`.
    DeepDict,
    /// It has more bytes than `Limits::bytes`.
    Bytes(u64),
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Syntax(what, at) => Self::new(Kind::Json(at), format!("malformed JSON at byte {at}: {what}")),
            Fault::Duplicate(at) => Self::new(Kind::Json(at), format!("the JSON key at byte {at} is a duplicate")),
            Fault::DeepList | Fault::DeepDict => Self::new(Kind::Limit, "JSON is nested too deeply"),
            Fault::Bytes(n) => Self::new(Kind::Limit, format!("JSON text is too long: {n} bytes")),
        }
    }
}

/// A value without other values inside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar<'a> {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// An integer of 64 bits.
    Int(i64),
    /// A larger integer, in decimal.
    IntText(&'a str),
    /// A float, maybe NaN or infinite.
    Float(f64),
    /// A string.
    Text(Text<'a>),
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

    /// Anything that is neither a list nor a dict.
    fn scalar(&mut self, scalar: Scalar) -> Result<Self::Value, Self::Error>;
    /// A list of `items`.
    fn list(&mut self, items: std::vec::Drain<Self::Value>) -> Result<Self::Value, Self::Error>;
    /// An empty dict.
    fn dict(&mut self) -> Self::Dict;
    /// A key, to be inserted once its value is read.
    fn key(&mut self, text: Text) -> Result<Self::Key, Self::Error>;
    /// Sets a key of a dict; was it new?
    fn insert(&mut self, dict: &mut Self::Dict, key: Self::Key, value: Self::Value) -> Result<bool, Self::Error>;
    /// A complete dict.
    fn finish(&mut self, dict: Self::Dict) -> Result<Self::Value, Self::Error>;
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
                    return Err(if list { Fault::DeepList } else { Fault::DeepDict }.into());
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
                        build.finish(dict)?
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
                    value = build.finish(dict)?;
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

impl<'t> Parser<'t> {
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
        let key = match self.simple() {
            Some(s) => build.key(Text::Utf8(s))?,
            None => build.key(self.string()?)?,
        };
        self.space();
        self.expect(b':', "Expecting ':' delimiter")?;
        Ok((key, at))
    }

    /// Anything that is neither a list nor a dict. Built here, since a `Scalar` that is returned first costs time.
    fn scalar<B: Build + ?Sized>(&mut self, build: &mut B) -> Result<B::Value, B::Error> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                match self.simple() {
                    Some(s) => build.scalar(Scalar::Text(Text::Utf8(s))),
                    None => build.scalar(Scalar::Text(self.string()?)),
                }
            }
            Some(b'n') if self.literal("null") => build.scalar(Scalar::Null),
            Some(b't') if self.literal("true") => build.scalar(Scalar::Bool(true)),
            Some(b'f') if self.literal("false") => build.scalar(Scalar::Bool(false)),
            Some(b'N') if self.literal("NaN") => build.scalar(Scalar::Float(f64::NAN)),
            Some(b'I') if self.literal("Infinity") => build.scalar(Scalar::Float(f64::INFINITY)),
            Some(b'-') if self.literal("-Infinity") => build.scalar(Scalar::Float(f64::NEG_INFINITY)),
            _ => {
                let start = self.at;
                let float = self.number()?;
                let number = &self.text[start..self.at];
                match number.parse() {
                    _ if float => build.scalar(Scalar::Float(number.parse().unwrap_or(f64::NAN))), // is always a float
                    Ok(int) => build.scalar(Scalar::Int(int)),
                    Err(_) => build.scalar(Scalar::IntText(number)),
                }
            }
        }
    }

    /// Passes a number; is it a float?
    fn number(&mut self) -> Result<bool, Fault> {
        let start = self.at;
        self.next_is(b'-');
        if !self.next_is(b'0') && self.digits() == 0 {
            return Err(Fault::Syntax("Expecting value", start));
        }
        let fraction = self.part(|p| p.next_is(b'.'));
        let exponent = self.part(|p| {
            let e = p.next_is(b'e') || p.next_is(b'E');
            let _sign = p.next_is(b'+') || p.next_is(b'-');
            e
        });
        Ok(fraction || exponent)
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

    /// The rest of a string whose opening quote was read, if nothing in it needs a second look.
    fn simple(&mut self) -> Option<&'t str> {
        let rest = &self.text[self.at..];
        let n = rest.bytes().position(|b| STOPS[usize::from(b)]).filter(|&n| rest.as_bytes()[n] == b'"')?;
        self.at += n + 1;
        Some(&rest[..n])
    }

    /// The rest of any string.
    #[cold]
    fn string(&mut self) -> Result<Text<'_>, Fault> {
        let start = self.at;
        self.units.clear();
        loop {
            let run = self.at;
            let stop = self.plain(start)?;
            self.units.extend(self.text[run..self.at - 1].encode_utf16());
            if stop == b'"' {
                break;
            }
            let unit = self.escape(start)?;
            self.units.push(unit);
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
            for item in items {
                encode_value(item, out);
            }
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

    fn scalar(&mut self, scalar: Scalar) -> Result<Value, Error> {
        Ok(match scalar {
            Scalar::Null => Value::Null,
            Scalar::Bool(b) => Value::Bool(b),
            Scalar::Int(n) => Value::Int(n),
            Scalar::IntText(digits) => Value::IntText(digits.to_owned()),
            Scalar::Float(x) => Value::Float(x),
            Scalar::Text(text) => Value::Text(text.into()),
        })
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
    fn finish(&mut self, dict: Self::Dict) -> Result<Value, Error> {
        Ok(Value::Dict(dict.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRUSTED: Limits = Limits { unique_keys: false, ..Limits::FILE };

    fn encode(value: &Value) -> String {
        let mut out = Encoder::new();
        encode_value(value, &mut out);
        String::from_utf8(out.finish()).unwrap()
    }

    fn recoded(text: &str) -> String {
        encode(&decode_value(text.as_bytes(), &TRUSTED).unwrap())
    }

    #[test]
    fn floats_are_laid_out_as_python_does() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (123.456, "123.456"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e16, "1.5e+16"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e+308"),
            (f64::NAN, "NaN"),
            (-f64::NAN, "NaN"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            // Halfway between two numbers as short: the even one, unless it is too far below a power of two.
            (977_077_725_623_397.0 + 0.25, "977077725623397.2"),
            (977_077_725_623_397.0 + 0.75, "977077725623397.8"),
            (2f64.powi(50) + 0.25, "1125899906842624.2"),
            (2f64.powi(-25), "2.9802322387695312e-08"),
            (2f64.powi(-24), "5.960464477539063e-08"),
        ] {
            assert_eq!(float_text(value), text);
        }
    }

    #[test]
    fn texts_are_written_as_python_does() {
        for (from, to) in [
            (" [ 1,-0 ,true\t,false,null\r]\n", "[1, 0, true, false, null]"),
            ("[1E2, 1.0, 1e999, -1e999, NaN]", "[100.0, 1.0, Infinity, -Infinity, NaN]"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            (r#"{"a": {}, "b": [], "a": [1]}"#, r#"{"a": [1], "b": []}"#),
            (r#""\"\\\/\b\f\n\r\t\u001f\u007F""#, "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u001f\\u007f\""),
            ("\"é😀\"", r#""\u00e9\ud83d\ude00""#),
            (r#""\ud83d\ude00 \ude00\ud83d""#, r#""\ud83d\ude00 \ude00\ud83d""#),
            (r#"{"\ud800": "\ud800", "\ud800": 0}"#, r#"{"\ud800": 0}"#),
        ] {
            assert_eq!(recoded(from), to);
        }
    }

    #[test]
    fn malformed_texts_say_where() {
        for (text, at) in [
            ("", 0),
            (" ", 1),
            ("[1,", 3),
            ("[1 2]", 3),
            ("[1,]", 3),
            ("{\"a\"}", 4),
            ("{\"a\":1,}", 7),
            ("{1:2}", 1),
            ("01", 1),
            ("1.", 1),
            ("1e+", 1),
            ("-", 0),
            ("nul", 0),
            ("[] x", 3),
            ("\"a", 0),
            ("\"a\\", 0),
            ("\"a\n\"", 2),
            ("\"\\x\"", 1),
            ("\"\\u12é4\"", 2),
            ("\"\\u1234", 2),
            ("\u{feff}1", 0),
        ] {
            let err = decode_value(text.as_bytes(), &TRUSTED).unwrap_err();
            assert!(matches!(err.kind(), Kind::Json(n) if *n == at), "{text:?}: {err:?}");
        }
        assert!(matches!(decode_value(b"\"\xff\"", &TRUSTED).unwrap_err().kind(), Kind::Json(1)));
    }

    #[test]
    fn limits_hold() {
        let nested = |n| ["[".repeat(n), "]".repeat(n)].concat().into_bytes();
        assert!(decode_value(&nested(MAX_JSON_DEPTH), &Limits::FILE).is_ok());
        let limit = |text: &[u8], limits: &Limits| {
            assert!(matches!(decode_value(text, limits).unwrap_err().kind(), Kind::Limit));
        };
        limit(&nested(MAX_JSON_DEPTH + 1), &Limits::FILE);
        limit(&nested(MAX_JSON_DEPTH + 1), &Limits { depth: usize::MAX, ..Limits::FILE });
        limit(&b"{\"a\":".repeat(1_000_000), &Limits::FILE);
        limit(b"[1, 2]", &Limits { bytes: 5, ..Limits::FILE });
        let twice = decode_value(br#"{"a": 1, "\u0061": 2}"#, &Limits::FILE).unwrap_err();
        assert!(matches!(twice.kind(), Kind::Json(9)));
    }

    fn texts() -> impl Strategy<Value = OwnedText> {
        prop_oneof![
            any::<String>().prop_map(OwnedText::Utf8),
            "[a-z\\x00-\\x1f\"\\\\]{0,9}".prop_map(OwnedText::Utf8),
            any::<Vec<u16>>().prop_map(|u| String::from_utf16(&u).map_or(OwnedText::Utf16(u), OwnedText::Utf8)),
        ]
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            "-?[1-9][0-9]{19,60}".prop_map(Value::IntText),
            any::<f64>().prop_map(Value::Float),
            texts().prop_map(Value::Text),
        ];
        leaf.prop_recursive(6, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::List),
                prop::collection::hash_map(texts(), inner, 0..8).prop_map(|m| Value::Dict(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn values_round_trip(value in values()) {
            let text = encode(&value);
            prop_assert!(text.is_ascii());
            prop_assert_eq!(decode_value(text.as_bytes(), &Limits::FILE).unwrap(), value);
        }

        #[test]
        fn floats_round_trip(bits in any::<u64>(), near in -1e17..1e17) {
            for x in [f64::from_bits(bits), near].into_iter().filter(|x| !x.is_nan()) {
                prop_assert_eq!(float_text(x).replace("Infinity", "inf").parse::<f64>().unwrap().to_bits(), x.to_bits());
            }
        }

        #[test]
        fn anything_is_read_or_refused(text in "[\\[\\]{},:\"\\\\u0-9eE.+ aé-]{0,40}", bytes in any::<Vec<u8>>()) {
            for bytes in [text.as_bytes(), &bytes] {
                if let Ok(value) = decode_value(bytes, &TRUSTED) {
                    prop_assert_eq!(decode_value(encode(&value).as_bytes(), &TRUSTED).unwrap(), value);
                }
            }
        }

        #[test]
        fn a_text_that_is_cut_is_refused(value in values(), cut in any::<prop::sample::Index>()) {
            let text = encode(&Value::List(vec![value]));
            prop_assert!(decode_value(&text.as_bytes()[..cut.index(text.len())], &Limits::FILE).is_err());
        }
    }

    #[test]
    fn a_container_inside_itself_is_found_with_constant_work() {
        thread_local!(static COMPARED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });
        #[derive(Debug)]
        struct Key(usize);
        impl Hash for Key {
            fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
                self.0.hash(state);
            }
        }
        impl PartialEq for Key {
            fn eq(&self, other: &Self) -> bool {
                COMPARED.set(COMPARED.get() + 1);
                self.0 == other.0
            }
        }
        impl Eq for Key {}
        for depth in [1, 16, 17, 1000, 100_000] {
            let mut open = Ancestors::default();
            COMPARED.set(0);
            for n in 0..depth {
                assert!(open.open(Key(n)));
                assert!(open.open(Key(depth + n))); // a sibling of what comes next
                open.close(&Key(depth + n));
            }
            assert!(COMPARED.get() <= depth * 40, "{} comparisons for {depth}", COMPARED.get());
            for n in (0..depth).rev() {
                assert!(!open.open(Key(n)) && !open.open(Key(0)), "{n} of {depth}");
                open.close(&Key(n));
                assert!(open.open(Key(n)), "{n} of {depth}");
                open.close(&Key(n));
            }
        }
    }
}
