//! Text → values, one by one.

use super::{Text, byte_set};
use crate::error::{Error, Kind};
use crate::limits::{MAX_JSON_BYTES, MAX_JSON_DEPTH};

/// What [`decode`] accepts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of the text.
    pub bytes: u64,
    /// Most lists and dicts inside each other.
    pub depth: usize,
    /// Is a second entry of a dict with the same key refused? If not, the last one wins.
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
    /// A dict has two entries with one key; the second one is here.
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

/// What ends plain characters when a string is read.
const STOPS: [bool; 256] = byte_set(true);

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
            let from = self.at;
            let stop = self.plain(start)?;
            self.units.extend(self.text[from..self.at - 1].encode_utf16());
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
