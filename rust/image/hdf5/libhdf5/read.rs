//! Image → index, and the values of the datasets that only this engine can read.

use std::collections::HashMap;
use std::ffi::CStr;

use hdf5_metno_sys as sys;
use sys::h5d::H5D_layout_t;
use sys::h5i::hid_t;
use sys::h5o::H5O_type_t;
use sys::h5p::H5P_CLS_FILE_ACCESS;
use sys::h5t::{H5T_class_t, H5T_norm_t, H5T_order_t, H5T_sign_t};

use super::chunks::{self, Filters, Grid};
use super::driver::Disk;
use super::ffi::{Id, Library, Object, library};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::image::hdf5::element::{Element, NO_VALUES, UNREADABLE};
use crate::image::hdf5::{
    Budget, Subtree, behind_user_block, check_link, check_names, check_path, cycle, direct, link_name, refused,
    string_value, tag_bfloat16, too_deep,
};
use crate::image::{Found, Index, Storage};
use crate::io::ReadAt;
use crate::limits;
use crate::tree::{Attribute, Value};

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
    behind_user_block(image, |image, base| {
        with_image(image, |lib, disk, file| {
            let root = lib.object(lib.open_group(file, "/")?)?;
            let budget = Budget::new(image.len());
            let above = Vec::new();
            let mut walk = Walk { lib, disk, file, image, out: Index::default(), above, known: HashMap::new(), budget };
            walk.out.attributes = walk.attributes(&root)?;
            walk.group(&root, "")?;
            walk.out.finish(base)
        })
    })
}

pub(super) fn read(image: &dyn ReadAt, paths: &[&str], out: &mut [&mut [u8]]) -> Result<()> {
    if paths.len() != out.len() {
        return Err(Error::new(Kind::Internal, "as many buffers as datasets are needed"));
    }
    behind_user_block(image, |image, _| {
        let mut chunked = Vec::new();
        with_image(image, |lib, disk, file| {
            let mut stored = 0u64;
            for (&path, out) in paths.iter().zip(out.iter_mut()) {
                let grid = read_one(lib, disk, file, image.len(), path, out).map_err(|e| e.with_entry(path))?;
                stored = stored.saturating_add(grid.as_ref().map_or(0, Grid::stored));
                if stored > image.len() {
                    return Err(Error::new(Kind::Image, "chunks share bytes of the file").with_entry(path));
                }
                chunked.extend(grid.map(|grid| (path, grid, &mut **out)));
            }
            Ok(())
        })?;
        chunks::decode(image, chunked)
    })
}

/// Fills `out`, unless chunks are to be decoded for that.
fn read_one(lib: &Library, disk: &Disk, file: hid_t, len: u64, path: &str, out: &mut [u8]) -> Result<Option<Grid>> {
    let mut at = lib.object(lib.open_group(file, "/")?)?;
    for part in path.split('/') {
        // Component by component, as `index` came here: no link other than a hard one is followed.
        let link = lib.link(*at.id, part)?;
        check_link(link.kind)?;
        at = lib.follow(file, &link)?;
    }
    if at.kind != H5O_type_t::H5O_TYPE_DATASET {
        return Err(Error::new(Kind::Image, "not a dataset"));
    }
    let d = Dataset::new(lib, disk, *at.id, len)?.map_err(|reason| Error::new(Kind::Unsupported, reason))?;
    if d.nbytes != out.len() as u64 {
        return Err(Error::new(Kind::Invalid, "buffer is not of the dataset's size").with_found(d.nbytes, out.len()));
    }
    if d.nbytes == 0 {
        return Ok(None);
    }
    if d.layout == H5D_layout_t::H5D_CHUNKED as usize
        && let Some(grid) = Grid::new(lib, len, *at.id, *d.list, *d.dtype, &d.shape, d.element.swap)?
    {
        return Ok(Some(grid));
    }
    lib.read_all(*at.id, *d.dtype, out)?;
    chunks::swap(out, d.element.swap);
    Ok(None)
}

struct Walk<'l> {
    lib: &'l Library,
    disk: &'l Disk<'l>,
    file: hid_t,
    image: &'l dyn ReadAt,
    out: Index,
    above: Vec<[u8; 16]>,              // the groups on the way here
    known: HashMap<[u8; 16], Subtree>, // what was walked
    budget: Budget,
}

impl Walk<'_> {
    fn group(&mut self, group: &Object, path: &str) -> Result<()> {
        let here = |e: Error| if path.is_empty() { e } else { e.with_entry(path) };
        if self.above.contains(&group.token) {
            return Err(here(cycle()));
        }
        if self.above.len() > limits::MAX_DEPTH {
            return Err(too_deep(path));
        }
        let (groups, datasets) = self.out.sizes();
        // A link takes more than 8 bytes, whatever group it is of.
        let most = limits::MAX_OBJECTS.saturating_sub(groups + datasets).min(self.image.len() as usize / 8);
        let mut links = self.lib.links(*group.id, most, &mut self.budget).map_err(here)?;
        if !self.lib.is_symbol_table(*group.id)? {
            links.sort_unstable_by(|a, b| a.name.cmp(&b.name)); // they come as they are stored
        }
        check_names(links.iter().map(|link| &link.name[..])).map_err(here)?;
        self.above.push(group.token);
        for link in links {
            let child = match link_name(&link.name).map_err(here)? {
                name if path.is_empty() => name.to_owned(),
                name => format!("{path}/{name}"),
            };
            check_path(&child).map_err(here)?;
            let object = check_link(link.kind).and_then(|()| self.lib.follow(self.file, &link));
            self.object(&object.map_err(|e| e.with_entry(&child))?, &child).map_err(|e| e.with_entry(&child))?;
        }
        self.above.pop();
        Ok(())
    }

    fn object(&mut self, object: &Object, path: &str) -> Result<()> {
        if let Some(known) = self.known.get(&object.token) {
            return self.out.list_again(known, path, &mut self.budget);
        }
        let before = self.out.sizes();
        match object.kind {
            H5O_type_t::H5O_TYPE_GROUP => {
                let attributes = self.attributes(object)?;
                self.out.add_group(path.to_owned(), attributes, &mut self.budget)?;
                self.group(object, path)?;
            }
            H5O_type_t::H5O_TYPE_DATASET => {
                let found = self.dataset(object, path)?;
                self.out.add_dataset(found, &mut self.budget)?;
            }
            H5O_type_t::H5O_TYPE_NAMED_DATATYPE => return Ok(()), // for datasets to share
            _ => return Err(Error::new(Kind::Unsupported, "neither a group nor a dataset")),
        }
        if object.links > 1 {
            self.budget.spend(2 * size_of::<([u8; 16], Subtree)>())?;
            self.known.insert(object.token, self.out.subtree(path.len(), before));
        }
        Ok(())
    }

    fn dataset(&mut self, object: &Object, path: &str) -> Result<Found> {
        let len = self.image.len();
        let path = path.to_owned();
        let address = u64::from_le_bytes(object.token[..8].try_into().expect("eight bytes"));
        let mut attributes = self.attributes(object)?;
        let readable = match Dataset::new(self.lib, self.disk, *object.id, len)? {
            Ok(d) => match d.storage(self.lib, *object.id, len)? {
                Storage::Unreadable(reason) => Err(reason),
                storage => Ok((d, storage)),
            },
            Err(reason) => Err(reason.into()),
        };
        let (d, storage) = match readable {
            Ok(found) => found,
            Err(reason) => {
                let shape = self.lib.shape(*object.id)?;
                return Ok(Found::unreadable(path, shape, reason, attributes, address));
            }
        };
        if d.element.bfloat16 {
            tag_bfloat16(&mut attributes);
        }
        let (dtype, shape, nbytes) = (d.element.dtype, d.shape, d.nbytes);
        Ok(Found { path, dtype, shape, nbytes, storage, attributes, object: address })
    }

    fn attributes(&mut self, object: &Object) -> Result<Vec<Attribute>> {
        let mut kept = Vec::new();
        if object.attributes == 0 {
            return Ok(kept);
        }
        for name in self.lib.attribute_names(*object.id, limits::MAX_ATTRIBUTES, &mut self.budget)? {
            if name.count_bytes() > limits::MAX_ATTRIBUTE_NAME_BYTES {
                return Err(Error::new(Kind::Limit, "attribute name is too long"));
            }
            let value = self.value(object, &name)?;
            kept.extend(value.and_then(|v| Some((name.into_string().ok()?, v))));
        }
        Ok(kept)
    }

    fn value(&mut self, object: &Object, name: &CStr) -> Result<Option<Value>> {
        let attribute = self.lib.attribute(*object.id, name)?;
        let Some(count) = attribute.count() else { return Ok(None) };
        let row = attribute.shape.as_ref().is_some_and(|shape| !shape.is_empty());
        if count == 0 {
            return Ok(Some(Value::List(Vec::new())));
        }
        if !attribute.string {
            return Ok(None);
        }
        let (strings, length) = if attribute.variable {
            // Every element may be one and the same long string: the library would allocate it many times.
            let most = (count as u64).checked_mul(self.image.len()).filter(|&n| n <= self.budget.for_values());
            if row && most.is_none() {
                return self.row_in_header(object, name).map(Some);
            }
            let strings = self.lib.read_strings(&attribute, count)?;
            self.budget.spend_value(count, strings.iter().map(Vec::len).sum())?;
            (strings, None)
        } else {
            let size = self.lib.H5Tget_size(attribute.dtype())?;
            self.budget.spend_value(count, count.saturating_mul(size))?;
            (self.lib.read_fixed(&attribute, count, size)?, Some(size))
        };
        Ok(Some(string_value(strings, row, attribute.utf8, length)))
    }

    /// A row of variable-length strings, read from the object header by the engine that counts before it allocates.
    fn row_in_header(&mut self, object: &Object, name: &CStr) -> Result<Value> {
        let address = u64::from_le_bytes(object.token[..8].try_into().expect("eight bytes"));
        let found = direct::object::attributes(self.image, address, self.budget)?;
        let (_, value) = found
            .into_iter()
            .find(|(other, _)| other.as_bytes() == name.to_bytes())
            .ok_or_else(|| Error::new(Kind::Limit, "attribute is too large"))?;
        let (pieces, bytes) = value.extent();
        self.budget.spend_value(pieces, bytes)?;
        Ok(value)
    }
}

/// What the header of a dataset says; nothing refused is left.
struct Dataset<'l> {
    list: Id<'l>,
    dtype: Id<'l>,
    element: Element,
    shape: Vec<u64>,
    nbytes: u64,
    layout: usize,
    stored: u64,
}

impl<'l> Dataset<'l> {
    /// The inner error says why nobody reads a dataset like this.
    fn new(lib: &'l Library, disk: &Disk, id: hid_t, len: u64) -> Result<std::result::Result<Self, String>> {
        // Storage first: asking a virtual dataset for its shape would open its sources.
        let list = lib.H5Dget_create_plist(id)?;
        let layout = lib.H5Pget_layout(*list)?;
        if layout == H5D_layout_t::H5D_VIRTUAL as usize {
            return Err(refused("virtual Dataset"));
        }
        if lib.H5Pget_external_count(*list)? > 0 {
            return Err(refused("external Dataset"));
        }
        let dtype = lib.H5Dget_type(id)?;
        let Some(element) = element(lib, *dtype)? else {
            return Ok(Err(described(lib, *dtype)?));
        };
        let space = lib.H5Dget_space(id)?;
        let Some(shape) = lib.dimensions(*space)? else { return Ok(Err(NO_VALUES.into())) };
        disk.expect_rank(shape.len());
        let chunked = layout == H5D_layout_t::H5D_CHUNKED as usize;
        // It stores no more than the whole file; where its chunks must be counted to know, that has to be too little.
        let mut stored = if chunked { len } else { (lib.H5Dget_storage_size(id)? as u64).min(len) };
        let nbytes = element.dtype.nbytes(&shape).filter(|&n| i64::try_from(n).is_ok());
        let nbytes =
            nbytes.ok_or_else(|| Error::new(Kind::Limit, format!("size of a dataset overflows: {shape:?}")))?;
        limits::check_dataset(nbytes, stored)?;
        if chunked && nbytes > limits::BOMB_FLOOR_BYTES {
            stored = 0;
            chunks::written(lib, len, id, *list, lib.H5Tget_size(*dtype)?, &shape, |chunk| {
                stored = chunk.size.saturating_add(stored).min(len);
                Ok(())
            })?;
            limits::check_dataset(nbytes, stored)?;
        }
        Ok(Ok(Self { list, dtype, element, shape, nbytes, layout, stored }))
    }

    fn storage(&self, lib: &Library, id: hid_t, len: u64) -> Result<Storage> {
        let fill = || lib.fill_value(*self.list, *self.dtype);
        if self.nbytes == 0 {
            return Ok(Storage::Empty);
        }
        if self.layout == H5D_layout_t::H5D_COMPACT as usize {
            if self.nbytes > self.stored {
                return Err(Error::new(Kind::Image, "compact dataset is larger than what is stored"));
            }
            let mut bytes = vec![0; self.nbytes as usize]; // below 64 KiB
            lib.read_all(id, *self.dtype, &mut bytes)?;
            chunks::swap(&mut bytes, self.element.swap);
            return Ok(Storage::Compact(bytes));
        }
        if self.layout == H5D_layout_t::H5D_CHUNKED as usize {
            if let Filters::Unknown(ids) = chunks::filters(lib, *self.list)? {
                let reason = format!("it is compressed with a filter that is unknown here ({ids:?})");
                return Ok(Storage::Unreadable(reason.into()));
            }
            chunks::cells(lib, *self.list, self.element.dtype.size(), &self.shape)?;
            let mut empty = true;
            let (chunk, _) = lib.chunk_shape(*self.list)?;
            lib.chunks(id, &self.shape, &chunk, &mut |_| {
                empty = false;
                false
            })?;
            return Ok(if empty && fill()?.is_none() { Storage::Empty } else { Storage::Engine });
        }
        let Ok(offset) = lib.H5Dget_offset(id) else {
            return Ok(if fill()?.is_none() { Storage::Empty } else { Storage::Engine });
        };
        let offset = offset as u64;
        if offset.checked_add(self.nbytes).is_none_or(|end| end > len) {
            return Err(Error::new(Kind::Image, "dataset lies outside of the file")
                .with_found(format_args!("{} bytes at {offset}", self.nbytes), format_args!("{len} bytes in all")));
        }
        Ok(if self.element.swap > 1 { Storage::Engine } else { Storage::Contiguous(offset) })
    }
}

/// What a type that nobody reads is called.
fn described(lib: &Library, dtype: hid_t) -> Result<String> {
    let (class, size) = (lib.H5Tget_class(dtype)?, lib.H5Tget_size(dtype)?);
    let name = UNREADABLE.get(class).copied();
    Ok(name.map_or_else(|| format!("a datatype of class {class} and {size} bytes"), str::to_owned))
}

/// `None` for what is no number.
fn element(lib: &Library, dtype: hid_t) -> Result<Option<Element>> {
    let class = lib.H5Tget_class(dtype)?;
    let size = lib.H5Tget_size(dtype)?;
    let is = |wanted: H5T_class_t| class == wanted as usize;
    if is(H5T_class_t::H5T_OPAQUE) {
        let dtype = u16::try_from(size).ok().filter(|&n| n > 0).map(DType::Opaque);
        return Ok(dtype.map(Element::native));
    }
    if is(H5T_class_t::H5T_ENUM) {
        let names = ["FALSE", "TRUE"];
        let mut boolean = size == 1 && lib.H5Tget_nmembers(dtype)? == 2;
        for i in 0..2 {
            boolean = boolean && lib.value(dtype, i)? == i as u8 && lib.member_name(dtype, i)? == names[i as usize];
        }
        return Ok(boolean.then_some(Element::native(DType::Bool)));
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
            if !pair {
                return Ok(None);
            }
            let (real, imaginary) = (lib.H5Tget_member_type(dtype, 0)?, lib.H5Tget_member_type(dtype, 1)?);
            let (a, b) = (number(lib, *real)?, number(lib, *imaginary)?);
            if a.is_none() || a != b {
                return Ok(None);
            }
            real
        };
        return Ok(number(lib, *part)?.and_then(|part| Element::complex(part, size)));
    }
    number(lib, dtype)
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
    if class == H5T_class_t::H5T_INTEGER as usize {
        let signed = lib.H5Tget_sign(dtype)? == H5T_sign_t::H5T_SGN_2 as usize;
        return Ok(Element::integer(size, signed, big));
    }
    let [sign, exponent_at, exponent, mantissa_at, mantissa] = lib.float_fields(dtype)?;
    let implied = lib.H5Tget_norm(dtype)? == H5T_norm_t::H5T_NORM_IMPLIED as usize;
    if !implied || sign != size * 8 - 1 || exponent_at != mantissa || mantissa_at != 0 {
        return Ok(None);
    }
    Ok(Element::float(size, exponent as u8, mantissa as u8, lib.H5Tget_ebias(dtype)? as u32, big))
}
