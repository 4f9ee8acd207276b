//! The one dtype table: Keras/NumPy name ↔ size ↔ HDF5 encoding. Nothing else in the crate names a dtype.

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 half precision.
    F16,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 64-bit integer.
    U64,
    /// One byte, 0 or 1; in HDF5 the enumeration `{FALSE, TRUE}` over int8, as h5py writes it.
    Bool,
    /// Two `f32`: real, imaginary; in HDF5 the compound `{r, i}`, as h5py writes it.
    C64,
    /// Two `f64`: real, imaginary.
    C128,
    /// Bytes without a meaning HDF5 knows: bfloat16 (2, with the attribute `dtype`), float8 (1), as h5py writes them.
    Opaque(u16),
}

/// How HDF5 describes a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Two's complement or unsigned integer.
    Integer {
        /// Has a sign bit.
        signed: bool,
    },
    /// IEEE float: `(exponent bits, mantissa bits, exponent bias)`; the sign is the top bit.
    Float(u8, u8, u32),
    /// See [`DType::Bool`].
    Boolean,
    /// Pair of the given float.
    Complex(&'static DType),
    /// See [`DType::Opaque`].
    Opaque,
}

use DType::{Bool, C64, C128, F16, F32, F64, I8, I16, I32, I64, Opaque, U8, U16, U32, U64};

/// `(dtype, NumPy name, bytes, class)`; `Opaque` is computed.
const TABLE: [(DType, &str, usize, Class); 14] = [
    (F16, "float16", 2, Class::Float(5, 10, 15)),
    (F32, "float32", 4, Class::Float(8, 23, 127)),
    (F64, "float64", 8, Class::Float(11, 52, 1023)),
    (I8, "int8", 1, Class::Integer { signed: true }),
    (I16, "int16", 2, Class::Integer { signed: true }),
    (I32, "int32", 4, Class::Integer { signed: true }),
    (I64, "int64", 8, Class::Integer { signed: true }),
    (U8, "uint8", 1, Class::Integer { signed: false }),
    (U16, "uint16", 2, Class::Integer { signed: false }),
    (U32, "uint32", 4, Class::Integer { signed: false }),
    (U64, "uint64", 8, Class::Integer { signed: false }),
    (Bool, "bool", 1, Class::Boolean),
    (C64, "complex64", 8, Class::Complex(&F32)),
    (C128, "complex128", 16, Class::Complex(&F64)),
];

/// `(name in safetensors, dtype, NumPy name of what is opaque)`; types of less than a byte are not there.
const SAFETENSORS: [(&str, DType, Option<&str>); 19] = [
    ("BOOL", Bool, None),
    ("U8", U8, None),
    ("I8", I8, None),
    ("F8_E5M2", Opaque(1), Some("float8_e5m2")),
    ("F8_E4M3", Opaque(1), Some("float8_e4m3fn")),
    ("F8_E8M0", Opaque(1), Some("float8_e8m0fnu")),
    ("F8_E4M3FNUZ", Opaque(1), Some("float8_e4m3fnuz")),
    ("F8_E5M2FNUZ", Opaque(1), Some("float8_e5m2fnuz")),
    ("I16", I16, None),
    ("U16", U16, None),
    ("F16", F16, None),
    ("BF16", Opaque(2), Some("bfloat16")),
    ("I32", I32, None),
    ("U32", U32, None),
    ("F32", F32, None),
    ("C64", C64, None),
    ("F64", F64, None),
    ("I64", I64, None),
    ("U64", U64, None),
];

impl DType {
    /// From the name in a safetensors file, with the NumPy name where HDF5 knows only opaque bytes.
    pub fn from_safetensors(name: &str) -> Option<(Self, Option<&'static str>)> {
        SAFETENSORS.iter().find(|row| row.0 == name).map(|row| (row.1, row.2))
    }

    /// The name in a safetensors file; `tag` is the NumPy name of what is opaque. `None` where the format has none.
    pub fn to_safetensors(self, tag: Option<&str>) -> Option<&'static str> {
        let same = |row: &&(&str, Self, Option<&str>)| row.1 == self && (row.2.is_none() || row.2 == tag);
        SAFETENSORS.iter().find(same).map(|row| row.0)
    }

    /// Every dtype with a name of its own.
    pub fn named() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// From the NumPy name; `V{n}` is `n` opaque bytes. `None` for anything else (strings, objects, datetimes).
    pub fn from_name(name: &str) -> Option<Self> {
        if let Some(n) = name.strip_prefix('V') {
            return n.parse().ok().filter(|&n| n > 0).map(Opaque);
        }
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The NumPy name.
    pub fn name(self) -> std::borrow::Cow<'static, str> {
        match self {
            Opaque(n) => format!("V{n}").into(),
            _ => self.row().1.into(),
        }
    }

    /// Bytes an element takes, in memory and in the file.
    pub fn size(self) -> usize {
        match self {
            Opaque(n) => usize::from(n),
            _ => self.row().2,
        }
    }

    /// How HDF5 describes it.
    pub fn class(self) -> Class {
        match self {
            Opaque(_) => Class::Opaque,
            _ => self.row().3,
        }
    }

    fn row(self) -> &'static (DType, &'static str, usize, Class) {
        TABLE.iter().find(|row| row.0 == self).expect("every named dtype is in the table")
    }

    /// Bytes of a tensor of this dtype, or `None` where they overflow.
    pub fn nbytes(self, shape: &[u64]) -> Option<u64> {
        shape.iter().try_fold(self.size() as u64, |n, &d| n.checked_mul(d))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for d in DType::named().chain([Opaque(1), Opaque(2)]) {
            assert_eq!(DType::from_name(&d.name()), Some(d));
        }
        for bad in ["", "V", "V0", "V70000", "object", "str32", "Vx"] {
            assert_eq!(DType::from_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_overflow_to_none() {
        assert_eq!(F32.nbytes(&[2, 3]), Some(24));
        assert_eq!(F32.nbytes(&[]), Some(4));
        assert_eq!(F64.nbytes(&[1 << 40, 0]), Some(0));
        assert_eq!(F64.nbytes(&[1 << 40, 1 << 40]), None);
    }
}
