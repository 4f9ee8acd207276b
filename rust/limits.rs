//! Every limit on what a file may ask for, in one place. Exceeding one is `Kind::Limit`, before anything is allocated.

use crate::error::{Error, Kind, Result};

/// HDF5's own limit on dimensions (`H5S_MAX_RANK`).
pub const MAX_RANK: usize = 32;
/// Bytes of a path inside a weights image.
pub const MAX_PATH_BYTES: usize = 16 << 10;
/// Nesting of groups.
pub const MAX_DEPTH: usize = 200;
/// Bytes of an attribute name.
pub const MAX_ATTRIBUTE_NAME_BYTES: usize = 1 << 10;
/// Bytes of all tensors of an image: sums with offsets, paddings and headers stay far below 64 bits.
pub const MAX_IMAGE_BYTES: u64 = 1 << 60;
/// Bytes of an object header message: its size is 16 bits, and a multiple of 8.
pub const MAX_MESSAGE_BYTES: usize = 0xfff8;
/// Bytes of an attribute's value in an object header: what Keras splits at.
pub const MAX_ATTRIBUTE_BYTES: usize = 64_512;
/// Groups and datasets in one image.
pub const MAX_OBJECTS: usize = 4_000_000;
/// Bytes of one object header chunk or local heap.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
/// What the values of all attributes of an image may take in memory.
pub const MAX_ATTRIBUTES_BYTES: u64 = 256 << 20;
/// What an index may take in memory, as a multiple of the bytes of its image, beside `INDEX_FLOOR_BYTES`. Where everything
/// is in the image once, rows of strings of one byte take the most: 41 times.
pub const MAX_INDEX_EXPANSION: u64 = 48;
/// What an index may take in memory, however small its image is.
pub const INDEX_FLOOR_BYTES: u64 = 8 << 20;
/// Attributes of one object, where the HDF5 library looks for each of them from the start.
pub const MAX_ATTRIBUTES: usize = 10_000;
/// Chunks of one object header.
pub const MAX_CONTINUATIONS: usize = 4096;
/// Levels of a B-tree.
pub const MAX_BTREE_LEVELS: u8 = 16;
/// What reading the metadata of an image may take, as a multiple of its bytes: in a sound one every structure is there
/// once, and looked at up to three times; a hostile one leads to the same place on many ways.
pub const MAX_METADATA_READS: u64 = 8;
/// Bytes that a chunk takes in an image, with its entry in an index, unless it is smaller itself: so many chunks it has
/// at most.
pub const MIN_CHUNK_BYTES: u64 = 16;
/// Entries of an array of chunks beyond one for every 8 bytes of its image: those of what was never written.
pub const MAX_EMPTY_CHUNKS: u64 = 1 << 20;

/// A compressed weights member is a bomb when it stands for more than `BOMB_FLOOR_BYTES` and this many times what it
/// stores (Keras).
pub const MAX_MEMBER_EXPANSION: u64 = 100;
/// Members of an archive; Python's zipfile writes zip64 from here on.
pub const MAX_MEMBERS: u64 = 1 << 20;
/// Bytes of the central directory.
pub const MAX_DIRECTORY_BYTES: u64 = 1 << 30;
/// Refuses what declares more than `floor` bytes and `most` times as many as it stores.
///
/// # Errors
/// `Limit`.
pub fn check_expansion(declared: u64, stored: u64, floor: u64, most: u64) -> Result<()> {
    if declared <= floor || declared <= stored.saturating_mul(most) {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "Not allowed: refusing to load a potential decompression bomb or shape bomb")
        .with_found(format_args!("{declared} bytes declared"), format_args!("{stored} bytes stored")))
}

/// The same for one dataset.
///
/// # Errors
/// `Limit`.
pub fn check_dataset(declared: u64, stored: u64) -> Result<()> {
    check_expansion(declared, stored, BOMB_FLOOR_BYTES, DATASET_MAX_EXPANSION)
}

/// Only what declares more than this many bytes can be a bomb; Keras' own thresholds for members come from its module.
pub const BOMB_FLOOR_BYTES: u64 = 4 << 30;
/// A dataset is a bomb when it declares more than `BOMB_FLOOR_BYTES` and this many times what it stores (Keras).
pub const DATASET_MAX_EXPANSION: u64 = 1000;
/// Deflate cannot expand more than this. All datasets that a load has to decode are a bomb, together, when they declare
/// more than `BOMB_FLOOR_BYTES` and this many times the bytes of their files: then they were never written.
pub const MAX_DEFLATE: u64 = 1032;

/// Bytes of the header of a safetensors file: the reference implementation's own limit.
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;

/// Dimensions of a tensor in a safetensors file: what NumPy and torch can hold.
pub const MAX_SAFETENSORS_RANK: usize = 64;

/// Bytes of a JSON text read from a file.
pub const MAX_JSON_BYTES: u64 = 1 << 30;
/// Nesting of a JSON text read from a file; real models stay below 60.
pub const MAX_JSON_DEPTH: usize = 1000;
