//! Tensors in half precision: cast a block at a time while they are written, and what that costs.
//!
//! Written without branches where every element passes, so that the compiler can use vectors: as fast as NumPy or faster.
#![allow(clippy::needless_bitwise_bool)]

use std::ops::{Div, Sub};

use crate::dtype::DType;

/// Elements of a block: what is read and what is made of it stay in the first-level cache.
const BLOCK: usize = 4096;

/// A cast of `f32` or `f64` to half precision, to the nearest and between two to the even one, as NumPy's and
/// `ml_dtypes`' are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cast {
    double: bool,
    brain: bool,
}

/// What a cast costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Finite values that became infinite.
    pub infinite: u64,
    /// Other values than zero that became zero.
    pub zeros: u64,
    /// The largest difference, among values that stayed finite.
    pub max_abs: f64,
    /// The largest difference in proportion to the value.
    pub max_rel: f64,
}

impl Cast {
    /// The cast between two types, if there is one: `float32` and `float64` to `float16` and bfloat16, which HDF5 has no
    /// type for.
    pub fn between(wide: DType, narrow: DType) -> Option<Self> {
        match (wide, narrow) {
            (DType::F32 | DType::F64, DType::F16 | DType::Opaque(2)) => {
                Some(Self { double: wide == DType::F64, brain: narrow == DType::Opaque(2) })
            }
            _ => None,
        }
    }

    /// The name of the type that it casts to.
    pub fn narrow(self) -> &'static str {
        if self.brain { "bfloat16" } else { "float16" }
    }

    /// Casts the elements in `wide`, and hands them to `put` a block at a time.
    ///
    /// # Errors
    /// Those of `put`.
    pub fn each_block<E>(self, wide: &[u8], mut put: impl FnMut(&[u8]) -> Result<(), E>) -> Result<Loss, E> {
        let (mut loss, mut narrow) = (Loss::default(), [0; 2 * BLOCK]);
        let size = if self.double { 8 } else { 4 };
        for block in wide.chunks(size * BLOCK) {
            let narrow = &mut narrow[..block.len() / size * 2];
            match (self.double, self.brain) {
                (false, false) => cast(block, narrow, &mut loss, f32::from_le_bytes, f16_bits, f16_value),
                (false, true) => cast(block, narrow, &mut loss, f32::from_le_bytes, bf16_bits, bf16_value),
                (true, false) => {
                    cast(block, narrow, &mut loss, f64::from_le_bytes, |x| f16_bits(round_to_odd(x)), f16_value);
                }
                // By way of `f32`, as `ml_dtypes` does it.
                (true, true) => cast(block, narrow, &mut loss, f64::from_le_bytes, |x| bf16_bits(x as f32), bf16_value),
            }
            put(narrow)?;
        }
        Ok(loss)
    }
}

/// Elements that are compared at a time: a maximum of each, so that the compiler can use vectors.
const LANES: usize = 16;

/// `f32` or `f64`.
trait Wide: Copy + PartialOrd + Sub<Output = Self> + Div<Output = Self> + From<f32> + Into<f64> {
    fn abs(self) -> Self;
}

impl Wide for f32 {
    fn abs(self) -> Self {
        self.abs()
    }
}

impl Wide for f64 {
    fn abs(self) -> Self {
        self.abs()
    }
}

#[inline]
fn cast<W: Wide, const SIZE: usize>(
    wide: &[u8],
    narrow: &mut [u8],
    loss: &mut Loss,
    read: impl Fn([u8; SIZE]) -> W,
    down: impl Fn(W) -> u16,
    up: impl Fn(u16) -> f32,
) {
    let (wide, narrow) = (wide.as_chunks().0, narrow.as_chunks_mut().0);
    for (from, to) in wide.iter().zip(&mut *narrow) {
        *to = down(read(*from)).to_le_bytes();
    }
    let (zero, one, infinity) = (W::from(0.0), W::from(1.0), W::from(f32::INFINITY));
    let (mut max_abs, mut max_rel) = ([zero; LANES], [zero; LANES]);
    let (mut infinite, mut zeros) = ([0u32; LANES], [0u32; LANES]);
    let mut compare = |wide: &[[u8; SIZE]; LANES], narrow: &[[u8; 2]; LANES]| {
        for lane in 0..LANES {
            let (value, back) = (read(wide[lane]), W::from(up(u16::from_le_bytes(narrow[lane]))));
            let (size, error) = (value.abs(), (value - back).abs());
            let error = if error < infinity { error } else { zero }; // something was not finite, or is not any more
            let relative = error / if size > zero { size } else { one };
            max_abs[lane] = if error > max_abs[lane] { error } else { max_abs[lane] };
            max_rel[lane] = if relative > max_rel[lane] { relative } else { max_rel[lane] };
            infinite[lane] = infinite[lane].wrapping_add(u32::from((size < infinity) & (back.abs() == infinity)));
            zeros[lane] = zeros[lane].wrapping_add(u32::from((back == zero) & (value != zero)));
        }
    };
    let (rows, rest) = wide.as_chunks();
    let (narrow_rows, narrow_rest) = narrow.as_chunks();
    rows.iter().zip(narrow_rows).for_each(|(wide, narrow)| compare(wide, narrow));
    let (mut last, mut narrow_last) = ([[0; SIZE]; LANES], [[0; 2]; LANES]); // zeros cost nothing
    last[..rest.len()].copy_from_slice(rest);
    narrow_last[..rest.len()].copy_from_slice(narrow_rest);
    compare(&last, &narrow_last);
    loss.max_abs = max_abs.into_iter().map(Into::into).fold(loss.max_abs, f64::max);
    loss.max_rel = max_rel.into_iter().map(Into::into).fold(loss.max_rel, f64::max);
    loss.infinite += infinite.into_iter().map(u64::from).sum::<u64>();
    loss.zeros += zeros.into_iter().map(u64::from).sum::<u64>();
}

/// The bits of the nearest `float16`. Without branches, and with sums that may wrap where they are not chosen.
#[inline]
fn f16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // NaN keeps the upper bits of its payload, unless they are those of infinity.
    let nan = 0x7c00 | (magnitude >> 13 & 0x3ff).max(1);
    // The bias of the exponent differs.
    let normal = magnitude.wrapping_sub(0x3800_0000).wrapping_add(0x0fff + (magnitude >> 13 & 1)) >> 13;
    // A multiple of 2^-24, which is the last bit of 0.5: the addition rounds to it.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let half = if magnitude < 0x3880_0000 { subnormal } else { normal }; // 2^-14
    let half = if magnitude < 0x4780_0000 { half } else { 0x7c00 }; // 2^16
    let half = if magnitude > 0x7f80_0000 { nan } else { half };
    (bits >> 16) as u16 & 0x8000 | half as u16
}

#[inline]
fn f16_value(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let subnormal = (f32::from(bits & 0x7fff) * f32::from_bits(0x3380_0000)).to_bits(); // 2^-24
    let value = if magnitude < 0x400 { subnormal } else { (magnitude << 13).wrapping_add(0x3800_0000) };
    let value = if magnitude < 0x7c00 { value } else { magnitude << 13 | 0x7f80_0000 };
    f32::from_bits(u32::from(bits & 0x8000) << 16 | value)
}

/// The bits of the nearest bfloat16; of a NaN its sign only.
#[inline]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let nan = (bits >> 16) as u16 & 0x8000 | 0x7fc0;
    if x.is_nan() { nan } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

#[inline]
fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The `f32` below, in magnitude, of what is none, with its last bit set: rounding that again is as rounding once.
#[inline]
fn round_to_odd(x: f64) -> f32 {
    let near = x as f32;
    let (size, found) = (x.abs(), f64::from(near).abs());
    let inexact = (found < size) | (found > size); // and a number
    if inexact { f32::from_bits((near.to_bits() - u32::from(found > size)) | 1) } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrowed(values: &[f32], to: DType) -> (Vec<u16>, Loss) {
        let wide: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut bits = Vec::new();
        let put = |part: &[u8]| {
            bits.extend(part.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)));
            Ok::<(), ()>(())
        };
        let loss = Cast::between(DType::F32, to).unwrap().each_block(&wide, put).unwrap();
        (bits, loss)
    }

    /// The rest is compared with NumPy in `tests/saving/test_cast.py`.
    #[test]
    fn ties_go_to_the_even_one_and_limits_are_met() {
        let half = |x| narrowed(&[x], DType::F16).0[0];
        assert_eq!([1.0, -2.0, 65504.0, 65519.996, 65520.0].map(half), [0x3c00, 0xc000, 0x7bff, 0x7bff, 0x7c00]);
        let unit = 2f32.powi(-24);
        assert_eq!([0.5, 0.500_000_06, 1.0, 1.5, 2.5, 1023.5].map(|n| half(n * unit)), [0, 1, 1, 2, 2, 0x400]);
        assert_eq!([1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11)].map(half), [0x3c00, 0x3c02]);
        let brain = |x| narrowed(&[x], DType::Opaque(2)).0[0];
        assert_eq!([1.0 + 2f32.powi(-8), f32::MAX, -0.0, f32::NAN].map(brain), [0x3f80, 0x7f80, 0x8000, 0x7fc0]);
        for bits in 0..=u16::MAX {
            let value = f16_value(bits);
            assert!(value.is_nan() || f16_bits(value) == bits);
        }
    }

    #[test]
    fn losses_are_those_of_all_blocks() {
        let mut values = vec![1.0; 3 * BLOCK + 5];
        values[1] = 1e6;
        values[BLOCK] = 1e-9;
        values[2 * BLOCK + 7] = 1000.25;
        values[3 * BLOCK + 4] = f32::INFINITY;
        values[9] = f32::NAN;
        let (bits, loss) = narrowed(&values, DType::F16);
        assert_eq!(bits.len(), values.len());
        assert_eq!(loss, Loss { infinite: 1, zeros: 1, max_abs: 0.25, max_rel: 1.0 });
        assert_eq!(Cast::between(DType::F16, DType::F16), None);
        assert_eq!(Cast::between(DType::I32, DType::F16), None);
    }
}
