//! What both engines make of HDF5's datatypes: elements that are read, and names for those that nobody reads.

use crate::dtype::{Class, DType};

/// The type of a dataset's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) dtype: DType,
    /// How many bytes to reverse at a time; 1 where they lie as in memory.
    pub(super) swap: usize,
    /// HDF5's own bfloat16, which h5py knows as opaque bytes.
    pub(super) bfloat16: bool,
}

impl Element {
    /// Little-endian elements.
    pub(super) fn native(dtype: DType) -> Self {
        Self { dtype, swap: 1, bfloat16: false }
    }

    /// An integer that uses all bits of its `size` bytes.
    pub(super) fn integer(size: usize, signed: bool, big_endian: bool) -> Option<Self> {
        named(Class::Integer { signed }, size).map(|dtype| Self::number(dtype, size, big_endian, false))
    }

    /// An IEEE float: the sign is the highest bit, the exponent's bits follow it, the mantissa's first bit is implied.
    pub(super) fn float(size: usize, exponent: u8, mantissa: u8, bias: u32, big_endian: bool) -> Option<Self> {
        let bfloat16 = (size, exponent, mantissa, bias) == (2, 8, 7, 127);
        let found = if bfloat16 { Some(DType::Opaque(2)) } else { named(Class::Float(exponent, mantissa, bias), size) };
        found.map(|dtype| Self::number(dtype, size, big_endian, bfloat16))
    }

    /// A pair of equal floats, the real part first.
    pub(super) fn complex(part: Self, size: usize) -> Option<Self> {
        let is_pair = |d: &DType| matches!(d.class(), Class::Complex(p) if *p == part.dtype) && d.size() == size;
        DType::named().find(is_pair).map(|dtype| Self { dtype, ..part })
    }

    fn number(dtype: DType, size: usize, big_endian: bool, bfloat16: bool) -> Self {
        Self { dtype, swap: if big_endian { size } else { 1 }, bfloat16 }
    }
}

fn named(class: Class, size: usize) -> Option<DType> {
    DType::named().find(|d| d.class() == class && d.size() == size)
}

/// What elements of a class (§IV.A.2.d, `H5T_class_t`) are called where they are not read.
pub(super) const UNREADABLE: [&str; 11] = [
    "integers of an unusual layout",
    "floats of an unusual layout",
    "times",
    "strings",
    "bit fields",
    "opaque values of this size",
    "structures (a compound type)",
    "references",
    "an enumeration",
    "rows of variable length",
    "arrays as elements",
];

/// Why a dataset with a null dataspace is not read.
pub(super) const NO_VALUES: &str = "it has no values (a null dataspace)";
