//! Any bytes as JSON: an error, or a value that encodes to what decodes to it again.
#![no_main]

use hornbeam::config::{Encoder, Limits, decode_value, encode_value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = decode_value(data, &Limits::FILE) else { return };
    let encode = |value| {
        let mut out = Encoder::new();
        encode_value(value, &mut out);
        out.finish()
    };
    let text = encode(&value);
    let again = decode_value(&text, &Limits::FILE).expect("what we wrote is JSON");
    assert_eq!(encode(&again), text);
});
