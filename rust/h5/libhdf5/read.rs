//! Image → index, and the values of the datasets that only this engine can read.

use std::collections::HashSet;
use std::ffi::CStr;

use hdf5_metno_sys as sys;
use sys::h5d::H5D_layout_t;
use sys::h5i::hid_t;
use sys::h5o::H5O_type_t;
use sys::h5p::H5P_CLS_FILE_ACCESS;
use sys::h5t::{H5T_class_t, H5T_norm_t, H5T_order_t, H5T_sign_t};

use super::chunks::{self, Grid};
use super::driver::Disk;
use super::ffi::{Id, Library, Object, library};
use crate::dtype::{Class, DType};
use crate::error::{Error, Kind, Result};
use crate::h5::{Found, Index, Storage};
use crate::io::ReadAt;
use crate::limits;
use crate::tree::Attribute;

/// Opens `image` in the locked library and runs `f` on it. An error of `image` itself wins over what it led to.
fn with_image<T>(image: &dyn ReadAt, f: impl FnOnce(&Library, &Disk, hid_t) -> Result<T>) -> Result<T> {
    let disk = Disk::over(image);
    let result = library(|lib| {
        let fapl = lib.H5Pcreate(*H5P_CLS_FILE_ACCESS)?;
        lib.H5Pset_cache(*fapl, 0, 0, 0, 0.0)?; // chunks are read once
        let file = lib.open(&disk, &fapl, false)?;
        if lib.sizes(*file)? != (8, 8) {
            return Err(Error::new(Kind::Unsupported, "file has addresses of other than 8 bytes"));
        }
        f(lib, &disk, *file)
    });
    result.map_err(|e| disk.take_error().unwrap_or(e))
}

pub(super) fn index(image: &dyn ReadAt) -> Result<Index> {
    with_image(image, |lib, disk, file| {
        let root = lib.object(lib.open_group(file, "/")?)?;
        let mut walk =
            Walk { lib, disk, file, len: image.len(), out: Index::default(), seen: HashSet::new(), room: ROOM };
        walk.seen.insert(root.token);
        walk.out.attributes = walk.attributes(&root)?;
        walk.group(*root.id, "", 1)?;
        Ok(walk.out)
    })
}

pub(super) fn read(image: &dyn ReadAt, paths: &[&str], out: &mut [&mut [u8]]) -> Result<()> {
    if paths.len() != out.len() {
        return Err(Error::new(Kind::Invalid, "as many buffers as datasets are needed"));
    }
    let mut chunked = Vec::new();
    with_image(image, |lib, disk, file| {
        let mut stored = 0u64;
        for (&path, out) in paths.iter().zip(out.iter_mut()) {
            let grid = read_one(lib, disk, file, image.len(), path, out).map_err(|e| e.with_entry(path))?;
            stored = stored.saturating_add(grid.as_ref().map_or(0, Grid::stored));
            if stored > image.len() {
                return Err(Error::new(Kind::Hdf5, "chunks share bytes of the file").with_entry(path));
            }
            chunked.extend(grid.map(|grid| (path, grid, &mut **out)));
        }
        Ok(())
    })?;
    chunks::decode(image, chunked)
}

/// Fills `out`, unless chunks are to be decoded for that.
fn read_one(lib: &Library, disk: &Disk, file: hid_t, len: u64, path: &str, out: &mut [u8]) -> Result<Option<Grid>> {
    let mut at = lib.object(lib.open_group(file, "/")?)?;
    for part in path.split('/') {
        // Component by component, as `index` came here: no link other than a hard one is followed.
        let link = lib.link(*at.id, part)?;
        at = lib.follow(file, &hard(link)?)?;
    }
    if at.kind != H5O_type_t::H5O_TYPE_DATASET {
        return Err(Error::new(Kind::Hdf5, "not a dataset"));
    }
    let d = Dataset::new(lib, disk, *at.id, len)?;
    if d.nbytes != out.len() as u64 {
        return Err(Error::new(Kind::Invalid, "buffer is not of the dataset's size").with_found(d.nbytes, out.len()));
    }
    if d.nbytes == 0 {
        return Ok(None);
    }
    if d.layout == H5D_layout_t::H5D_CHUNKED as usize
        && let Some(grid) = Grid::new(lib, len, *at.id, *d.list, *d.dtype, &d.shape, d.swap)?
    {
        return Ok(Some(grid));
    }
    lib.read_all(*at.id, *d.dtype, out)?;
    chunks::swap(out, d.swap);
    Ok(None)
}

/// Room for the values of all attributes, against a file that points to one long value many times.
const ROOM: u64 = limits::MAX_HEADER_BYTES;

struct Walk<'l> {
    lib: &'l Library,
    disk: &'l Disk<'l>,
    file: hid_t,
    len: u64,
    out: Index,
    seen: HashSet<[u8; 16]>, // groups
    room: u64,
}

impl Walk<'_> {
    fn group(&mut self, group: hid_t, path: &str, depth: usize) -> Result<()> {
        let here = |e: Error| if path.is_empty() { e } else { e.with_entry(path) };
        let objects = self.out.groups.len() + self.out.datasets.len();
        // A link takes more than 8 bytes, whatever group it is of.
        let room = (limits::MAX_OBJECTS - objects).min(self.len as usize / 8);
        let links = self.lib.links(group, room).map_err(here)?;
        if links.len() > room {
            return Err(here(Error::new(Kind::Limit, "too many groups and datasets")));
        }
        if !links.is_sorted_by(|a, b| a.name < b.name) {
            return Err(here(Error::new(Kind::Hdf5, "names of a group are not in order")));
        }
        for link in links {
            let name = String::from_utf8_lossy(&link.name);
            let child = if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
            if child.len() > limits::MAX_PATH_BYTES || depth > limits::MAX_DEPTH {
                return Err(here(Error::new(Kind::Limit, "path is too long or nested too deeply")));
            }
            let plain =
                matches!(name, std::borrow::Cow::Borrowed(n) if !matches!(n, "" | "." | "..") && !n.contains('/'));
            let object = if plain {
                hard(link).and_then(|link| self.lib.follow(self.file, &link))
            } else {
                Err(Error::new(Kind::Hdf5, "link has a name that is not UTF-8 or no part of a path"))
            };
            self.object(&object.map_err(|e| e.with_entry(&child))?, &child, depth).map_err(|e| e.with_entry(&child))?;
        }
        Ok(())
    }

    fn object(&mut self, object: &Object, path: &str, depth: usize) -> Result<()> {
        match object.kind {
            H5O_type_t::H5O_TYPE_GROUP => {
                if !self.seen.insert(object.token) {
                    return Err(Error::new(Kind::Hdf5, "group has two paths, or contains itself"));
                }
                let attributes = self.attributes(object)?;
                self.out.groups.push((path.to_owned(), attributes));
                self.group(*object.id, path, depth + 1)
            }
            H5O_type_t::H5O_TYPE_DATASET => {
                let d = Dataset::new(self.lib, self.disk, *object.id, self.len)?;
                let mut attributes = self.attributes(object)?;
                if d.bfloat16 && !attributes.iter().any(|(name, _)| name == "dtype") {
                    attributes.push(("dtype".into(), "bfloat16".into()));
                }
                let storage = d.storage(self.lib, *object.id, self.len)?;
                let (path, dtype, nbytes) = (path.to_owned(), d.element, d.nbytes);
                self.out.datasets.push(Found { path, dtype, shape: d.shape, nbytes, storage, attributes });
                Ok(())
            }
            _ => Err(Error::new(Kind::Unsupported, "neither a group nor a dataset")),
        }
    }

    fn attributes(&mut self, object: &Object) -> Result<Vec<Attribute>> {
        let mut kept = Vec::new();
        if object.attributes == 0 {
            return Ok(kept);
        }
        for name in self.lib.attribute_names(*object.id, limits::MAX_OBJECTS)? {
            if name.count_bytes() > limits::MAX_ATTRIBUTE_NAME_BYTES {
                return Err(Error::new(Kind::Limit, "attribute name is too long"));
            }
            let value = self.value(*object.id, &name)?;
            kept.extend(value.and_then(|v| Some((name.into_string().ok()?, String::from_utf8(v).ok()?))));
        }
        Ok(kept)
    }

    fn value(&mut self, object: hid_t, name: &CStr) -> Result<Option<Vec<u8>>> {
        let value = self.lib.read_string(object, name, self.room)?;
        let taken = name.count_bytes() + value.as_ref().map_or(0, Vec::len);
        self.room =
            self.room.checked_sub(taken as u64).ok_or_else(|| Error::new(Kind::Limit, "too many attributes"))?;
        Ok(value)
    }
}

/// Refuses every link that is not a hard one.
fn hard(link: super::ffi::Link) -> Result<super::ffi::Link> {
    match link.kind {
        0 => Ok(link),
        1 => Err(Error::new(Kind::Unsafe, "Not allowed: H5 file with SoftLink")),
        64 => Err(Error::new(Kind::Unsafe, "Not allowed: H5 file with ExternalLink")),
        _ => Err(Error::new(Kind::Unsafe, "Not allowed: H5 file with a user-defined link")),
    }
}

/// What the header of a dataset says; nothing refused is left.
struct Dataset<'l> {
    list: Id<'l>,
    dtype: Id<'l>,
    element: DType,
    bfloat16: bool,
    swap: usize,
    shape: Vec<u64>,
    nbytes: u64,
    layout: usize,
    stored: u64,
}

impl<'l> Dataset<'l> {
    fn new(lib: &'l Library, disk: &Disk, id: hid_t, len: u64) -> Result<Self> {
        // Storage first: asking a virtual dataset for its shape would open its sources.
        let list = lib.H5Dget_create_plist(id)?;
        let layout = lib.H5Pget_layout(*list)?;
        if layout == H5D_layout_t::H5D_VIRTUAL as usize {
            return Err(Error::new(Kind::Unsafe, "Not allowed: H5 file with virtual Dataset"));
        }
        if lib.H5Pget_external_count(*list)? > 0 {
            return Err(Error::new(Kind::Unsafe, "Not allowed: H5 file with external Dataset"));
        }
        let dtype = lib.H5Dget_type(id)?;
        let Element { dtype: element, swap, bfloat16 } = element(lib, *dtype)?;
        let space = lib.H5Dget_space(id)?;
        let null = || Error::new(Kind::Unsupported, "dataset has a null dataspace");
        let shape = lib.dimensions(*space)?.ok_or_else(null)?;
        disk.expect_rank(shape.len());
        let chunked = layout == H5D_layout_t::H5D_CHUNKED as usize;
        // It stores no more than the whole file; where its chunks must be counted to know, that has to be too little.
        let mut stored = if chunked { len } else { (lib.H5Dget_storage_size(id)? as u64).min(len) };
        let nbytes = element.nbytes(&shape).filter(|&n| i64::try_from(n).is_ok());
        let nbytes =
            nbytes.ok_or_else(|| Error::new(Kind::Limit, format!("size of a dataset overflows: {shape:?}")))?;
        limits::check_dataset(nbytes, stored)?;
        if chunked && nbytes > limits::BOMB_FLOOR_BYTES {
            let chunks = chunks::written(lib, len, id, *list, lib.H5Tget_size(*dtype)?, &shape)?;
            stored = chunks.iter().map(|c| c.size).fold(0, u64::saturating_add).min(len);
            limits::check_dataset(nbytes, stored)?;
        }
        Ok(Self { list, dtype, element, bfloat16, swap, shape, nbytes, layout, stored })
    }

    fn storage(&self, lib: &Library, id: hid_t, len: u64) -> Result<Storage> {
        let fill = || lib.fill_value(*self.list, *self.dtype);
        if self.nbytes == 0 {
            return Ok(Storage::Empty);
        }
        if self.layout == H5D_layout_t::H5D_COMPACT as usize {
            if self.nbytes > self.stored {
                return Err(Error::new(Kind::Hdf5, "compact dataset is larger than what is stored"));
            }
            let mut bytes = vec![0; self.nbytes as usize];
            lib.read_all(id, *self.dtype, &mut bytes)?;
            chunks::swap(&mut bytes, self.swap);
            return Ok(Storage::Compact(bytes));
        }
        if self.layout == H5D_layout_t::H5D_CHUNKED as usize {
            chunks::filters(lib, *self.list)?; // refuse now rather than in `read`
            chunks::cells(lib, *self.list, self.element.size(), &self.shape)?;
            let empty = lib.chunks(id, self.shape.len(), 0)?.is_empty();
            return Ok(if empty && fill()?.is_none() { Storage::Empty } else { Storage::Engine });
        }
        let Ok(offset) = lib.H5Dget_offset(id) else {
            return Ok(if fill()?.is_none() { Storage::Empty } else { Storage::Engine });
        };
        let offset = offset as u64;
        if offset.checked_add(self.nbytes).is_none_or(|end| end > len) {
            return Err(Error::new(Kind::Hdf5, "dataset lies outside of the file")
                .with_found(format_args!("{} bytes at {offset}", self.nbytes), format_args!("{len} bytes in all")));
        }
        Ok(if self.swap > 1 { Storage::Engine } else { Storage::Contiguous(offset) })
    }
}

/// An element type, how many bytes to reverse at a time (1: none), and whether it is HDF5's own bfloat16.
struct Element {
    dtype: DType,
    swap: usize,
    bfloat16: bool,
}

fn element(lib: &Library, dtype: hid_t) -> Result<Element> {
    let class = lib.H5Tget_class(dtype)?;
    let size = lib.H5Tget_size(dtype)?;
    let unsupported = || Error::new(Kind::Unsupported, format!("datatype of class {class} and {size} bytes"));
    let is = |wanted: H5T_class_t| class == wanted as usize;
    if is(H5T_class_t::H5T_OPAQUE) {
        let dtype = u16::try_from(size).ok().filter(|&n| n > 0).map(DType::Opaque).ok_or_else(unsupported)?;
        return Ok(Element { dtype, swap: 1, bfloat16: false });
    }
    if is(H5T_class_t::H5T_ENUM) {
        let names = ["FALSE", "TRUE"];
        let mut boolean = size == 1 && lib.H5Tget_nmembers(dtype)? == 2;
        for i in 0..2 {
            boolean = boolean && lib.value(dtype, i)? == i as u8 && lib.member_name(dtype, i)? == names[i as usize];
        }
        return if boolean { Ok(Element { dtype: DType::Bool, swap: 1, bfloat16: false }) } else { Err(unsupported()) };
    }
    if is(H5T_class_t::H5T_COMPOUND) || is(H5T_class_t::H5T_COMPLEX) {
        let part = if is(H5T_class_t::H5T_COMPLEX) {
            lib.H5Tget_super(dtype)?
        } else {
            let pair = lib.H5Tget_nmembers(dtype)? == 2
                && lib.member_name(dtype, 0)? == "r"
                && lib.member_name(dtype, 1)? == "i"
                && lib.H5Tget_member_offset(dtype, 0)? == 0
                && lib.H5Tget_member_offset(dtype, 1)? == size / 2;
            let (real, imaginary) = if pair {
                (lib.H5Tget_member_type(dtype, 0)?, lib.H5Tget_member_type(dtype, 1)?)
            } else {
                return Err(unsupported());
            };
            let (a, b) = (number(lib, *real)?, number(lib, *imaginary)?);
            if a.is_none_or(|a| b.is_none_or(|b| (a.dtype, a.swap) != (b.dtype, b.swap))) {
                return Err(unsupported());
            }
            real
        };
        let part = number(lib, *part)?.filter(|part| part.dtype.size() * 2 == size).ok_or_else(unsupported)?;
        let whole = DType::named().find(|d| matches!(d.class(), Class::Complex(p) if *p == part.dtype));
        return Ok(Element { dtype: whole.ok_or_else(unsupported)?, ..part });
    }
    number(lib, dtype)?.ok_or_else(unsupported)
}

/// An integer or float that uses all of its bits as `NumPy` does.
fn number(lib: &Library, dtype: hid_t) -> Result<Option<Element>> {
    let class = lib.H5Tget_class(dtype)?;
    let size = lib.H5Tget_size(dtype)?;
    if class != H5T_class_t::H5T_INTEGER as usize && class != H5T_class_t::H5T_FLOAT as usize {
        return Ok(None);
    }
    let order = lib.H5Tget_order(dtype)?;
    let big = order == H5T_order_t::H5T_ORDER_BE as usize;
    let known = big || order == H5T_order_t::H5T_ORDER_LE as usize;
    if !known || lib.H5Tget_precision(dtype)? != size * 8 || lib.H5Tget_offset(dtype)? != 0 {
        return Ok(None);
    }
    let class = if class == H5T_class_t::H5T_INTEGER as usize {
        Class::Integer { signed: lib.H5Tget_sign(dtype)? == H5T_sign_t::H5T_SGN_2 as usize }
    } else {
        let [sign, exponent_at, exponent, mantissa_at, mantissa] = lib.float_fields(dtype)?;
        let implied = lib.H5Tget_norm(dtype)? == H5T_norm_t::H5T_NORM_IMPLIED as usize;
        if !implied || sign != size * 8 - 1 || exponent_at != mantissa || mantissa_at != 0 {
            return Ok(None);
        }
        Class::Float(exponent as u8, mantissa as u8, lib.H5Tget_ebias(dtype)? as u32)
    };
    let bfloat16 = size == 2 && class == Class::Float(8, 7, 127);
    let found =
        if bfloat16 { Some(DType::Opaque(2)) } else { DType::named().find(|d| d.class() == class && d.size() == size) };
    Ok(found.map(|dtype| Element { dtype, swap: if big { size } else { 1 }, bfloat16 }))
}
