//! Tree → layout: the objects are created in memory exactly as h5py would create them in a file, without payload. Chunks
//! are placed by the library as well, and their bytes kept from it.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use hdf5_metno_sys as sys;
use sys::h5d::{H5D_alloc_time_t, H5D_fill_time_t, H5D_layout_t};
use sys::h5f::H5F_libver_t;
use sys::h5i::hid_t;
use sys::h5p::{H5P_CLS_DATASET_CREATE, H5P_CLS_FILE_ACCESS, H5P_CLS_GROUP_CREATE, H5P_CLS_LINK_CREATE};
use sys::h5t::{self, H5T_class_t, H5T_cset_t};

use super::driver::Disk;
use super::ffi::{Id, Library, OpenFile, VarString};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::image::{ALIGNMENT, Chunked, Compression, Layout};
use crate::tree::{Attribute, Tree, Value};

pub(super) fn lay_out(tree: &Tree) -> Result<Layout> {
    let (file, places) =
        OpenFile::create(|lib| access(lib, tree), |lib, file| Writer::new(lib, file)?.write(tree, &[]))?;
    let offsets: Vec<_> = places.iter().map(Place::offset).collect();
    let extents = extents(tree, &offsets);
    let (metadata, len) = metadata(file.close()?, extents);
    Ok(Layout { metadata, offsets, len })
}

/// How the file is made.
fn access<'l>(lib: &'l Library, tree: &Tree) -> Result<Id<'l>> {
    let fapl = lib.H5Pcreate(*H5P_CLS_FILE_ACCESS)?;
    lib.H5Pset_libver_bounds(*fapl, H5F_libver_t::H5F_LIBVER_EARLIEST, H5F_libver_t::H5F_LIBVER_V200)?;
    lib.H5Pset_alignment(*fapl, ALIGNMENT, ALIGNMENT)?;
    // About what the metadata needs, so that it stays together; what is left of the last block is given back.
    let objects = (tree.groups().len() + tree.datasets().len()) as u64;
    lib.H5Pset_meta_block_size(*fapl, (objects * 512).next_power_of_two().clamp(2 << 10, 1 << 20))?;
    lib.H5Pset_cache(*fapl, 0, 0, 0, 0.0)?; // chunks never pass through the library
    Ok(fapl)
}

/// Where the contiguous datasets are, `(from, to)`.
fn extents(tree: &Tree, offsets: &[Option<u64>]) -> Vec<(u64, u64)> {
    offsets.iter().zip(tree.datasets()).filter_map(|(o, d)| o.map(|o| (o, o + d.nbytes))).collect()
}

/// What the library wrote outside of the extents, and the length of the file.
fn metadata(disk: Disk<'static>, mut extents: Vec<(u64, u64)>) -> (Vec<(u64, Vec<u8>)>, u64) {
    extents.sort_unstable();
    let (pages, len) = disk.into_pages();
    (outside(pages, &extents, len), len)
}

/// A file whose chunks are being placed.
pub(super) struct Placing {
    file: OpenFile,
    places: Vec<Place>,
    layout: Layout,
    extents: Vec<(u64, u64)>,
    last: usize, // the dataset that chunks are placed for
}

impl Placing {
    pub(super) fn new(tree: &Tree, chunks: &[Option<Vec<u64>>], how: Compression) -> Result<Self> {
        let (file, places) = OpenFile::create(
            |lib| access(lib, tree),
            |lib, file| Writer::new(lib, file)?.compressed(how)?.write(tree, chunks),
        )?;
        let offsets: Vec<_> = places.iter().map(Place::offset).collect();
        let extents = extents(tree, &offsets);
        let layout = Layout { metadata: Vec::new(), offsets, len: file.disk().len() };
        Ok(Self { file, places, layout, extents, last: 0 })
    }
}

impl Chunked for Placing {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn place(&mut self, i: usize, start: &[u64], skipped: u32, bytes: &[u8]) -> Result<u64> {
        let Place::Chunks(id) = self.places[i] else {
            return Err(Error::new(Kind::Internal, "this dataset has no chunks"));
        };
        let done = if self.last == i { None } else { Some(&self.places[self.last]) };
        let at = self.file.with(|lib, _| {
            if let Some(&Place::Chunks(id)) = done {
                lib.H5Dclose(id)?;
            }
            lib.place_chunk(self.file.disk(), id, start, skipped, bytes)
        })?;
        self.last = i;
        self.extents.push((at, at + bytes.len() as u64));
        Ok(at)
    }

    fn finish(self: Box<Self>) -> Result<Layout> {
        let (metadata, len) = metadata(self.file.close()?, self.extents);
        Ok(Layout { metadata, offsets: self.layout.offsets, len })
    }
}

/// Where the values of a dataset go.
enum Place {
    Nowhere,
    At(u64),
    /// Into chunks of this dataset, which is open.
    Chunks(hid_t),
}

impl Place {
    fn offset(&self) -> Option<u64> {
        if let Self::At(offset) = self { Some(*offset) } else { None }
    }
}

/// What of the pages lies outside of the (sorted) extents and before `len`, as ranges.
fn outside<const N: usize>(
    pages: impl Iterator<Item = (u64, Box<[u8; N]>)>,
    extents: &[(u64, u64)],
    len: u64,
) -> Vec<(u64, Vec<u8>)> {
    let mut ranges: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut extents = extents.iter().peekable();
    for (start, page) in pages {
        let end = len.min(start + N as u64);
        let mut at = start;
        while at < end {
            let stop = match extents.peek() {
                Some(&&(_, after)) if after <= at => {
                    extents.next();
                    continue;
                }
                Some(&&(before, after)) if before <= at => {
                    at = after;
                    continue;
                }
                Some(&&(before, _)) => end.min(before),
                None => end,
            };
            let bytes = &page[(at - start) as usize..(stop - start) as usize];
            match ranges.last_mut() {
                Some((from, range)) if *from + range.len() as u64 == at => range.extend_from_slice(bytes),
                _ if bytes.iter().all(|&b| b == 0) => {} // padding between two datasets
                _ => ranges.push((at, bytes.to_vec())),
            }
            at = stop;
        }
    }
    ranges
}

/// A file being filled, and what many of its objects share.
struct Writer<'l, 't> {
    lib: &'l Library,
    file: hid_t,
    group_list: Id<'l>,
    dataset_list: Id<'l>,
    chunked_list: Option<Id<'l>>, // all but the shape of the chunks, which is set every time
    utf8_link: Id<'l>,
    text: VarString<'l>,
    bytes: VarString<'l>,
    types: HashMap<DType, Id<'l>>,
    spaces: HashMap<&'t [u64], Id<'l>>,
    made: HashSet<&'t str>,
    open: Vec<(&'t str, Id<'l>)>, // the groups on the way to the last object
}

impl<'l, 't> Writer<'l, 't> {
    fn new(lib: &'l Library, file: hid_t) -> Result<Self> {
        let group_list = lib.H5Pcreate(*H5P_CLS_GROUP_CREATE)?;
        lib.H5Pset_obj_track_times(*group_list, 0)?;
        // Contiguous, placed at once and never filled: the offset is known as soon as the dataset exists.
        let dataset_list = lib.H5Pcreate(*H5P_CLS_DATASET_CREATE)?;
        lib.H5Pset_obj_track_times(*dataset_list, 0)?;
        lib.H5Pset_layout(*dataset_list, H5D_layout_t::H5D_CONTIGUOUS)?;
        lib.H5Pset_alloc_time(*dataset_list, H5D_alloc_time_t::H5D_ALLOC_TIME_EARLY)?;
        lib.H5Pset_fill_time(*dataset_list, H5D_fill_time_t::H5D_FILL_TIME_NEVER)?;
        let utf8_link = lib.H5Pcreate(*H5P_CLS_LINK_CREATE)?;
        lib.H5Pset_char_encoding(*utf8_link, H5T_cset_t::H5T_CSET_UTF8)?;
        let chunked_list = None;
        let text = lib.var_string(H5T_cset_t::H5T_CSET_UTF8)?;
        let bytes = lib.var_string(H5T_cset_t::H5T_CSET_ASCII)?;
        let (types, spaces, made, open) = Default::default();
        Ok(Self {
            lib,
            file,
            group_list,
            dataset_list,
            chunked_list,
            utf8_link,
            text,
            bytes,
            types,
            spaces,
            made,
            open,
        })
    }

    /// Filters as h5py sets them; a chunk that was not written does not exist.
    fn compressed(mut self, how: Compression) -> Result<Self> {
        let list = self.lib.H5Pcreate(*H5P_CLS_DATASET_CREATE)?;
        self.lib.H5Pset_obj_track_times(*list, 0)?;
        self.lib.H5Pset_layout(*list, H5D_layout_t::H5D_CHUNKED)?;
        self.lib.H5Pset_fill_time(*list, H5D_fill_time_t::H5D_FILL_TIME_NEVER)?;
        if how.shuffle {
            self.lib.H5Pset_shuffle(*list)?;
        }
        self.lib.H5Pset_deflate(*list, how.level)?;
        self.chunked_list = Some(list);
        Ok(self)
    }

    /// Creates everything; returns where each dataset is. `chunks` has the shapes of chunks, if there are any.
    fn write(mut self, tree: &'t Tree, chunks: &[Option<Vec<u64>>]) -> Result<Vec<Place>> {
        if !tree.attributes().is_empty() {
            self.attributes(*self.lib.open_group(self.file, "/")?, tree.attributes())?;
        }
        for group in tree.groups() {
            let id = self.group(&group.path).map_err(|e| e.with_entry(&group.path))?;
            self.attributes(id, &group.attributes).map_err(|e| e.with_entry(&group.path))?;
        }
        let mut places = Vec::with_capacity(tree.datasets().len());
        for (i, dataset) in tree.datasets().iter().enumerate() {
            let chunk = chunks.get(i).and_then(Option::as_deref);
            places.push(self.dataset(dataset, chunk).map_err(|e| e.with_entry(&dataset.path))?);
        }
        Ok(places)
    }

    fn dataset(&mut self, d: &'t crate::tree::Dataset, chunk: Option<&[u64]>) -> Result<Place> {
        let lib = self.lib;
        let (parent, name) = d.path.rsplit_once('/').unwrap_or(("", &d.path));
        let group = self.group(parent)?;
        if let Entry::Vacant(new) = self.types.entry(d.dtype) {
            new.insert(file_type(lib, d.dtype)?);
        }
        if let Entry::Vacant(new) = self.spaces.entry(&d.shape) {
            new.insert(lib.create_space(&d.shape)?);
        }
        let (dtype, space) = (*self.types[&d.dtype], *self.spaces[&d.shape[..]]);
        let list = match (chunk, &self.chunked_list) {
            (Some(shape), Some(list)) => {
                lib.set_chunk(**list, shape)?;
                **list
            }
            _ => *self.dataset_list,
        };
        let id = lib.create_dataset(group, name, dtype, space, [self.link_list(name), list])?;
        self.attributes(*id, &d.attributes)?;
        Ok(if d.nbytes == 0 {
            Place::Nowhere
        } else if chunk.is_some() {
            Place::Chunks(id.leave_open())
        } else {
            Place::At(lib.H5Dget_offset(*id)? as u64)
        })
    }

    /// The group at `path`, created if need be.
    fn group(&mut self, path: &'t str) -> Result<hid_t> {
        let below = |group: &str| path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        while self.open.pop_if(|(group, _)| !below(group)).is_some() {}
        loop {
            let (done, at) = self.open.last().map_or((0, self.file), |(group, id)| (group.len() + 1, **id));
            if done > path.len() || path.is_empty() {
                return Ok(at);
            }
            let end = path[done..].find('/').map_or(path.len(), |slash| done + slash);
            let name = &path[done..end];
            let id = if self.made.insert(&path[..end]) {
                self.lib.create_group(at, name, self.link_list(name), *self.group_list)?
            } else {
                self.lib.open_group(at, name)?
            };
            self.open.push((&path[..end], id));
        }
    }

    /// As in h5py only for names that need it: a UTF-8 link turns its group into the new format.
    fn link_list(&self, name: &str) -> hid_t {
        if name.is_ascii() { sys::h5p::H5P_DEFAULT } else { *self.utf8_link }
    }

    fn attributes(&self, id: hid_t, attributes: &[Attribute]) -> Result<()> {
        attributes.iter().try_for_each(|(name, value)| match value {
            Value::Text(text) => self.lib.write_strings(id, name, &self.text, &[text.as_bytes()], false),
            Value::Bytes(bytes) => self.lib.write_strings(id, name, &self.bytes, &[bytes], false),
            Value::List(all) if all.is_empty() => self.lib.write_nothing(id, name),
            Value::List(_) => self.lib.write_strings(id, name, &self.bytes, &value.strings(), true),
            Value::Fixed(length, all) => self.lib.write_fixed(id, name, all, *length),
        })
    }
}

/// The type as h5py stores it.
fn file_type(lib: &Library, dtype: DType) -> Result<Id<'_>> {
    let compound = |part: hid_t| -> Result<Id<'_>> {
        let half = dtype.size() / 2;
        let id = lib.H5Tcreate(H5T_class_t::H5T_COMPOUND, dtype.size())?;
        lib.add_member(*id, c"r", 0, part)?;
        lib.add_member(*id, c"i", half, part)?;
        Ok(id)
    };
    lib.H5Tcopy(match dtype {
        DType::F16 => lib.f16(),
        DType::F32 => *h5t::H5T_IEEE_F32LE,
        DType::F64 => *h5t::H5T_IEEE_F64LE,
        DType::I8 => *h5t::H5T_STD_I8LE,
        DType::I16 => *h5t::H5T_STD_I16LE,
        DType::I32 => *h5t::H5T_STD_I32LE,
        DType::I64 => *h5t::H5T_STD_I64LE,
        DType::U8 => *h5t::H5T_STD_U8LE,
        DType::U16 => *h5t::H5T_STD_U16LE,
        DType::U32 => *h5t::H5T_STD_U32LE,
        DType::U64 => *h5t::H5T_STD_U64LE,
        DType::C64 => return compound(*h5t::H5T_IEEE_F32LE),
        DType::C128 => return compound(*h5t::H5T_IEEE_F64LE),
        DType::Opaque(n) => return lib.H5Tcreate(H5T_class_t::H5T_OPAQUE, n.into()),
        DType::Bool => {
            let id = lib.H5Tenum_create(*h5t::H5T_STD_I8LE)?;
            lib.add_value(*id, c"FALSE", 0)?;
            lib.add_value(*id, c"TRUE", 1)?;
            return Ok(id);
        }
    })
}
