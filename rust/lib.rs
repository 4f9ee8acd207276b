//! The core of hornbeam: Keras model files, written and read in one pass over the bytes. Knows no Python; everything
//! that does is in `py/`, behind the feature `python`.
//!
//! ```text
//! save   model ──walk──▶ entries ──view──▶ (path, dtype, shape, bytes)              Python
//!        tree ──image: lay out──▶ layout ──io/emit──▶ temporary file ──commit──▶ file    here
//!        config ──json: encode──▶ JSON ──archive/write──┘
//!
//! load   file ──archive/read──▶ members ──json: decode──▶ model                      here, then Python
//!              └──image: index──▶ extents ──io/fetch──▶ aligned buffers ──▶ variables
//! ```
//!
//! The map in CONTRIBUTING.md has the test and the benchmark of each. [`limits`] holds every limit, [`error`] the one error.

const _: () = assert!(usize::BITS == 64, "tensors are addressed with 64 bits");
const _: () = assert!(cfg!(target_endian = "little"), "tensors are written as they lie in memory");

pub mod archive;
pub mod commit;
pub mod dtype;
pub mod error;
pub mod image;
pub mod io;
pub mod json;
pub mod limits;
pub mod load;
#[cfg(feature = "python")]
mod py;
pub mod save;
pub mod tree;
