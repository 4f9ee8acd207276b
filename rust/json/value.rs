//! JSON values in Rust: for tests and fuzzing.

use std::collections::HashMap;

use super::{Build, Encoder, Fault, Limits, Scalar, Text, decode};
use crate::error::Error;
use crate::limits::MAX_JSON_DEPTH;

/// A JSON value.
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
    use crate::error::Kind;
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
        let duplicate = decode_value(br#"{"a": 1, "\u0061": 2}"#, &Limits::FILE).unwrap_err();
        assert!(matches!(duplicate.kind(), Kind::Json(9)));
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
}
