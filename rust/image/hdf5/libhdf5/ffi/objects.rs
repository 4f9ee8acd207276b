//! Links, objects and attributes of a file.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

use sys::h5::{H5_ITER_CONT, H5_index_t, H5_iter_order_t, H5free_memory, herr_t, hsize_t};
use sys::h5a::{H5Aget_space, H5Aget_type, H5Aiterate2, H5Aopen, H5Aread};
use sys::h5g::{H5G_info_t, H5G_storage_type_t, H5Gget_info, H5Gopen2};
use sys::h5i::hid_t;
use sys::h5o::{
    H5O_INFO_BASIC, H5O_INFO_NUM_ATTRS, H5O_info2_t, H5O_token_t, H5O_type_t, H5Oget_info3, H5Oopen_by_token,
};
use sys::h5t::{H5T_class_t, H5T_str_t};

use super::{Id, Library, c_string, check, owned, sys};
use crate::error::{Error, Kind, Result, try_push, try_with_capacity};
use crate::image::hdf5::{ALLOCATION, Budget, string_count, unpadded};

// What the bindings lack or declare wrongly.
// SAFETY: signatures and layouts are those of the headers of HDF5 2.2.0, which is linked statically at that version.
unsafe extern "C" {
    /// Here because `H5L_info2_t` has an `enum` where a hostile file can put any number.
    fn H5Literate2(
        group: hid_t,
        index: c_int,
        order: c_int,
        from: *mut hsize_t,
        f: extern "C" fn(hid_t, *const c_char, *const LinkInfo, *mut c_void) -> herr_t,
        data: *mut c_void,
    ) -> herr_t;
    fn H5Lget_info2(group: hid_t, name: *const c_char, info: *mut LinkInfo, lapl: hid_t) -> herr_t;
}

/// A link of a group: its name, its kind (0 hard, 1 soft, 64 external, more user-defined) and, if hard, its target.
pub(in super::super) struct Link {
    pub(in super::super) name: Vec<u8>,
    pub(in super::super) kind: c_int,
    token: [u8; 16],
}

/// `H5L_info2_t`; the union holds a token or a length.
#[repr(C)]
struct LinkInfo {
    kind: c_int,
    ordered: u8,
    order: i64,
    set: c_int,
    token: Token,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Token([u8; 16]);

/// What an object is.
pub(in super::super) struct Object<'l> {
    pub(in super::super) id: Id<'l>,
    pub(in super::super) kind: H5O_type_t,
    pub(in super::super) attributes: u64,
    /// How many hard links lead to it, as it says.
    pub(in super::super) links: u32,
    /// Identifies the object within its file.
    pub(in super::super) token: [u8; 16],
}

/// What a callback gathers, up to a limit.
struct Gathered<'a, T> {
    items: Vec<T>,
    limit: usize,
    budget: &'a mut Budget,
    failed: Option<Error>,
}

impl<'a, T> Gathered<'a, T> {
    fn new(limit: usize, budget: &'a mut Budget) -> Self {
        Self { items: Vec::new(), limit, budget, failed: None }
    }

    /// Keeps what `make` makes of `name`, if both have room; otherwise the library is to stop.
    fn add(&mut self, name: &CStr, make: impl FnOnce(&CStr) -> T) -> c_int {
        let room = || Error::new(Kind::Limit, "too many links or attributes").with_found(self.limit, "more");
        let kept = if self.items.len() < self.limit { Ok(()) } else { Err(room()) };
        let kept = kept.and_then(|()| self.budget.spend(2 * size_of::<T>() + ALLOCATION + name.count_bytes()));
        match kept.and_then(|()| try_push(&mut self.items, make(name))) {
            Ok(()) => H5_ITER_CONT,
            Err(error) => {
                self.failed = Some(error);
                1
            }
        }
    }

    fn done(self) -> Result<Vec<T>> {
        self.failed.map_or(Ok(self.items), Err)
    }
}

impl Library {
    pub(in super::super) fn open_group(&self, at: hid_t, name: &str) -> Result<Id<'_>> {
        let name = c_string(name)?;
        // SAFETY: lock held; `name` is a C string that outlives the call.
        owned(unsafe { H5Gopen2(at, name.as_ptr(), 0) }, "H5Gopen2")
    }

    /// Links of a group as they are stored, at most `limit`: in another order the library would first gather them itself,
    /// names and all, and a file may have one long name many times.
    pub(in super::super) fn links(&self, group: hid_t, limit: usize, budget: &mut Budget) -> Result<Vec<Link>> {
        extern "C" fn each(_: hid_t, name: *const c_char, info: *const LinkInfo, data: *mut c_void) -> herr_t {
            // SAFETY: the library passes a C string and a record; `data` is the `Gathered` below.
            unsafe {
                let (kind, token) = ((*info).kind, (*info).token.0);
                let make = |name: &CStr| Link { name: name.to_bytes().to_vec(), kind, token };
                (*data.cast::<Gathered<_>>()).add(CStr::from_ptr(name), make)
            }
        }
        let mut all = Gathered::new(limit, budget);
        let (by, order) = (H5_index_t::H5_INDEX_NAME as c_int, H5_iter_order_t::H5_ITER_NATIVE as c_int);
        // SAFETY: lock held; `each` has the callback's type and `all` outlives the call.
        let status = unsafe { H5Literate2(group, by, order, &mut 0, each, (&raw mut all).cast()) };
        check(status.into(), "H5Literate2")?;
        all.done()
    }

    /// Whether the links of a group are in a symbol table, which has to be in order.
    pub(in super::super) fn is_symbol_table(&self, group: hid_t) -> Result<bool> {
        let mut info = std::mem::MaybeUninit::<H5G_info_t>::zeroed();
        // SAFETY: lock held; the library fills the record, whose kind is a number that it computes itself.
        let info = unsafe {
            check(H5Gget_info(group, info.as_mut_ptr()).into(), "H5Gget_info")?;
            info.assume_init()
        };
        Ok(info.storage_type == H5G_storage_type_t::H5G_STORAGE_TYPE_SYMBOL_TABLE)
    }

    /// The link of that name, which is one component of a path.
    pub(in super::super) fn link(&self, group: hid_t, name: &str) -> Result<Link> {
        let c_name = c_string(name)?;
        let mut info = LinkInfo { kind: -1, ordered: 0, order: 0, set: 0, token: Token([0; 16]) };
        // SAFETY: lock held; the library fills the record it is given.
        check(unsafe { H5Lget_info2(group, c_name.as_ptr(), &raw mut info, 0) }.into(), "H5Lget_info2")?;
        Ok(Link { name: c_name.into_bytes(), kind: info.kind, token: info.token.0 })
    }

    /// The object a hard link leads to. By address: no name is looked up, no other link followed.
    pub(in super::super) fn follow(&self, file: hid_t, link: &Link) -> Result<Object<'_>> {
        // SAFETY: lock held; a token is 16 plain bytes.
        let token = unsafe { std::mem::transmute::<[u8; 16], H5O_token_t>(link.token) };
        // SAFETY: lock held; the library checks the address in the token.
        self.object(owned(unsafe { H5Oopen_by_token(file, token) }, "H5Oopen_by_token")?)
    }

    pub(in super::super) fn object<'l>(&'l self, id: Id<'l>) -> Result<Object<'l>> {
        let mut info = std::mem::MaybeUninit::<H5O_info2_t>::uninit();
        // SAFETY: lock held; the library fills in what is asked for and zeroes the rest, and computes the kind itself.
        let info = unsafe {
            let status = H5Oget_info3(*id, info.as_mut_ptr(), H5O_INFO_BASIC | H5O_INFO_NUM_ATTRS);
            check(status.into(), "H5Oget_info3")?;
            info.assume_init()
        };
        // SAFETY: as in `follow`.
        let token = unsafe { std::mem::transmute::<H5O_token_t, [u8; 16]>(info.token) };
        Ok(Object { id, kind: info.type_, attributes: info.num_attrs, links: info.rc, token })
    }

    /// Names of the attributes of an object, in the order they are stored, at most `limit`.
    pub(in super::super) fn attribute_names(
        &self,
        object: hid_t,
        limit: usize,
        budget: &mut Budget,
    ) -> Result<Vec<CString>> {
        extern "C" fn each(_: hid_t, name: *const c_char, _: *const sys::h5a::H5A_info_t, data: *mut c_void) -> herr_t {
            // SAFETY: as in `links`.
            unsafe { (*data.cast::<Gathered<_>>()).add(CStr::from_ptr(name), CStr::to_owned) }
        }
        let mut all = Gathered::new(limit, budget);
        let (by, order) = (H5_index_t::H5_INDEX_NAME, H5_iter_order_t::H5_ITER_NATIVE);
        // SAFETY: as in `links`.
        let status = unsafe { H5Aiterate2(object, by, order, &mut 0, Some(each), (&raw mut all).cast()) };
        check(status.into(), "H5Aiterate2")?;
        all.done()
    }

    /// The attribute of an object, its type and its shape.
    pub(in super::super) fn attribute(&self, object: hid_t, name: &CStr) -> Result<StringAttribute<'_>> {
        // SAFETY: lock held; `name` is a C string that outlives the call.
        unsafe {
            let id: Id = owned(H5Aopen(object, name.as_ptr(), 0), "H5Aopen")?;
            let dtype: Id = owned(H5Aget_type(*id), "H5Aget_type")?;
            let space: Id = owned(H5Aget_space(*id), "H5Aget_space")?;
            let shape = self.dimensions(*space)?;
            let string = self.H5Tget_class(*dtype)? == H5T_class_t::H5T_STRING as usize;
            let variable = string && check(sys::h5t::H5Tis_variable_str(*dtype).into(), "H5Tis_variable_str")? > 0;
            let utf8 = string && self.H5Tget_cset(*dtype)? == sys::h5t::H5T_cset_t::H5T_CSET_UTF8 as usize;
            Ok(StringAttribute { id, dtype, shape, string, variable, utf8 })
        }
    }

    /// The strings of an attribute of variable-length ones.
    pub(in super::super) fn read_strings(&self, attribute: &StringAttribute<'_>, count: usize) -> Result<Vec<Vec<u8>>> {
        if !attribute.variable || attribute.count() != Some(count) {
            return Err(Error::new(Kind::Internal, "attribute is no row of so many strings"));
        }
        let mut texts = try_with_capacity(count)?;
        texts.resize(count, ptr::null_mut::<c_char>());
        let mut values = try_with_capacity(count)?;
        // SAFETY: lock held; the library sets as many pointers as the attribute has elements, to strings that it
        // allocates and we free, or to null.
        unsafe {
            let status = H5Aread(*attribute.id, *attribute.dtype, texts.as_mut_ptr().cast());
            for text in texts {
                let text = ptr::NonNull::new(text);
                values.push(text.map_or_else(Vec::new, |text| CStr::from_ptr(text.as_ptr()).to_bytes().to_vec()));
                text.map(|text| H5free_memory(text.as_ptr().cast()));
            }
            check(status.into(), "H5Aread")?;
            Ok(values)
        }
    }

    /// The strings of an attribute of `count` ones that take `size` bytes each, without their padding.
    pub(in super::super) fn read_fixed(
        &self,
        attribute: &StringAttribute<'_>,
        count: usize,
        size: usize,
    ) -> Result<Vec<Vec<u8>>> {
        let same = attribute.count() == Some(count) && self.H5Tget_size(*attribute.dtype)? == size && size > 0;
        let total = count.checked_mul(size).filter(|_| same && !attribute.variable);
        let total = total.ok_or_else(|| Error::new(Kind::Internal, "attribute is no row of strings of that length"))?;
        let mut bytes = try_with_capacity(total)?;
        bytes.resize(total, 0u8);
        // SAFETY: lock held; all elements of the type fill `bytes` exactly.
        let spaces = unsafe {
            check(H5Aread(*attribute.id, *attribute.dtype, bytes.as_mut_ptr().cast()).into(), "H5Aread")?;
            sys::h5t::H5Tget_strpad(*attribute.dtype) == H5T_str_t::H5T_STR_SPACEPAD
        };
        let mut strings = try_with_capacity(count)?;
        strings.extend(bytes.chunks(size).map(|s| unpadded(s, spaces)));
        Ok(strings)
    }
}

/// An open attribute, and what is to be known before it is read.
pub(in super::super) struct StringAttribute<'l> {
    id: Id<'l>,
    dtype: Id<'l>,
    pub(in super::super) shape: Option<Vec<u64>>,
    pub(in super::super) string: bool,
    pub(in super::super) variable: bool,
    pub(in super::super) utf8: bool,
}

impl StringAttribute<'_> {
    /// How many strings it has, if it is a scalar or a row.
    pub(in super::super) fn count(&self) -> Option<usize> {
        self.shape.as_deref().and_then(string_count)
    }

    /// Its type.
    pub(in super::super) fn dtype(&self) -> hid_t {
        *self.dtype
    }
}
