//! Floats as `float.__repr__` spells them.

use std::io::Write as _;

/// The text of a float: `float.__repr__`, except for NaN and the infinities.
pub fn float_text(value: f64) -> String {
    let mut out = Vec::new();
    push_float(&mut out, value);
    out.into_iter().map(char::from).collect()
}

/// Rust finds the shortest digits that round-trip, as Python does; the layout is Python's `'r'` format.
pub(super) fn push_float(out: &mut Vec<u8>, value: f64) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn floats_round_trip(bits in any::<u64>(), near in -1e17..1e17) {
            for x in [f64::from_bits(bits), near].into_iter().filter(|x| !x.is_nan()) {
                prop_assert_eq!(float_text(x).replace("Infinity", "inf").parse::<f64>().unwrap().to_bits(), x.to_bits());
            }
        }
    }
}
